"""Images that users send along: files, bytes or PIL images in, checked and decoded `ImageInput`s out.

Must not import vLLM or torch.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError, features

from vllm_cfg_plugin.entrypoints.images.png import without_metadata
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import ImageInput

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else []))

# 16 bits a pixel, which PIL's own conversion would cut off at 255, and 32 bits, of which nobody says what is white.
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_UNSCALED_MODES = ("I", "F")
# Those of a file's header that never become transparent, but for its "transparency".
_OPAQUE_MODES = ("1", "L", "RGB", "CMYK", "YCbCr", "LAB", "HSV", *_DEEP_MODES, *_UNSCALED_MODES)

# Modes whose colours a profile can be about, and what they become.
_PROFILED_MODES = {"RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB", "L": "RGB", "LAB": "RGB"}
_SRGB = ImageCms.createProfile("sRGB")

Use = Callable[[Image.Image], ImageInput]


def read_images(images: object, param: str, max_pixels: int) -> list[ImageInput]:
    """What a user wrote for a prompt's images: a PIL image, a path or file's bytes, or a sequence of those.

    Args:
        param: how the user names them, for errors.
        max_pixels: of one image.

    Raises:
        InvalidRequestError: naming the image that can't be used.
    """
    return [read_image(image, name, max_pixels) for image, name in name_images(images, param)]


def name_images(images: object, param: str) -> list[tuple[object, str]]:
    """Each image with its name for errors; see `read_images`."""
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
        return [(image, f"{param}[{index}]") for index, image in enumerate(images)]
    return [(images, param)]


def read_image(image: object, param: str, max_pixels: int) -> ImageInput:
    """One image, upright, its first frame; see `read_images`. Its size is checked before anything is decoded."""
    return _use(image, param, max_pixels, _decoded)


def read_header(image: object, param: str, max_pixels: int) -> ImageInput:
    """What the beginning of a file says of `read_image`: no pixels, and not yet upright. Nothing is decoded."""
    return _use(image, param, max_pixels, _undecoded)


def _use(image: object, param: str, max_pixels: int, use: Use) -> ImageInput:
    source = image if isinstance(image, Image.Image) else _file_bytes(image, param)
    given = f"{len(source)} bytes" if isinstance(source, bytes) else "an image"
    try:
        return _read(source, param, max_pixels, use)
    except InvalidRequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidRequestError(
            param, given, f"of at most {max_pixels} pixels (--max-input-pixels): {error}"
        ) from None
    except Exception as error:  # decoders raise nearly anything where the bytes lie
        allowed = f"an image file that can be decoded ({', '.join(FORMATS)}): {_reason(error)}"
        raise InvalidRequestError(param, given, allowed) from None


def _read(source: Image.Image | bytes, param: str, max_pixels: int, use: Use) -> ImageInput:
    if isinstance(source, Image.Image):
        return _checked(source, param, max_pixels, use)
    try:
        return _checked(_open(source), param, max_pixels, use)
    except ValueError:  # among others what Pillow raises for metadata
        lean = without_metadata(source)
        if len(lean) == len(source):
            raise
        return _checked(_open(lean), param, max_pixels, use)


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _checked(image: Image.Image, param: str, max_pixels: int, use: Use) -> ImageInput:
    if image.width * image.height > max_pixels:
        raise InvalidRequestError(
            param, f"{image.width}x{image.height}", f"of at most {max_pixels} pixels (--max-input-pixels)"
        )
    return use(image)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "its first bytes are of none of them"
    if isinstance(error, _UnscaledError) or "truncated" in str(error):
        return str(error)
    return "it is damaged"  # the decoders' own words are about their insides


class _UnscaledError(ValueError):
    """Nobody says which value of a pixel is white."""


def _file_bytes(image: object, param: str) -> bytes:
    if isinstance(image, bytes):
        return image
    if not isinstance(image, (str, Path)):
        raise InvalidRequestError(param, image, "a PIL image, a path, a file's bytes, or a list of those")
    try:
        return Path(image).expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # no file, a NUL in its name, nobody's home folder
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequestError(param, str(image), f"a file that can be read ({reason})") from None


def _undecoded(image: Image.Image) -> ImageInput:
    is_opaque = image.mode in _OPAQUE_MODES and "transparency" not in image.info
    return ImageInput("", "RGB" if is_opaque else "RGBA", image.width, image.height, b"")


def _decoded(image: Image.Image) -> ImageInput:
    upright = ImageOps.exif_transpose(image)
    if upright.mode in _UNSCALED_MODES:
        raise _UnscaledError(f"its pixels are {upright.mode}, not 8 or 16 bits a channel")
    if upright.mode in _DEEP_MODES:
        upright = upright.point(lambda value: value * (1 / 256)).convert("L")
    mode = "RGBA" if upright.has_transparency_data else "RGB"
    if mode == "RGBA" or upright.mode == "P":  # which have colours of a profile only then
        upright = upright.convert(mode)
    upright = _in_srgb(upright)
    pixels = (upright if upright.mode == mode else upright.convert(mode)).tobytes()
    digest = hashlib.sha256(f"{mode}{upright.size}".encode())
    digest.update(pixels)
    return ImageInput(digest.hexdigest(), mode, upright.width, upright.height, pixels)


def _in_srgb(image: Image.Image) -> Image.Image:
    """The image in the colours that models know, where it says what its own mean.

    A profile that can't be used counts as none: most say sRGB anyway.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in _PROFILED_MODES:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode=_PROFILED_MODES[image.mode])
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return image if converted is None else converted
