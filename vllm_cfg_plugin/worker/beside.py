"""What a rank does for a request beside the steps: draw its noise, encode its texts and images, decode, forward.

Threads of the side work call these; what they make is handed over to the steps. Must not import torch.distributed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from vllm_cfg_plugin.distributed.sequence_group import SequenceGroup, together
from vllm_cfg_plugin.engine.plan import Embeds
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import EnginePipeline, PromptEmbeds, generator_of
from vllm_cfg_plugin.pipelines.common.tensor_cache import TensorCache
from vllm_cfg_plugin.worker.adapters import AdapterStore
from vllm_cfg_plugin.worker.embeds import pack_embeds, unpack_embeds
from vllm_cfg_plugin.worker.estimate import estimated_final_latents
from vllm_cfg_plugin.worker.kept_state import resume
from vllm_cfg_plugin.worker.lineup import branch_input, checked_prediction, checked_shape
from vllm_cfg_plugin.worker.out_of_memory import PackedForwards, decode
from vllm_cfg_plugin.worker.pace import Pace
from vllm_cfg_plugin.worker.state import RequestState


class BesideSteps:
    """The work of one rank on single requests.

    Args:
        pace: of the steps.
        forwards: of long requests.
        group: the processes that share those.
        cache_bytes: of each of its two caches.

    Attributes:
        embeddings: of texts that were encoded.
        conditions: what images of requests became.
        adapters: that requests carry.
    """

    def __init__(
        self,
        pipeline: EnginePipeline,
        pace: Pace,
        forwards: PackedForwards,
        group: SequenceGroup,
        cache_bytes: int,
        adapters: AdapterStore,
    ) -> None:
        self.adapters = adapters
        self.embeddings: TensorCache[PromptEmbeds] = TensorCache(cache_bytes)
        self.conditions: TensorCache[list[torch.Tensor]] = TensorCache(cache_bytes)
        self._pipeline = pipeline
        self._pace = pace
        self._forwards = forwards
        self._group = group
        self._text_lock = threading.Lock()  # tokenizers serve one thread at a time

    def prepare(self, state: RequestState, kept: bytes) -> None:
        """Make a request ready for its first step, or for the one after those that were kept."""
        state.generator = generator_of(state.request)
        state.latents = self._pipeline.draw_noise(state.request, state.generator)
        state.noise_scheduler = self._pipeline.make_noise_scheduler(state.request)
        if kept:
            resume(state, kept)

    def encode(self, state: RequestState, branch: int, is_shared: bool) -> torch.Tensor | None:
        """Encode a branch's text; returns what is to be shared with other ranks."""
        request = state.request
        if request.on_all_ranks:
            if (preparation := state.preparation) is not None:
                preparation.result()
            state.prompt_embeds = dict.fromkeys(range(len(request.prompts)), self._encode_text(request, branch))
            state.prediction_shape = checked_shape(self._pipeline.prediction_shape(request))
            return None
        embeds = self.embeddings.get(request.embeds_key(branch), partial(self._encode_text, request, branch))
        self._hold(state, branch, embeds)
        return pack_embeds(embeds) if is_shared else None

    def take_over(self, state: RequestState, embeds: Embeds) -> None:
        """Hold what another rank has encoded."""
        self._hold(state, embeds.branch, unpack_embeds(embeds.data, self._pipeline.prediction_like.device))

    def forward(self, state: RequestState, branches: Iterable[int]) -> None:
        """Predict branches of a long request, one after the other: they gain nothing from sharing a forward."""
        with together(self._group):
            for branch in branches:
                (outcome,) = self._forwards.forward([branch_input(state, branch)])
                prediction = checked_prediction(outcome, state.prediction_shape)
                self.hand_over([prediction])
                state.predictions[branch] = prediction

    def decode_final(self, state: RequestState, is_tiled: bool) -> torch.Tensor:
        """Decode a request that has taken all its steps."""
        if state.last_flags is not None and state.last_flags.failed(state.id):
            raise RuntimeError("another rank could not take its last step")
        return self._decode(state.request, state.latents, is_tiled)

    def decode_estimate(
        self,
        request: DiffusionRequest,
        noise_scheduler: Any,
        noise: torch.Tensor,
        index: int,
        latents: torch.Tensor,
        is_tiled: bool,
    ) -> torch.Tensor:
        """Decode what a request is heading for at one of its steps."""
        return self._decode(request, estimated_final_latents(noise_scheduler, noise, index, latents), is_tiled)

    def _decode(self, request: DiffusionRequest, latents: torch.Tensor, is_tiled: bool) -> torch.Tensor:
        """The pixels of latents: uint8 [number, height, width, channels] on the CPU."""
        if not torch.isfinite(latents).all():
            raise ArithmeticError("its latents are not finite (NaN or infinity)")
        condition = self._condition(request) if self._pipeline.decode_sees_images else []
        return decode(self._pipeline, latents, request, condition, is_tiled).contiguous()

    def hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """What was made beside the steps is read in them."""
        for tensor in tensors:
            self._pace.hand_over(tensor)

    def _encode_text(self, request: DiffusionRequest, branch: int) -> PromptEmbeds:
        with self._text_lock:
            return self._pipeline.encode_branch(request, branch)

    def _hold(self, state: RequestState, branch: int, embeds: PromptEmbeds) -> None:
        state.condition = self._condition(state.request)
        state.carried = self.adapters.carried(state.request.lora)
        of_adapters = [tensor for adapter, _ in state.carried for tensor in adapter.tensors]
        self.hand_over((*embeds.tensors, *state.condition, *of_adapters))
        state.prompt_embeds[branch] = embeds

    def _condition(self, request: DiffusionRequest) -> list[torch.Tensor]:
        """What the request's images became."""
        if not request.images:
            return []
        # The size of the result too: some families bring the images to it.
        key = (*request.condition_key, request.height, request.width, request.num_frames)
        return self.conditions.get(key, partial(self._pipeline.encode_images, request))
