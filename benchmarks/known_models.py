"""Folders of configurations of well-known checkpoints, without a weight: what there is to know of their sizes.

The numbers are diffusers' and transformers' defaults where these are the checkpoint's own (the transformers of
Qwen-Image, FLUX.1-dev and Wan, the VAEs of Qwen-Image and Wan); all others are those of the checkpoints' published
configuration files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]

_T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
_UMT5_XXL = _T5_XXL | {"vocab_size": 256384}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_QWEN_2_5_VL_7B = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
}
_IMAGE_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 1024,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
_SD3_5_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
_EULER = "FlowMatchEulerDiscreteScheduler"
_CLIP_TOKENIZER, _T5_TOKENIZER = ["transformers", "CLIPTokenizer"], ["transformers", "T5TokenizerFast"]

# Of each: the pipeline's class, further entries of model_index.json, {component: (library, class, configuration)}.
_MODELS: dict[str, tuple[str, Config, dict[str, tuple[str, str, Config]]]] = {
    "Qwen-Image": (
        "QwenImagePipeline",
        {"tokenizer": ["transformers", "Qwen2Tokenizer"]},
        {
            "transformer": ("diffusers", "QwenImageTransformer2DModel", {}),
            "vae": ("diffusers", "AutoencoderKLQwenImage", {"temperal_downsample": [False, True, True]}),
            "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration", _QWEN_2_5_VL_7B),
            "scheduler": ("diffusers", _EULER, {"use_dynamic_shifting": True}),
        },
    ),
    "FLUX.1-dev": (
        "FluxPipeline",
        {"tokenizer": _CLIP_TOKENIZER, "tokenizer_2": _T5_TOKENIZER},
        {
            "transformer": ("diffusers", "FluxTransformer2DModel", {"guidance_embeds": True}),
            "vae": ("diffusers", "AutoencoderKL", _IMAGE_VAE),
            "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("transformers", "T5EncoderModel", _T5_XXL),
            "scheduler": ("diffusers", _EULER, {"use_dynamic_shifting": True}),
        },
    ),
    "Stable Diffusion 3.5 large": (
        "StableDiffusion3Pipeline",
        {"tokenizer": _CLIP_TOKENIZER, "tokenizer_2": _CLIP_TOKENIZER, "tokenizer_3": _T5_TOKENIZER},
        {
            "transformer": ("diffusers", "SD3Transformer2DModel", _SD3_5_LARGE),
            "vae": ("diffusers", "AutoencoderKL", _IMAGE_VAE),
            "text_encoder": ("transformers", "CLIPTextModelWithProjection", _CLIP_L),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", _CLIP_BIG_G),
            "text_encoder_3": ("transformers", "T5EncoderModel", _T5_XXL),
            "scheduler": ("diffusers", _EULER, {"shift": 3.0}),
        },
    ),
    "Wan 2.2 T2V A14B": (
        "WanPipeline",
        {"boundary_ratio": 0.875, "tokenizer": _T5_TOKENIZER},
        {
            "transformer": ("diffusers", "WanTransformer3DModel", {}),
            "transformer_2": ("diffusers", "WanTransformer3DModel", {}),
            "vae": ("diffusers", "AutoencoderKLWan", {}),
            "text_encoder": ("transformers", "UMT5EncoderModel", _UMT5_XXL),
            "scheduler": ("diffusers", _EULER, {"shift": 3.0}),
        },
    ),
}
MODELS = tuple(_MODELS)


def write_configurations(model: str, folder: Path) -> Path:
    """Write the configuration files of one of `MODELS` into a folder; returns it."""
    class_name, index, components = _MODELS[model]
    named = {component: [library, cls] for component, (library, cls, _) in components.items()}
    _write(folder / "model_index.json", {"_class_name": class_name, **index, **named})
    for component, (_, cls, config) in components.items():
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        _write(folder / component / name, {"_class_name": cls, **config})
    return folder


def _write(path: Path, content: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
