"""Images that users send along: files, bytes or PIL images in, checked and decoded `ImageInput`s out.

Must not import vLLM or torch.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import ImageInput

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def read_images(images: object, param: str, max_pixels: int) -> list[ImageInput]:
    """What a user wrote for a prompt's images: a PIL image, a path or file's bytes, or a sequence of those.

    Args:
        param: how the user names them, for errors.
        max_pixels: of one image.

    Raises:
        InvalidRequestError: naming the image that can't be used.
    """
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
        return [read_image(image, f"{param}[{index}]", max_pixels) for index, image in enumerate(images)]
    return [read_image(images, param, max_pixels)]


def read_image(image: object, param: str, max_pixels: int) -> ImageInput:
    """One image; see `read_images`."""
    if isinstance(image, Image.Image):
        return _decoded(image, param, max_pixels)
    if isinstance(image, (str, Path)):
        try:
            image = Path(image).expanduser().read_bytes()
        except OSError as error:
            raise InvalidRequestError(param, str(image), f"a file that can be read ({error})") from None
    if not isinstance(image, bytes):
        raise InvalidRequestError(param, image, "a PIL image, a path, a file's bytes, or a list of those")
    try:
        opened = Image.open(io.BytesIO(image), formats=FORMATS)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        raise _undecodable(param, image, error) from None
    return _decoded(opened, param, max_pixels)


def _decoded(image: Image.Image, param: str, max_pixels: int) -> ImageInput:
    """Decode the first frame, upright; its size is checked before anything is decoded."""
    if image.width * image.height > max_pixels:
        raise InvalidRequestError(param, f"{image.width}x{image.height}", f"of at most {max_pixels} pixels")
    try:
        upright = ImageOps.exif_transpose(image)
        mode = "RGBA" if upright.has_transparency_data else "RGB"
        pixels = upright.convert(mode).tobytes()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _undecodable(param, None, error) from None
    digest = hashlib.sha256(f"{mode}{upright.size}".encode() + pixels).hexdigest()
    return ImageInput(digest, mode, upright.width, upright.height, pixels)


def _undecodable(param: str, data: bytes | None, error: Exception) -> InvalidRequestError:
    given = "an image" if data is None else f"{len(data)} bytes"
    return InvalidRequestError(param, given, f"an image file that can be decoded ({', '.join(FORMATS)}): {error}")
