"""What turns images into patches for a text encoder that sees them; must not import vLLM."""

from __future__ import annotations

from typing import Any

from transformers import AutoImageProcessor

from vllm_cfg_plugin.errors import ConfigurationError

# What stands for an image or a video in the texts of Qwen's encoders.
PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>")


def load_image_processor(model: str, component: str, revision: str | None = None) -> Any:
    """The image processor in a component of a checkpoint; it knows how many tokens an image becomes.

    Raises:
        ConfigurationError: there is none that can be loaded.
    """
    try:
        return AutoImageProcessor.from_pretrained(model, subfolder=component, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"model {model!r}: its {component}/ can't be loaded: {error}") from error


def tokens_of_image(processor: Any, height: int, width: int) -> int:
    """Tokens that an image of this size takes in the text."""
    patches: int = processor.get_number_of_image_patches(height, width, {})
    return patches // processor.merge_size**2
