"""Images that users send along: what is decoded, how it is turned and told apart, and every refusal."""

import io
import os

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from tests.unit.edits import image_file, png_bomb
from vllm_cfg_plugin.entrypoints.images.inputs import FORMATS, read_image, read_images
from vllm_cfg_plugin.errors import InvalidRequestError

MAX_PIXELS = 10_000
PHOTO = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)  # [height, width, channels]


def saved(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def read(image, param="image"):
    return read_image(image, param, MAX_PIXELS)


def pixels_of(decoded) -> np.ndarray:
    return np.frombuffer(decoded.pixels, np.uint8).reshape(decoded.height, decoded.width, len(decoded.mode))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_are_decoded_exactly(image_format):
    decoded = read(
        saved(Image.fromarray(PHOTO), image_format, **({"lossless": True} if image_format == "WEBP" else {}))
    )
    assert (decoded.mode, decoded.width, decoded.height) == ("RGB", 20, 12)
    assert np.array_equal(pixels_of(decoded), PHOTO)


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_is_told_by_its_bytes(image_format):
    flat = pixels_of(read(image_file((200, 40, 90), (20, 12), image_format)))
    assert np.abs(flat.astype(int) - [200, 40, 90]).max() <= 8


def test_jpeg_is_as_pil_decodes_it():
    data = saved(Image.fromarray(PHOTO), "JPEG")
    assert np.array_equal(pixels_of(read(data)), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (3, lambda a: a[::-1, ::-1]),
        (6, lambda a: np.rot90(a, -1)),
        (8, lambda a: np.rot90(a)),
        (5, lambda a: a.transpose(1, 0, 2)),
    ],
)
def test_a_camera_rotation_is_undone(orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = read(saved(Image.fromarray(PHOTO), "PNG", exif=exif))
    assert np.array_equal(pixels_of(decoded), upright(PHOTO))


def test_alpha_is_kept():
    rgba = np.dstack([PHOTO, np.arange(240, dtype=np.uint8).reshape(12, 20)])
    decoded = read(saved(Image.fromarray(rgba), "PNG"))
    assert decoded.mode == "RGBA"
    assert np.array_equal(pixels_of(decoded), rgba)


def test_gray_with_alpha_is_rgba():
    decoded = read(saved(Image.new("LA", (3, 2), (7, 100)), "PNG"))
    assert decoded.mode == "RGBA"
    assert pixels_of(decoded)[0, 0].tolist() == [7, 7, 7, 100]


def test_a_transparent_palette_entry_is_alpha():
    """A transparent palette entry is alpha and a palette without one is not."""
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((0, 0), 0)
    transparent = read(saved(palette, "PNG", transparency=0))
    assert transparent.mode == "RGBA"
    assert pixels_of(transparent)[0, :2].tolist() == [[0, 0, 0, 0], [255, 0, 0, 255]]
    assert read(saved(palette, "PNG")).mode == "RGB"


def test_the_first_frame_of_a_gif_is_the_image():
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "lime", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels_of(read(data))[..., :3].reshape(-1, 3).max(0).tolist() == [255, 0, 0]


def test_sixteen_bits_keep_their_brightness():
    deep = np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
    assert np.array_equal(pixels_of(read(saved(Image.fromarray(deep), "PNG")))[..., 0], deep >> 8)


def test_other_modes_become_rgb():
    for mode in ("1", "L", "CMYK", "YCbCr"):
        assert read(Image.new(mode, (4, 4))).mode == "RGB"


def test_paths_bytes_and_pil_images_are_the_same_image(tmp_path, monkeypatch):
    data = saved(Image.fromarray(PHOTO), "PNG")
    (tmp_path / "cat.dat").write_bytes(data)  # the name says nothing
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = [data, tmp_path / "cat.dat", str(tmp_path / "cat.dat"), "~/cat.dat", Image.fromarray(PHOTO)]
    decoded = read_images(sources, "image", MAX_PIXELS)
    assert len(set(decoded)) == 1
    assert read_images(data, "image", MAX_PIXELS) == decoded[:1]
    assert read_images([], "image", MAX_PIXELS) == []


def test_the_digest_names_content_and_shape():
    black = [Image.new(mode, size) for mode, size in (("RGB", (4, 6)), ("RGB", (6, 4)), ("RGBA", (6, 3)))]
    nearly = Image.new("RGB", (4, 6))
    nearly.putpixel((3, 5), (0, 0, 1))
    digests = {read(image).digest for image in [*black, nearly]}
    assert len(digests) == 4
    assert read(Image.new("RGB", (4, 6))).digest in digests


def test_the_image_of_a_user_is_left_as_it_was():
    image = Image.new("P", (4, 4))
    read(image)
    assert image.mode == "P"
    assert image.load() is not None


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "0 bytes"),
        (b"GIF89a", "6 bytes"),
        (b"no image", "PNG, JPEG"),
        (image_file()[:30], "decoded"),
        (saved(Image.fromarray(PHOTO), "JPEG")[:-40], "truncated"),
        (saved(Image.fromarray(PHOTO), "PNG")[:-40], "truncated"),
        (saved(Image.fromarray(PHOTO), "WEBP")[:-40], "decoded"),
        (saved(Image.fromarray(PHOTO), "TIFF")[:-40], "decoded"),
        (saved(Image.fromarray(PHOTO), "ICO"), "PNG, JPEG"),  # a format that PIL has and we don't
        (saved(Image.new("F", (4, 4)), "TIFF"), "8 or 16 bits"),
    ],
)
def test_what_is_no_whole_image_is_refused(data, word):
    with pytest.raises(InvalidRequestError, match=word) as refused:
        read(data, "image[1]")
    assert refused.value.param == "image[1]"


