"""Every family that is served: a tiny checkpoint of it, diffusers' own pipeline, and requests that exercise it.

Shared by the distributed and end-to-end tests and by `make parity`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from tests.contract import make_request
from tests.model_builders.flux import build_flux
from tests.model_builders.longcat_image import build_longcat_image, build_longcat_image_edit
from tests.model_builders.qwen_image import build_qwen_image
from tests.model_builders.qwen_image_edit import (
    build_qwen_image_edit,
    build_qwen_image_edit_plus,
    build_qwen_image_layered,
)
from tests.model_builders.sd3 import build_sd3
from tests.model_builders.wan import build_wan
from tests.model_builders.z_image import build_z_image
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import EnginePipeline
from vllm_cfg_plugin.pipelines.longcat_image.edit import load_image_processor

STEPS = 6
SEED = 100  # of a family's first case; each next one has the next seed


@dataclass(frozen=True)
class Case:
    """One generation, written for both sides.

    Attributes:
        mode: what it shows, a few words.
        prompt: text.
        images: what comes along. image_names: the argument that diffusers' pipeline has for each, or one for all.
        params: fields of `DiffusionParams` that diffusers' pipeline has under the same names.
    """

    mode: str
    prompt: str
    params: Mapping[str, Any]
    images: tuple[Image.Image, ...] = ()
    image_names: tuple[str, ...] = ("image",)


@dataclass(frozen=True)
class Family:
    """One pipeline class.

    Attributes:
        build: saves a tiny checkpoint into a folder.
        components: of a folder's checkpoint, those that diffusers can't load by itself where torchvision is missing.
        to_reference: (our pipeline, final latents, request) -> latents as diffusers' pipeline returns them.
        tolerance: largest difference of fp32 latents to diffusers' pipeline.
        is_relative: that is a share of the latents' deviation, as they are of no scale of their own.
    """

    class_name: str
    build: Callable[[Path], Path]
    cases: tuple[Case, ...]
    name: str = ""
    to_reference: Callable[[Any, torch.Tensor, DiffusionRequest], torch.Tensor] = field(
        default=lambda pipeline, latents, request: latents
    )
    tolerance: float = 1e-4
    is_relative: bool = False
    components: Callable[[Path], dict[str, Any]] = lambda folder: {}

    @property
    def label(self) -> str:
        return self.name or self.class_name

    def difference(self, latents: torch.Tensor, expected: torch.Tensor) -> float:
        """The largest difference to diffusers' latents."""
        largest = (latents - expected).abs().max()
        return (largest / expected.std() if self.is_relative else largest).item()

    def requests(self, folder: Path) -> list[DiffusionRequest]:
        """The cases as the front end resolves them."""
        return [
            make_request(folder, case.prompt, case.images, seed=SEED + i, **case.params)
            for i, case in enumerate(self.cases)
        ]

    def reference(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """diffusers' own pipeline."""
        cls = getattr(diffusers, self.class_name)
        pipeline = cls.from_pretrained(folder, dtype=dtype, **self.components(folder))
        pipeline.set_progress_bar_config(disable=True)
        if hasattr(pipeline, "rewire_prompt"):  # which has a language model write each prompt anew
            pipeline.rewire_prompt = lambda prompt, device: prompt
        return _ReturnsLatents(pipeline) if self.class_name == "QwenImageLayeredPipeline" else pipeline


@dataclass(frozen=True)
class _ReturnsLatents:
    """diffusers' layered pipeline, which fails where latents are asked for."""

    pipeline: Any

    def __call__(self, *, output_type: str, **kwargs: Any) -> Any:
        if output_type != "latent":
            return self.pipeline(output_type=output_type, **kwargs)
        latents: list[torch.Tensor] = []

        def keep(pipeline: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            latents[:] = [tensors["latents"]]
            return tensors

        self.pipeline(output_type="pt", callback_on_step_end=keep, **kwargs)
        return latents


def call(pipeline: Any, case: Case, seed: int, output_type: str = "latent") -> Any:
    """One direct call of diffusers' pipeline or of ours."""
    generator = torch.Generator().manual_seed(seed)
    return pipeline(**arguments(case), generator=generator, output_type=output_type, return_dict=False)[0]


def arguments(case: Case) -> dict[str, Any]:
    """What a direct call takes of a case."""
    images = case.images if len(case.images) <= len(case.image_names) else (list(case.images),)
    given = dict(zip(case.image_names, images, strict=False))
    return {"prompt": case.prompt, **given, **case.params}


def load(folder: Path) -> EnginePipeline:
    """Our pipeline."""
    from vllm_cfg_plugin.pipelines.registry import pipeline_class

    return pipeline_class(Checkpoint(str(folder))).load(str(folder), dtype=torch.float32, device=torch.device("cpu"))


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture with a gradient and a square, so that no two sizes look alike to an encoder."""
    image = Image.linear_gradient("L").resize((width, height)).convert(mode)
    image.paste(Image.new(mode, (width // 2, height // 2), "teal"), (width // 4, height // 3))
    return image


def _final_video(pipeline: Any, latents: torch.Tensor, request: DiffusionRequest) -> torch.Tensor:
    condition = pipeline.encode_images(request) if pipeline.decode_sees_images and request.images else []
    return pipeline.final_latents(latents, condition)


def _wan(name: str, layout: str, images: int = 0, **scales: float) -> Family:
    """A layout of Wan, text-to-video or with so many images."""
    pictures = tuple(picture(70 + 20 * i, 50) for i in range(images))
    small = _sized(32, 64, num_frames=5)
    cases = (
        Case("guided", "a red apple", _sized(64, 64, num_frames=9, guidance_scale=4.0, **scales), pictures),
        Case("guided, negative prompt", "a cat", small | {"guidance_scale": 3.0, "negative_prompt": "ugly"}, pictures),
        Case("unguided", "a rocket", small | {"guidance_scale": 1.0}, pictures),
    )
    cases = tuple(replace(case, image_names=("image", "last_image")) for case in cases)
    class_name = "WanImageToVideoPipeline" if images else "WanPipeline"
    return Family(class_name, partial(build_wan, layout=layout), cases, f"{class_name} ({name})", _final_video)


def _sized(height: int, width: int, **params: Any) -> dict[str, Any]:
    return {"height": height, "width": width, "num_inference_steps": STEPS, **params}


_GUIDED = {"true_cfg_scale": 3.0, "negative_prompt": "ugly"}

FAMILIES: tuple[Family, ...] = (
    Family(
        "QwenImagePipeline",
        build_qwen_image,
        (
            Case("guided", "a red apple on a blue background", _sized(64, 64, true_cfg_scale=4.0, negative_prompt=" ")),
            Case("unguided", "a rocket", _sized(64, 96)),
            Case("guided, long text", "cat " * 40, _sized(32, 48, true_cfg_scale=2.5, negative_prompt="ugly")),
        ),
    ),
    Family(
        "QwenImageEditPipeline",
        partial(build_qwen_image_edit, levels=5),
        (
            Case("guided", "a red apple", _sized(64, 128, **_GUIDED), (picture(48, 48),)),
            Case("unguided, size of the image", "a rocket", {"num_inference_steps": STEPS}, (picture(80, 20),)),
        ),
    ),
    Family(
        "QwenImageEditPlusPipeline",
        partial(build_qwen_image_edit_plus, levels=5),
        (
            Case("guided, two images", "a red apple", _sized(64, 128, **_GUIDED), (picture(48, 48), picture(20, 80))),
            Case("unguided, size of the image", "a rocket", {"num_inference_steps": STEPS}, (picture(80, 20),)),
        ),
    ),
    Family(
        "QwenImageLayeredPipeline",
        partial(build_qwen_image_layered, levels=5),
        (
            Case(
                "guided",
                "a red apple",
                {"num_inference_steps": STEPS, "layers": 2, **_GUIDED},
                (picture(48, 48, "RGBA"),),
            ),
            Case("unguided", "a rocket", {"num_inference_steps": STEPS, "layers": 1}, (picture(80, 20, "RGBA"),)),
        ),
    ),
    Family(
        "ZImagePipeline",
        build_z_image,
        (
            Case("guided", "a red apple", _sized(64, 48, guidance_scale=4.0, negative_prompt="ugly")),
            Case("unguided", "a rocket", _sized(64, 96, guidance_scale=0.0)),
            Case("guided, long text", "cat " * 40, _sized(32, 48, guidance_scale=0.5)),
        ),
    ),
    _wan("2.1", "2.1"),
    _wan("2.2 14B", "2.2", guidance_scale_2=2.0),
    _wan("2.2 5B", "5b"),
    _wan("2.1", "2.1-image", 1),
    _wan("2.2 14B", "2.2-image", 2, guidance_scale_2=2.0),
    _wan("2.2 5B", "5b-image", 1),
    Family(
        "FluxPipeline",
        build_flux,
        (
            Case("guided", "a red apple", _sized(64, 48, true_cfg_scale=4.0, negative_prompt="ugly")),
            Case("unguided", "a rocket", _sized(64, 96)),
        ),
    ),
    Family(
        "FluxPipeline",
        partial(build_flux, is_distilled=True),
        (
            Case("unguided", "a rocket", _sized(64, 96, guidance_scale=2.0)),
            Case("guided", "a red apple", _sized(64, 48, true_cfg_scale=2.0, negative_prompt="", guidance_scale=1.5)),
        ),
        name="FluxPipeline, distilled",
    ),
    Family(
        "StableDiffusion3Pipeline",
        build_sd3,
        (
            Case("guided", "a red apple", _sized(64, 48, guidance_scale=4.0, negative_prompt="ugly")),
            Case("unguided", "a rocket", _sized(64, 96, guidance_scale=1.0)),
            Case("guided, long text", "cat " * 40, _sized(32, 48, guidance_scale=7.0)),
        ),
    ),
    Family(
        "LongCatImagePipeline",
        build_longcat_image,
        (
            Case("guided", "a red apple", _sized(64, 48, guidance_scale=4.0, negative_prompt="ugly")),
            Case("unguided", "a rocket", _sized(64, 96, guidance_scale=1.0)),
            Case("guided, quoted text", 'a sign that says "OPEN"', _sized(32, 48, guidance_scale=7.0)),
        ),
        components=lambda folder: {"text_processor": None},
    ),
    Family(
        "LongCatImageEditPipeline",
        build_longcat_image_edit,
        (
            Case(
                "guided",
                "a red apple",
                {"num_inference_steps": STEPS, "guidance_scale": 4.0, "negative_prompt": "ugly"},
                (picture(48, 48),),
            ),
            Case(
                "unguided",
                "a rocket",
                {"num_inference_steps": STEPS, "guidance_scale": 1.0},
                (picture(80, 20),),
            ),
        ),
        components=lambda folder: {"text_processor": load_image_processor(str(folder))},
    ),
)
