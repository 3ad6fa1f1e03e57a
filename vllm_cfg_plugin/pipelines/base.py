"""What the engine asks of a model family: the contract between the worker's step loop and a pipeline.

Must not import vLLM; diffusers is the business of the families.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import torch
from PIL import Image

from vllm_cfg_plugin import guidance
from vllm_cfg_plugin.checkpoint import Checkpoint, PipelineInfo
from vllm_cfg_plugin.distributed.cfg_parallel import CFGParallelMixin
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.params import GUIDANCE_FIELDS, DiffusionRequest, ImageInput
from vllm_cfg_plugin.pipelines.adapters import Carried
from vllm_cfg_plugin.pipelines.components import load_streamed, load_transformer
from vllm_cfg_plugin.pipelines.weight_files import component_names

_LARGE_TILE = 128  # latent pixels of a side


@dataclass(frozen=True)
class PromptEmbeds:
    """What a text became.

    Attributes:
        tokens: [text_tokens, dim].
        pooled: [dim], where the family has such a summary.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.tokens] if self.pooled is None else [self.tokens, self.pooled]


@dataclass(frozen=True)
class BranchInput:
    """One branch forward of one request in one step.

    Attributes:
        latents: what `draw_noise` made, some steps later.
        embeds: of this branch's text.
        timestep: a scalar, one element of the noise scheduler's `timesteps`.
        branch: number of the branch.
        condition: what `encode_images` made of the request's images; empty without any.
        timesteps_ahead: those of the following steps, [any number], a view of the same `timesteps`: what depends on a
            timestep alone may be computed ahead and remembered, as weights do not change; None forbids that. Both may
            stay on the CPU, which spares a GPU's queue from being waited for.
        carried: the adapters that the forward carries.
    """

    request: DiffusionRequest
    latents: torch.Tensor
    embeds: PromptEmbeds
    timestep: torch.Tensor
    branch: int = 0
    condition: Sequence[torch.Tensor] = ()
    timesteps_ahead: torch.Tensor | None = None
    carried: Carried = ()

    @property
    def tokens(self) -> int:
        """Of its sequence: of the result, of the images that come along, and of the text."""
        return self.request.image_tokens + self.request.condition_tokens + self.embeds.tokens.shape[0]