@pytest.mark.parametrize("flip", range(0, 400, 7))
@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, about what it repairs
def test_damaged_files_are_decoded_or_refused(flip):
    """Nothing but our own error leaves, whichever byte lies."""
    for image_format in FORMATS:
        data = bytearray(image_file((200, 40, 90), (20, 12), image_format))
        data[flip % len(data)] ^= 0xFF
        try:
            decoded = read(bytes(data))
        except InvalidRequestError:
            continue
        assert len(decoded.pixels) == decoded.width * decoded.height * len(decoded.mode)


@pytest.mark.parametrize("size", [(101, 100), (9_000, 9_000), (10_000, 10_000), (60_000, 60_000), (2**31 - 1, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_they_are_decoded(size, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(InvalidRequestError, match="at most 10000 pixels"):
        read(png_bomb(*size))


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_where_warnings_are_errors():
    with pytest.raises(InvalidRequestError, match="at most 10000 pixels"):
        read(png_bomb(10_000, 10_000))


def test_an_image_of_exactly_the_limit_is_fine():
    assert read(Image.new("RGB", (100, 100))).width == 100
    with pytest.raises(InvalidRequestError, match="101x100"):
        read(Image.new("RGB", (101, 100)))


@pytest.mark.parametrize("image", [None, 5, 1.5, {"image": 1}, np.zeros((4, 4, 3), np.uint8)])
def test_other_types_are_refused(image):
    with pytest.raises(InvalidRequestError, match="a PIL image, a path"):
        read(image)


@pytest.mark.parametrize("path", ["/no/such/file.png", os.sep, "a\0b.png", "~no_such_user/cat.png", "x" * 5000])
def test_a_file_that_cant_be_read_is_refused(path):
    with pytest.raises(InvalidRequestError, match="a file that can be read") as refused:
        read(path)
    assert refused.value.param == "image"


def test_each_of_several_is_named():
    with pytest.raises(InvalidRequestError) as refused:
        read_images([image_file(), image_file(), b"x"], "image", MAX_PIXELS)
    assert refused.value.param == "image[2]"


def noise(size: int) -> bytes:
    return np.random.default_rng(0).bytes(size)


@pytest.mark.parametrize(
    "metadata",
    [
        {"icc_profile": noise(4_000_000)},
        {"pnginfo": [("Comment", "x" * 2_000_000, True)]},
        {"pnginfo": [("workflow", "y" * 70_000_000, False)]},
        {"pnginfo": [(f"t{i}", "z" * 900_000, True) for i in range(80)]},
        {"pnginfo": [("XML:com.adobe.xmp", "x" * 2_000_000, True)]},
    ],
    ids=["profile", "packed text", "huge text", "many texts", "packed xmp"],
)
def test_a_png_with_large_metadata(metadata):
    """For which Pillow refuses the file."""
    if "pnginfo" in metadata:
        info = PngImagePlugin.PngInfo()
        for key, text, is_packed in metadata["pnginfo"]:
            info.add_itxt(key, text, zip=is_packed)
        metadata = {"pnginfo": info}
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    data = saved(Image.fromarray(PHOTO), "PNG", exif=exif, **metadata)
    with pytest.raises(ValueError, match=r"too large|too much|Too much"):
        Image.open(io.BytesIO(data)).load()
    assert np.array_equal(pixels_of(read(data)), PHOTO[::-1, ::-1])


def test_a_rotation_in_a_pngs_text_is_undone():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>')
    data = saved(Image.fromarray(PHOTO), "PNG", pnginfo=info)
    assert np.array_equal(pixels_of(read(data)), PHOTO[::-1, ::-1])


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read():
    decoded = read(saved(Image.fromarray(PHOTO), "AVIF", quality=100))
    assert (decoded.width, decoded.height) == PHOTO.shape[1::-1]


def icc_profile(red, green, blue) -> bytes:
    """A display's profile: where its primaries are, XYZ each, and a straight curve."""

    def number(value):
        return round(value * 65536).to_bytes(4, "big", signed=True)

    def place(xyz):
        return b"XYZ \0\0\0\0" + b"".join(map(number, xyz))

    tags = {b"wtpt": place((0.9642, 1, 0.8249)), b"rXYZ": place(red), b"gXYZ": place(green), b"bXYZ": place(blue)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), b"curv" + bytes(8))
    table, data = len(tags).to_bytes(4, "big"), b""
    for name, value in tags.items():
        start = 128 + 4 + 12 * len(tags) + len(data)
        table += name + start.to_bytes(4, "big") + len(value).to_bytes(4, "big")
        data += value + bytes(-len(value) % 4)
    size = (128 + len(table) + len(data)).to_bytes(4, "big")
    white = number(0.9642) + number(1) + number(0.8249)
    header = size + bytes(4) + b"\x02\x40\0\0" + b"mntr" + b"RGB " + b"XYZ " + bytes(12) + b"acsp" + bytes(28) + white
    return header.ljust(128, b"\0") + table + data


# Those of sRGB as ICC profiles have them; a display that has red and green the other way round.
RED, GREEN, BLUE = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
SWAPPED = icc_profile(GREEN, RED, BLUE)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colours_mean_what_the_profile_says(image_format):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(buffer, image_format, icc_profile=SWAPPED)
    red, green, blue = read_image(buffer.getvalue(), "image", 100).pixels[:3]
    assert (red < 20, green > 235, blue < 20) == (True, True, True)


@pytest.mark.parametrize("mode", ["RGBA", "P", "RGB with a transparent colour"])
def test_a_profile_leaves_transparency_as_it_is(mode):
    image = Image.new("RGB", (8, 8), (255, 0, 0))
    options = {"transparency": (255, 0, 0)} if mode.startswith("RGB ") else {}
    if mode == "RGBA":
        image.putalpha(77)
    elif mode == "P":
        image, options = image.quantize(2), {"transparency": bytes([77, 77])}
    buffer = io.BytesIO()
    image.save(buffer, "PNG", icc_profile=SWAPPED, **options)
    read = read_image(buffer.getvalue(), "image", 100)
    assert (read.mode, read.pixels[1] > 247) == ("RGBA", True)
    assert read.pixels[3] == (0 if mode.startswith("RGB ") else 77)


@pytest.mark.parametrize(("mode", "profile"), [("RGB", b"no profile"), ("L", SWAPPED), ("CMYK", SWAPPED)])
def test_a_profile_of_no_use_counts_as_none(mode, profile):
    plain, profiled = io.BytesIO(), io.BytesIO()
    image = Image.new("RGB", (8, 8), (200, 100, 50)).convert(mode)
    image.save(plain, "TIFF")
    image.save(profiled, "TIFF", icc_profile=profile)
    assert read_image(profiled.getvalue(), "image", 100) == read_image(plain.getvalue(), "image", 100)
