"""What other clients call a field: a table that names ours, where spelling alone would name a wrong one.

Names are those of Automatic1111, ComfyUI, Stability, Replicate, Invoke, diffusers and of OpenAI's older APIs. Must not
import vLLM or torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.field_checks import is_read

_STEPS = ("steps", "num_steps", "n_steps", "sample_steps", "sampling_steps", "inference_steps", "ddim_steps")
_SCALES = ("cfg_scale", "cfg", "scale", "guidance", "unconditional_guidance_scale", "text_guidance_scale")
_OUR_SCALES = ("true_cfg_scale", "guidance_scale")  # a model may read one of them only
_SIDES = ("height", "width", "aspect_ratio", "resolution", "image_size", "dimensions")
_NEGATIVES = ("negative", "neg_prompt", "negative_text", "uncond_prompt", "text_negative")
_COUNTS = (
    "batch_size",
    "num_images",
    "num_images_per_prompt",
    "num_outputs",
    "num_samples",
    "number_results",
    "num_videos_per_prompt",
    "samples",
    "batch_count",
    "n_iter",
    "num_results",
)
_SEEDS = ("random_seed", "noise_seed", "manual_seed", "generator")
_SAMPLERS = ("sampler", "sampler_name", "sampler_index", "scheduler", "scheduler_name", "sample_method")
_IMAGES = (
    "image",
    "images",
    "image_url",
    "init_image",
    "init_images",
    "input_image",
    "input_images",
    "reference_image",
)
_LAST_IMAGES = ("last_image", "end_image", "tail_image", "last_frame")
_FRAMES = ("frames", "length", "video_length", "n_frames", "frame_count")
_RATES = ("frame_rate", "frames_per_second", "framerate", "rate")
_INTERVALS = ("guidance_start", "guidance_end", "guidance_stop", "cfg_start", "cfg_end")
_QUALITIES = ("jpeg_quality", "webp_quality", "output_quality", "compression")
_LIMITS = ("max_tokens", "max_length", "tokenizer_max_length")
_FORMATS = ("format", "image_format", "file_format", "response_extension")

_FIELDS = {
    **dict.fromkeys(_STEPS, "num_inference_steps"),
    **dict.fromkeys(_SIDES, "size"),
    **dict.fromkeys(_NEGATIVES, "negative_prompt"),
    **dict.fromkeys(_COUNTS, "n"),
    **dict.fromkeys(_SEEDS, "seed"),
    **dict.fromkeys(_FRAMES, "num_frames"),
    **dict.fromkeys(_RATES, "fps"),
    **dict.fromkeys(("duration", "video_seconds"), "seconds"),
    **dict.fromkeys(_LIMITS, "max_sequence_length"),
    **dict.fromkeys(_FORMATS, "output_format"),
    **dict.fromkeys(_INTERVALS, "guidance_interval"),
    **dict.fromkeys(_QUALITIES, "output_compression"),
    **dict.fromkeys(("cfg_rescale", "rescale_cfg"), "guidance_rescale"),
}
_REMEDIES = {
    "size": 'size is the field, as "WIDTHxHEIGHT"',
    "n": "n is the number of results",
}
_ALIKE = 0.7  # difflib's own 0.6 takes "sigmas" for "mask"


def hint(name: str, fields: Collection[str], info: PipelineInfo, images: str) -> str:
    """For the user of an unknown field: the field that was meant, or '' where none is like it.

    Args:
        fields: those that there are.
        info: of the served model, whose scale of guidance has one of two names.
        images: the field that takes images.
    """
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|-", "_", name).lower()
    if snake in _SAMPLERS:
        return "the noise scheduler is the checkpoint's own: scheduler/scheduler_config.json says which"
    if snake in _LAST_IMAGES:
        return f"a last image is the second {images}" if images and info.max_images > 1 else ""
    if snake in _IMAGES:
        return f"did you mean {images}?" if images else "POST /v1/images/edits takes images"
    read = [field for field in fields if is_read(field, info)]
    known = [*read, *_OUR_SCALES]
    ours = snake if snake in known else _FIELDS.get(snake)
    if ours is None:
        ours = next(iter(difflib.get_close_matches(snake, known, n=1, cutoff=_ALIKE)), "")
    if snake in _SCALES or (ours in _OUR_SCALES and ours not in read):
        ours = info.cfg_scale
    if ours in _REMEDIES and ours in read:
        return _REMEDIES[ours]
    return f"did you mean {ours}?" if ours in read else ""
