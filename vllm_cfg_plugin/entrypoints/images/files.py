"""Image files: pixels in, PNG, JPEG or WebP out. Must not import vLLM or torch."""

from __future__ import annotations

import base64
import io
from typing import Literal

import numpy as np
from PIL import Image

from vllm_cfg_plugin.entrypoints.images.schema import ImageFormat, ImagesRequest


def encode_image(pixels: np.ndarray, image_format: ImageFormat, lossy_quality: int) -> bytes:
    """An image file; `pixels` uint8 [height, width, channels], quality 0 to 100 (not for PNG)."""
    options: dict[str, int] = {} if image_format == "png" else {"quality": lossy_quality}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=image_format.upper(), **options)
    return buffer.getvalue()


def file_of(pixels: np.ndarray, body: ImagesRequest) -> bytes:
    """The file that a request asks for."""
    return encode_image(pixels, body.format, body.lossy_quality)


def base64_file(pixels: np.ndarray, body: ImagesRequest) -> str:
    """The same as text."""
    return base64.b64encode(file_of(pixels, body)).decode("ascii")


def background_of(pixels: np.ndarray) -> Literal["opaque", "transparent"]:
    return "transparent" if pixels.shape[-1] == 4 else "opaque"
