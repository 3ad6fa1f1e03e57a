"""A diffusers pipeline of any class behind the engine's contract: each rank runs its own `__call__` for each request.

What the ranks share is the denoiser's forwards, the costly part. All else (texts, images, the noise scheduler) every
rank does itself, but for the last decode. Must not import vLLM.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Self
from weakref import WeakValueDictionary

import diffusers
import torch

from vllm_cfg_plugin.checkpoint import Checkpoint, PipelineInfo
from vllm_cfg_plugin.errors import ConfigurationError, InputsRefusedError
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.any_pipeline.call_thread import watched
from vllm_cfg_plugin.pipelines.any_pipeline.calls import Denoiser
from vllm_cfg_plugin.pipelines.any_pipeline.description import describe_class
from vllm_cfg_plugin.pipelines.any_pipeline.outline import DENOISERS
from vllm_cfg_plugin.pipelines.any_pipeline.outputs import arguments_of, pixels_of
from vllm_cfg_plugin.pipelines.any_pipeline.run import PipelineRun
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline, PromptEmbeds, generator_of

_AUTOENCODERS = ("vae", "vq", "movq", "audio_vae")


class AnyPipeline(EnginePipeline):
    """One class of diffusers has one subclass, see `classes`.

    Attributes:
        diffusers_class: the pipeline's.
    """

    diffusers_class: ClassVar[Any]
    guidance_fields: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        components = pipeline.components
        self.scheduler = components.get("scheduler")
        modules = {name: components[name] for name in DENOISERS if isinstance(components.get(name), torch.nn.Module)}
        self.denoisers = [Denoiser(name, module) for name, module in modules.items()]
        if not self.denoisers:
            raise ConfigurationError(
                f"a {type(pipeline).__name__} can't be served: none of its components is a denoiser "
                f"({', '.join(DENOISERS)})"
            )
        if any(isinstance(value, diffusers.DiffusionPipeline) for value in vars(pipeline).values()):
            raise ConfigurationError(f"a {type(pipeline).__name__} can't be served: it is made of other pipelines")
        self.transformer = self.denoisers[0].module
        self._runs: WeakValueDictionary[int, PipelineRun] = WeakValueDictionary()  # by the id of their request

    @classmethod
    def describe(cls, checkpoint: Checkpoint) -> PipelineInfo:
        return describe_class(cls.diffusers_class, checkpoint)

    @classmethod
    def loaded_class(cls) -> type:
        return cls.diffusers_class  # type: ignore[no-any-return]

    @classmethod
    def load(
        cls,
        model: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        revision: str | None = None,
        variant: str | None = None,
        **components: Any,
    ) -> Self:
        try:
            pipeline = cls.diffusers_class.from_pretrained(
                model, dtype=dtype, revision=revision, variant=variant, **components
            )
        except (OSError, ValueError, ImportError) as error:
            raise ConfigurationError(f"model {model!r} can't be loaded: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline.to(device))

    # ---- once for a request ----

    def draw_noise(self, request: DiffusionRequest, generator: torch.Generator) -> torch.Tensor:
        """Nothing: the pipeline draws it itself."""
        return torch.zeros(1, 1)

    @staticmethod
    def set_timesteps(scheduler: Any, num_inference_steps: int, image_tokens: int, device: torch.device) -> None:
        """As far as the number of timesteps goes: the pipeline does it itself."""
        options = {"mu": 1.0} if getattr(scheduler.config, "use_dynamic_shifting", False) else {}
        scheduler.set_timesteps(num_inference_steps, device=device, **options)

    def make_noise_scheduler(self, request: DiffusionRequest) -> PipelineRun:
        """The request's own call of the pipeline, which is to begin with `encode_branch`."""
        arguments = arguments_of(self.diffusers_class, request) | {"generator": generator_of(request)}
        copy_pipeline = partial(_own_copy, self.pipeline)  # and no more of self
        run = PipelineRun(copy_pipeline, arguments, request.steps, len(request.prompts), self._weight.device)
        self._runs[id(request)] = run
        return run

    def encode_branch(self, request: DiffusionRequest, branch: int) -> PromptEmbeds:
        """Run the pipeline until it needs the first predictions.

        Raises:
            InputsRefusedError: with what it says of its inputs.
        """
        try:
            self._runs[id(request)].begin()
        except ValueError as error:
            raise InputsRefusedError(f"{self.diffusers_class.__name__} refuses the request: {error}") from error
        return PromptEmbeds(torch.zeros(0, 1))

    def encode_images(self, request: DiffusionRequest) -> list[torch.Tensor]:
        """Nothing: the pipeline does it itself."""
        return []

    def decode(
        self, latents: torch.Tensor, request: DiffusionRequest, condition: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        return pixels_of(self._runs[id(request)].finish(), request)

    # ---- once for a step ----

    def forward_group(self, branch: BranchInput) -> object:
        return object()  # each branch is forwarded by itself

    def pack_branches(self, branches: Sequence[BranchInput]) -> dict[str, Any]:
        (branch,) = branches
        return {"run": self._runs[id(branch.request)], "branch": branch.branch}

    def predict_noise(self, *, run: PipelineRun, branch: int) -> torch.Tensor:  # type: ignore[override]
        return run.predict(branch)[None]

    def unpack_predictions(self, prediction: torch.Tensor, branches: Sequence[BranchInput]) -> list[torch.Tensor]:
        return [prediction]

    def prediction_shape(self, request: DiffusionRequest) -> tuple[int, ...]:
        """Known once the run has begun."""
        return (self._runs[id(request)].width,)

    @property
    def prediction_like(self) -> torch.Tensor:
        return torch.empty(0, device=self._weight.device)  # the denoisers' outputs may be of several dtypes

    def combine_branches(
        self, predictions: Sequence[torch.Tensor], request: DiffusionRequest, timestep: torch.Tensor, step: int
    ) -> torch.Tensor:
        """All of them: the pipeline combines them itself."""
        return torch.cat([*predictions])

    def step_latents(
        self,
        scheduler: PipelineRun,
        noise_pred: torch.Tensor,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        scheduler.step(noise_pred)
        return scheduler.latents


def _own_copy(pipeline: Any) -> Any:
    """A pipeline for one request, with the same weights.

    Its noise scheduler counts its steps, as does a guider, and an autoencoder may change what it is for a while: its
    dtype, and what it remembers of the frames before.
    """
    own = copy.copy(pipeline)
    for name, component in pipeline.components.items():
        if isinstance(component, diffusers.SchedulerMixin):
            # Past the pipeline's own __setattr__, which would register the class.
            vars(own)[name] = scheduler = copy.deepcopy(component)
            scheduler.__class__ = watched(type(component))
        elif type(component).__module__.startswith("diffusers.guiders."):
            vars(own)[name] = copy.deepcopy(component)
        elif isinstance(component, torch.nn.Module) and name.startswith(_AUTOENCODERS):
            vars(own)[name] = _with_same_weights(component)
    return own


def _with_same_weights(module: torch.nn.Module) -> torch.nn.Module:
    """A copy whose weights are in the same memory, until it is brought to another dtype."""
    parameters = {id(each): torch.nn.Parameter(each.detach(), requires_grad=False) for each in module.parameters()}
    buffers = {id(each): each.detach() for each in module.buffers()}
    return copy.deepcopy(module, {**parameters, **buffers})
