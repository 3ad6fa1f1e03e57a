"""What every family inherits before its class of diffusers: components of ours, and a `__call__` on the cfg ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.distributed.cfg_parallel import same_on_all_ranks
from vllm_cfg_plugin.distributed.sequence_group import Peers, current_group
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import EnginePipeline
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments
from vllm_cfg_plugin.pipelines.common.divided_loading import load_divided
from vllm_cfg_plugin.pipelines.common.generate import DirectCall, Generators
from vllm_cfg_plugin.pipelines.common.tensor_parallel import TensorPlan, divide
from vllm_cfg_plugin.pipelines.offload import offload_layers
from vllm_cfg_plugin.pipelines.quantized import quantize_layers
from vllm_cfg_plugin.pipelines.weight_files import component_names


class FamilyPipeline(EnginePipeline):
    """Inherited beside diffusers' pipeline class, and before it.

    Attributes:
        adopted: classes of ours that take over components, with their weights: `adopt` makes one of a loaded component.
            One with a `tensor_plan` can be divided among ranks.
        output_class: what a call returns, a class of diffusers.
        call_options: arguments of a call beyond those of diffusers' `__call__`, and other defaults than its own.
    """

    adopted: ClassVar[Mapping[str, Any]]
    output_class: ClassVar[type]
    call_options: ClassVar[Mapping[str, Any]] = {}
    heads_field = "num_attention_heads"

    maybe_free_model_hooks: Any

    @classmethod
    def tensor_plans(cls) -> dict[str, TensorPlan]:
        return {name: ours.tensor_plan for name, ours in cls.adopted.items() if hasattr(ours, "tensor_plan")}

    @classmethod
    def load(
        cls,
        model: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        revision: str | None = None,
        variant: str | None = None,
        quantization: str | None = None,
        offloaded_bytes: int = 0,
        **options: Any,
    ) -> Self:
        peers = current_group().tensor
        if peers.size == 1:
            options |= {"quantization": quantization, "offloaded_bytes": offloaded_bytes}
        else:
            if not Path(model).expanduser().is_dir():
                diffusers_class: Any = cls
                model = str(diffusers_class.download(model, revision=revision, variant=variant, use_safetensors=True))
            divided = cls._load_divided(Checkpoint(model), peers, dtype, variant)
            for one in divided.values():
                if quantization:
                    quantize_layers(one, quantization, device)
                offload_layers(one, device, offloaded_bytes // len(divided), cls.layer_lists)
            options |= divided
        return super().load(model, dtype=dtype, device=device, revision=revision, variant=variant, **options)

    @classmethod
    def _load_divided(
        cls, checkpoint: Checkpoint, peers: Peers, dtype: torch.dtype, variant: str | None
    ) -> dict[str, Any]:
        """This rank's part of the models that can be divided, in host memory."""
        names = component_names(checkpoint, cls)
        return {
            name: load_divided(checkpoint, cls, name, plan, peers, dtype=dtype, variant=variant or "")
            for name, plan in cls.tensor_plans().items()
            if name in names
        }

    def register_modules(self, **components: Any) -> None:
        """diffusers' `__init__` hands all components to this method."""
        for name, ours in self.adopted.items():
            if components.get(name) is not None:
                components[name] = ours.adopt(components[name])
        for name, plan in self.tensor_plans().items():
            if components.get(name) is not None:  # loaded by diffusers, all of it
                divide(components[name], plan, current_group().tensor)
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
