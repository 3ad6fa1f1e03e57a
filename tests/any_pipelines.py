"""Pipelines that run as diffusers' own: tiny checkpoints of unlike classes, and requests that exercise them.

Shared by the unit, distributed and end-to-end tests and by `make parity`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.families import Case, Family, picture
from tests.model_builders.any_pipeline import build

STEPS = 4
# After each step it puts the image's own latents around the mask, so its last step's are not its final ones.
MASKED = ("StableDiffusionXLInpaintPipeline",)
# Those that call their denoiser once for each branch; all others do with the branches in one batch.
IN_A_ROW = ("Lumina2Pipeline", "Kandinsky5T2VPipeline", "CogView4Pipeline")


def _any(class_name: str, *cases: Case) -> Family:
    return Family(class_name, partial(build, class_name), cases, is_relative=True)


def _sized(height: int, width: int, **params: Any) -> dict[str, Any]:
    return {"height": height, "width": width, "num_inference_steps": STEPS, **params}


ANY_PIPELINES: tuple[Family, ...] = (
    _any(
        "StableDiffusionPipeline",
        Case("guided, one timestep more", "a red apple", _sized(64, 96, guidance_scale=5.0, negative_prompt="ugly")),
    ),
    _any(
        "StableDiffusionXLPipeline",
        Case("guided", "a red apple", _sized(64, 96, guidance_scale=5.0, negative_prompt="ugly")),
        Case("unguided", "a rocket", _sized(32, 32, guidance_scale=1.0)),
    ),
    _any(
        "StableDiffusionXLImg2ImgPipeline",
        Case(
            "guided",
            "a red apple",
            {"num_inference_steps": 8, "guidance_scale": 5.0, "strength": 0.5},
            (picture(70, 50),),
        ),
    ),
    _any(
        "StableDiffusionXLInpaintPipeline",
        Case(
            "guided",
            "a red apple",
            _sized(64, 64, guidance_scale=5.0, strength=1.0),
            (picture(64, 64), picture(64, 64)),
            ("image", "mask_image"),
        ),
    ),
    _any(
        "StableDiffusionXLInstructPix2PixPipeline",
        Case(
            "three branches",
            "make it red",
            _sized(64, 64, guidance_scale=5.0, image_guidance_scale=2.0),
            (picture(64, 64),),
        ),
    ),
    _any(
        "Lumina2Pipeline",
        Case("guided", "a red apple", _sized(64, 48, guidance_scale=4.0, negative_prompt="ugly")),
        Case("guidance ends early", "a cat", _sized(32, 32, guidance_scale=4.0, cfg_trunc_ratio=0.5)),
    ),
    _any(
        "SanaPipeline",
        Case("guided", "a red apple", _sized(64, 96, guidance_scale=4.5, use_resolution_binning=False)),
    ),
    _any(
        "Kandinsky5T2VPipeline",
        Case("guided", "a red apple", _sized(32, 48, guidance_scale=5.0, num_frames=5)),
    ),
    _any(
        "CogView4Pipeline",
        Case("guided", "a red apple", _sized(64, 48, guidance_scale=5.0, negative_prompt="ugly")),
    ),
    _any(
        "HiDreamImagePipeline",
        # Of any size it makes one of so many pixels.
        Case(
            "guided",
            "a red apple",
            _sized(256, 256, guidance_scale=5.0, max_sequence_length=64) | {"num_inference_steps": 2},
        ),
    ),
    _any(
        "PixArtSigmaPipeline",
        Case("guided", "a red apple", _sized(64, 48, guidance_scale=4.5, use_resolution_binning=False)),
    ),
    _any(
        "CogVideoXPipeline",
        Case("guided", "a red apple", _sized(32, 48, guidance_scale=6.0, num_frames=9, max_sequence_length=64)),
    ),
    _any(
        "LTXPipeline",
        Case("guided", "a red apple", _sized(64, 96, guidance_scale=3.0, num_frames=9, max_sequence_length=64)),
    ),
)
