"""What every family inherits before its class of diffusers: components of ours, and a `__call__` on the cfg ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from vllm_cfg_plugin.distributed.cfg_parallel import same_on_all_ranks
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import EnginePipeline
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.common.generate import DirectCall, Generators


class FamilyPipeline(EnginePipeline):
    """Inherited beside diffusers' pipeline class, and before it.

    Attributes:
        adopted: classes of ours that take over components, with their weights: `adopt` makes one of a loaded component.
        output_class: what a call returns, a class of diffusers.
        call_options: arguments of a call beyond those of diffusers' `__call__`, and other defaults than its own.
    """

    adopted: ClassVar[Mapping[str, Any]]
    output_class: ClassVar[type]
    call_options: ClassVar[Mapping[str, Any]] = {}
    heads_field = "num_attention_heads"

    maybe_free_model_hooks: Any

    def register_modules(self, **components: Any) -> None:
        """diffusers' `__init__` hands all components to this method."""
        for name, ours in self.adopted.items():
            if components.get(name) is not None:
                components[name] = ours.adopt(components[name])
        diffusers_class: Any = super()
        diffusers_class.register_modules(**components)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate images or videos; under `torchrun` every rank calls this alike and returns the same.

        The arguments are those of diffusers' own `__call__` of this class, in its order and with its defaults, and the
        `call_options`. Arguments that only diffusers' loop can take (callbacks, sigmas, embeddings) are refused.

        Raises:
            InvalidRequestError: an argument's value, or an argument that is not taken here.
            RequestFailedError: another rank failed.
        """
        call = CallArguments(self, args, kwargs, self.call_options)
        requests = self._requests(call)
        generator, latents, output_type, return_dict = call.generator, call.latents, call.output_type, call.return_dict
        direct = self._direct_call(requests, call)
        noise = self._first_latents(requests[0], len(requests), generator, latents)
        final = direct.denoise(same_on_all_ranks(noise))
        results = self._results(final, requests[0], direct.condition, output_type)
        self.maybe_free_model_hooks()
        return self.output_class(results) if return_dict else (results,)

    @abstractmethod
    def _requests(self, call: CallArguments) -> list[DiffusionRequest]:
        """What a call asks for; they differ in their texts alone."""

    def _direct_call(self, requests: Sequence[DiffusionRequest], call: CallArguments) -> DirectCall:
        call.check_all_were_read()
        return DirectCall(self, requests, call.generator)

    @abstractmethod
    def _first_latents(
        self, request: DiffusionRequest, count: int, generator: Generators, latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """First latents of so many results, [count, ...], from a generator or as a caller gives them."""

    @abstractmethod
    def _results(
        self, latents: torch.Tensor, request: DiffusionRequest, condition: Sequence[torch.Tensor], output_type: str
    ) -> Any:
        """What a call returns of final latents; these themselves for the output type "latent"."""