class EnginePipeline(CFGParallelMixin, ABC):
    """A pipeline that the engine can run: many requests' branches in one forward, everything else request by request.

    The engine makes one `predict_noise(**pack_branches(...))` call a step for every group of branches, then, request by
    request, `combine_branches`, which calls the mixin's hooks, and `step_latents`. What belongs to large requests runs
    beside that: two threads at once may call `predict_noise` and its two companions, `encode_images` and `decode`.

    Attributes:
        scheduler: the checkpoint's noise scheduler: what those of requests are made from.
        decode_sees_images: `decode` needs what `encode_images` made.
        float32_components: what is loaded in float32 whatever the dtype.
        guidance_fields: those of `GUIDANCE_FIELDS` that `combine_branches` reads; requests with others are refused. A
            class with a `combine_branches` of its own says which.
        heads_field: of transformer/config.json, the number of attention heads, by which processes share packed
            forwards; "" where they can't.
        layer_lists: names of the transformers' lists of layers that packed forwards take by `offload.in_turn`, so that
            weights may be in host memory, and of each the names of a layer's children that give modulations.
    """

    decode_sees_images: ClassVar[bool] = False
    float32_components: ClassVar[tuple[str, ...]] = ()
    guidance_fields: ClassVar[frozenset[str]] = GUIDANCE_FIELDS
    heads_field: ClassVar[str] = ""
    layer_lists: ClassVar[Mapping[str, Sequence[str]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(_definer(cls, "step_latents"), _definer(cls, "scheduler_step")):
            raise TypeError(
                f"{cls.__name__} overrides scheduler_step, which a loop of its own calls, and not step_latents, which "
                "the engine calls: override that one too"
            )
        if not issubclass(_definer(cls, "guidance_fields"), _definer(cls, "combine_branches")):
            raise TypeError(
                f"{cls.__name__} overrides combine_branches: set guidance_fields to those of "
                f"{', '.join(sorted(GUIDANCE_FIELDS))} that it reads"
            )

    @classmethod
    @abstractmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        """What a checkpoint can do, from its configuration files alone.

        Raises:
            ConfigurationError: a file is missing, or asks for something that this pipeline lacks.
        """

    @classmethod
    def loaded_class(cls) -> type:
        """The class of diffusers, or one derived from it, whose components are loaded."""
        return cls

    @classmethod
    def tensor_plans(cls) -> Mapping[str, Any]:
        """{component: `TensorPlan`} of the models that can be divided among ranks; none, unless a family has some."""
        return {}

    @classmethod
    def load(
        cls,
        model: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        revision: str | None = None,
        variant: str | None = None,
        streamed: Sequence[str] = (),
        quantization: str | None = None,
        offloaded_bytes: int = 0,
        **components: Any,
    ) -> Self:
        """Load a checkpoint for inference, each component straight to the device.

        Args:
            model: folder or hub repository id.
            dtype: of weights and computation.
            variant: of the names of weight files, as in `model.fp16.safetensors`.
            streamed: components that stay in host memory, from where their layers come to the device one by one.
            quantization: of the transformers' layers, of `quantized.METHODS`.
            offloaded_bytes: of the transformers' weights that are to stay in host memory, see `offload.py`.
            components: to be used in place of the checkpoint's own; None for those to do without.

        Raises:
            ConfigurationError: the checkpoint can't be loaded or asks for something the packed forward lacks.
        """
        from diffusers.pipelines.pipeline_utils import SUPPORTED_DEVICE_MAP

        diffusers_class: Any = cls
        checkpoint = Checkpoint(model, revision)
        dtypes = {"default": dtype} | dict.fromkeys(cls.float32_components, torch.float32)
        # Without it all components would be made in host memory first. It names no index: the current device's counts.
        is_placed = device.type != "cpu" and device.type in SUPPORTED_DEVICE_MAP
        placed = {"device_map": device.type} if is_placed else {}
        try:
            for name in streamed:
                of_component = dtypes.get(name, dtype)
                components[name] = load_streamed(checkpoint, cls, name, of_component, device, variant)
            transformers = _transformers_of(checkpoint, cls) if quantization or offloaded_bytes else []
            for name in transformers:
                components[name] = load_transformer(
                    checkpoint,
                    cls,
                    name,
                    dtype,
                    device,
                    variant,
                    quantization=quantization,
                    offloaded_bytes=offloaded_bytes // len(transformers),
                )
            pipeline = diffusers_class.from_pretrained(
                model, dtype=dtypes, revision=revision, variant=variant, use_safetensors=True, **placed, **components
            )
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"model {model!r} can't be loaded: {error}") from error
        return pipeline if is_placed else pipeline.to(device)

    # ---- once for a request ----

    @abstractmethod
    def encode_branch(self, request: DiffusionRequest, branch: int) -> PromptEmbeds:
        """Embeddings of one branch's text; bitwise the same for an equal `request.embeds_key(branch)`."""

    def encode_images(self, request: DiffusionRequest) -> list[torch.Tensor]:
        """What the request's images are to the model (their latents, say); not called for a request without any."""
        raise NotImplementedError(f"{type(self).__name__} takes no images")

    @abstractmethod
    def draw_noise(self, request: DiffusionRequest, generator: torch.Generator) -> torch.Tensor:
        """First latents, [1, ...], from the request's own generator: on the CPU, fresh from its seed."""

    @staticmethod
    def set_timesteps(scheduler: Any, num_inference_steps: int, image_tokens: int, device: torch.device) -> None:
        """Set a noise scheduler to the first of its timesteps, as diffusers' pipeline of this family does.

        Args:
            scheduler: a fresh one.
            image_tokens: of the latents, where the timesteps depend on their number.
            device: of the timesteps.
        """
        scheduler.set_timesteps(num_inference_steps, device=device)
        begin(scheduler)

    @abstractmethod
    def make_noise_scheduler(self, request: DiffusionRequest) -> Any:
        """A noise scheduler of the request's own, its timesteps set and at its first step."""

    @abstractmethod
    def decode(
        self, latents: torch.Tensor, request: DiffusionRequest, condition: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        """The images or frames of final latents: uint8 [number, height, width, channels] on the CPU.

        Args:
            condition: what `encode_images` made, if `decode_sees_images`.
        """

    def tiled(self) -> Self | None:
        """This pipeline with a VAE that works tile by tile, in less memory; None where it has no such VAE."""
        vae: Any = getattr(self, "vae", None)
        if not hasattr(vae, "enable_tiling"):
            return None
        tiled, own = copy(self), copy(vae)  # of the same modules and weights
        own.enable_tiling()
        own.enable_slicing()
        if getattr(own, "tile_latent_min_size", 0) >= _LARGE_TILE:  # as large as the images that it was made for
            own.tile_latent_min_size //= 2
            own.tile_sample_min_size //= 2
        vars(tiled)["vae"] = own
        return tiled

    # ---- once for a step ----

    def forward_group(self, branch: BranchInput) -> Hashable:
        """Branches of one group share a packed forward: those that the same model forwards.

        A family without a packed forward returns `object()`, equal to nothing else: every branch is alone.
        """
        return None

    @abstractmethod
    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        """The arguments of the one `predict_noise` call that forwards all branches of a group."""

    @abstractmethod
    def unpack_predictions(self, prediction: torch.Tensor, branches: Sequence[BranchInput]) -> list[torch.Tensor]:
        """What `predict_noise` returned, branch by branch, each [1, *prediction_shape]."""

    @abstractmethod
    def prediction_shape(self, request: DiffusionRequest) -> tuple[int, ...]:
        """Shape of one prediction without its leading 1, known without computing it.

        Of a request that is prepared on all ranks it is asked after `encode_branch`.
        """

    @property
    def prediction_like(self) -> torch.Tensor:
        """Any tensor of the predictions' dtype and device."""
        return self._weight

    def guidance_scale_at(self, request: DiffusionRequest, timestep: torch.Tensor) -> float:
        """The scale of classifier-free guidance at a timestep."""
        return request.guidance.scale

    def combine_branches(
        self, predictions: Sequence[torch.Tensor], request: DiffusionRequest, timestep: torch.Tensor, step: int
    ) -> torch.Tensor:
        """The prediction of a step from those of its branches, [1, ...] each; override it for more than two branches.

        Args:
            predictions: of the branches in order; one, where the step is not guided.
            step: number of the step, from 0 up.
        """
        asked = request.guidance
        if request.guided and asked.rule == "cfg_zero_star" and step < guidance.ZERO_INIT_STEPS:
            return torch.zeros_like(predictions[0])
        if len(predictions) == 1:
            return predictions[0]
        positive, negative = predictions
        scale = self.guidance_scale_at(request, timestep)
        if asked.rule == "cfg":
            combined = self.combine_cfg_noise(positive, negative, scale, asked.normalize)
        else:
            combined = guidance.RULES[asked.rule](positive, negative, scale)
            combined = self.cfg_normalize_function(positive, combined) if asked.normalize else combined
        return guidance.rescale_to_deviation(positive, combined, asked.rescale) if asked.rescale else combined

    def step_latents(
        self,
        scheduler: Any,
        noise_pred: torch.Tensor,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """The latents after one step of the request's own noise scheduler; override it for another call of that.

        Every rank steps every request, so a step that draws noise must draw it from `generator`.

        Args:
            scheduler: what `make_noise_scheduler` returned.
            timestep: the next of its `timesteps`.
            generator: the request's own, which drew its first latents.
        """
        options = {"generator": generator} if _takes_generator(type(scheduler).step) else {}
        stepped: torch.Tensor = scheduler.step(noise_pred, timestep, latents, return_dict=False, **options)[0]
        return stepped

    # ---- weights ----

    @property
    def _weight(self) -> torch.Tensor:
        """Any weight of the transformer's dtype and device; diffusers' own properties search all of them each time."""
        weight: torch.Tensor = next(self.transformer.parameters())
        return weight

    def forget_derived(self) -> None:
        """Forget what was computed from the weights alone, because they have changed; a family that keeps any does."""


def generator_of(request: DiffusionRequest) -> torch.Generator:
    """A request's own generator: it draws the first latents, then the noise of steps that draw some."""
    return torch.Generator("cpu").manual_seed(request.seed)


def begin(scheduler: Any) -> None:
    """Put a noise scheduler at the first of its timesteps, rather than where that is found by its value."""
    if hasattr(scheduler, "set_begin_index"):  # others look for their place in each step
        scheduler.set_begin_index(0)


def group_branches(pipeline: EnginePipeline, branches: Sequence[BranchInput]) -> list[list[int]]:
    """Positions of the branches that share a forward, group by group."""
    groups: dict[Hashable, list[int]] = {}
    for position, branch in enumerate(branches):
        groups.setdefault(pipeline.forward_group(branch), []).append(position)
    return list(groups.values())


def joint_timesteps_ahead(branches: Sequence[BranchInput]) -> torch.Tensor | None:
    """The `timesteps_ahead` of all branches, [any number]; None where one of them forbids that."""
    ahead = [branch.timesteps_ahead for branch in branches if branch.timesteps_ahead is not None]
    return torch.cat(ahead) if len(ahead) == len(branches) else None


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in 0..1, [number, channels, height, width], as `EnginePipeline.decode` returns them.

    Rounded as diffusers' `numpy_to_pil` does, but where the pixels are: a quarter of the bytes to copy.
    """
    return (pixels.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def from_pil(image: Image.Image) -> ImageInput:
    """An image of a direct call, as a request brings it along."""
    converted = image.convert("RGBA" if image.has_transparency_data else "RGB")
    pixels = converted.tobytes()
    digest = hashlib.sha256(pixels).hexdigest()
    return ImageInput(digest, converted.mode, converted.width, converted.height, pixels)


def to_pil(image: ImageInput) -> Image.Image:
    """The image that a request brought along, as diffusers' image processors take it."""
    return Image.frombytes(image.mode, (image.width, image.height), image.pixels)


def _transformers_of(checkpoint: Checkpoint, family: type) -> list[str]:
    """The components that predict noise."""
    return [name for name in component_names(checkpoint, family) if name.startswith("transformer")]


def _definer(cls: type, name: str) -> type:
    """The class whose method of this name acts in `cls`."""
    return next(base for base in cls.__mro__ if name in vars(base))


@cache
def _takes_generator(step: Callable[..., Any]) -> bool:
    return "generator" in inspect.signature(step).parameters
