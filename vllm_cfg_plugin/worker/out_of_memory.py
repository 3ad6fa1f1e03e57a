"""What a rank does when it runs out of memory: packs are split and their size remembered, decodes repeated in tiles.

Must not import vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch

from vllm_cfg_plugin.distributed.sequence_group import ALONE, SequenceGroup, together
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.adapters import carrying
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline

logger = get_logger(__name__)


class PackedForwards:
    """The packed forwards of one rank.

    A pack that fails is split, so that nobody fails for others. One that failed for want of memory is remembered: from
    then on larger ones are split beforehand, because to try them again would cost each step a failed forward.

    Args:
        group: the processes that share them.

    Attributes:
        too_many_tokens: those of the smallest pack for which there was no memory; None while there always was.
    """

    def __init__(self, pipeline: EnginePipeline, group: SequenceGroup = ALONE) -> None:
        self._pipeline = pipeline
        self._group = group
        self.too_many_tokens: int | None = None

    def predict(self, inputs: Sequence[BranchInput]) -> list[torch.Tensor | Exception]:
        """The prediction of each branch, or why there is none."""
        return [outcome for part in self._parts(inputs) for outcome in self._predict(part)]

    def _parts(self, inputs: Sequence[BranchInput]) -> list[Sequence[BranchInput]]:
        """One pack, or the fewest parts of about equally many tokens that fit in memory."""
        tokens, limit = sum(branch.tokens for branch in inputs), self.too_many_tokens
        if limit is None or tokens < limit or len(inputs) == 1:
            return [inputs]
        most = tokens / ceil((tokens + 1) / limit)
        parts: list[list[BranchInput]] = [[]]
        for branch in inputs:
            if parts[-1] and sum(own.tokens for own in parts[-1]) + branch.tokens / 2 > most:
                parts.append([])
            parts[-1].append(branch)
        return [*parts]

    def _predict(self, inputs: Sequence[BranchInput]) -> list[torch.Tensor | Exception]:
        """Predict all in one call; if that fails, in halves, down to the one that fails alone."""
        try:
            with together(self._group):
                return [*self.forward(inputs)]
        except Exception as error:
            if len(inputs) == 1:
                return [error]
            logger.warning("A packed forward of %d branches failed and is split: %s", len(inputs), error)
            if isinstance(error, torch.OutOfMemoryError):
                _free_cached(inputs[0].latents)
                if self._group.size == 1:  # else the others, which did not run out of it, would not split alike
                    self.too_many_tokens = sum(branch.tokens for branch in inputs)
        # Outside the except block, so that the failed call's tensors are free before the halves are tried.
        middle = len(inputs) // 2
        return self._predict(inputs[:middle]) + self._predict(inputs[middle:])

    def forward(self, inputs: Sequence[BranchInput]) -> Sequence[torch.Tensor]:
        """Predict all in one call.

        Raises:
            Exception: of the pipeline.
        """
        with carrying([branch.carried for branch in inputs]):
            prediction = self._pipeline.predict_noise(**self._pipeline.pack_branches(inputs))
        predictions = self._pipeline.unpack_predictions(prediction, inputs)
        if len(predictions) != len(inputs):
            raise ValueError(f"unpack_predictions returned {len(predictions)} predictions of {len(inputs)} branches")
        return predictions


def decode(
    pipeline: EnginePipeline,
    latents: torch.Tensor,
    request: DiffusionRequest,
    condition: Sequence[torch.Tensor],
    is_tiled: bool = False,
) -> torch.Tensor:
    """`pipeline.decode`; where there is no memory for it, in tiles, which shows in some pixels of their seams.

    Args:
        is_tiled: it is known beforehand that there is none.

    Raises:
        torch.OutOfMemoryError: the VAE knows no tiles, or these are too large as well.
    """
    tiled = pipeline.tiled() if is_tiled else None
    if tiled is None:
        try:
            return pipeline.decode(latents, request, condition)
        except torch.OutOfMemoryError:
            if (tiled := pipeline.tiled()) is None:
                raise
        _free_cached(latents)
    logger.warning(
        "%dx%d pixels are decoded in tiles: there is no memory for them as a whole", request.width, request.height
    )
    return tiled.decode(latents, request, condition)


def _free_cached(tensor: torch.Tensor) -> None:
    """Give back what torch keeps of the memory of failed operations, which may be in pieces too small for others."""
    if tensor.is_cuda:
        torch.cuda.empty_cache()
