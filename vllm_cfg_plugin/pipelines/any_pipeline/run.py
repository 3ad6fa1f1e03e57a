"""One request's own call of a diffusers pipeline, step by step, its parts dealt out to the request's branches.

Must not import vLLM.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from vllm_cfg_plugin.pipelines.any_pipeline.call_thread import CallThread
from vllm_cfg_plugin.pipelines.any_pipeline.calls import Part


class PipelineRun:
    """A pipeline's call, step by step; its thread ends when this is no longer referred to.

    Args:
        make_own: makes the pipeline that is called, which no other request uses.
        arguments: of its `__call__`.
        steps: steps that the engine takes. After so many of the noise scheduler's, or fewer where the pipeline takes
            fewer, the thread pauses before it goes on to decode.
        branches: a step's parts are dealt out to so many branches in turn.
        device: of the pipeline.

    Attributes:
        timesteps: one for each step of the engine's. Those of the noise scheduler are the thread's business.
    """

    def __init__(
        self,
        make_own: Callable[[], Any],
        arguments: Mapping[str, Any],
        steps: int,
        branches: int,
        device: torch.device,
    ) -> None:
        self.timesteps = torch.arange(steps)
        self._thread = CallThread(make_own, arguments, steps, device)
        self._branches = branches
        self._width = 0
        weakref.finalize(self, self._thread.close)

    def begin(self) -> None:
        """Run until the first predictions are needed."""
        self._thread.resume()
        sizes = [sum(part.size for part in self._parts[branch :: self._branches]) for branch in range(self._branches)]
        self._width = max(1, *sizes)

    @property
    def width(self) -> int:
        """Elements of a branch's predictions: as many as the first step has."""
        return self._width

    @property
    def latents(self) -> torch.Tensor:
        """After the last step of the noise scheduler."""
        return self._thread.latents

    def predict(self, branch: int) -> torch.Tensor:
        """Forward what a branch has to do in this step; float32 [width], its end unused where that is less."""
        prediction = torch.zeros(self._width, device=self._thread.device)
        for part, start in self._dealt(branch):
            prediction[start : start + part.size] = part.predict()
        return prediction

    def step(self, predictions: torch.Tensor) -> None:
        """Go on with all branches' predictions, [branches, width], until the next ones are needed."""
        dealt: set[int] = set()
        for branch, prediction in enumerate(predictions):
            for part, start in self._dealt(branch):
                part.fill(prediction[start : start + part.size])
                dealt.add(id(part))
        self._thread.fill([part for part in self._parts if id(part) not in dealt])
        if self._thread.is_predicting:
            self._thread.resume()

    def finish(self) -> Any:
        """What the pipeline returns; steps that are left are taken here."""
        while not self._thread.has_ended:
            self._thread.fill(self._parts)
            self._thread.resume()
        return self._thread.result

    @property
    def _parts(self) -> list[Part]:
        return self._thread.parts

    def _dealt(self, branch: int) -> Iterator[tuple[Part, int]]:
        """The branch's parts, and where each one's prediction starts; what has no room is forwarded by every rank."""
        start = 0
        for part in self._parts[branch :: self._branches]:
            if start + part.size <= self._width:
                yield part, start
                start += part.size
