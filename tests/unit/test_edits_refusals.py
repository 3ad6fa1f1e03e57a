"""What POST /v1/images/edits refuses: every bad form and every bad image, each by name."""

from dataclasses import replace

import pytest
from msgspec import structs

from tests.unit.edits import CAT, DOG, EDIT_INFO, LAYERED_INFO, assert_refused, edit, png_bomb
from tests.unit.fakes import LIMITS
from tests.unit.http_app import EDITS, FakeEngine, make_app, send
from vllm_cfg_plugin.entrypoints import service as serving


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def app(engine, monkeypatch):
    return make_app(engine, monkeypatch, EDIT_INFO)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 21}, "prompt"),
        ({"prompt": "x" * 40_000}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"n": "0"}, "n"),
        ({"n": "two"}, "n"),
        ({"n": ["1", "2"]}, "n"),
        ({"n[a]": "1"}, "n"),
        ({"size": "64"}, "size"),
        ({"size": "65x64"}, "size"),
        ({"size": "512x512"}, "size"),
        ({"seed": "1.5"}, "seed"),
        ({"stream": "maybe"}, "stream"),
        ({"partial_images": "2"}, "partial_images"),
        ({"quality": "best"}, "quality"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": "50"}, "output_compression"),
        ({"output_compression": "101", "output_format": "webp"}, "output_compression"),
        ({"response_format": "url", "stream": "true"}, "response_format"),
        ({"background": "transparent"}, "background"),
        ({"mask": "a text"}, "mask"),
        ({"true_cfg_scale": "nan"}, "true_cfg_scale"),
        ({"true_cfg_scale": "-1"}, "true_cfg_scale"),
        ({"guidance_interval[]": ["0.5", "x"]}, "guidance_interval[1]"),
        ({"guidance_interval[]": ["0.5"]}, "guidance_interval"),
        ({"guidance_interval": "0.5"}, "guidance_interval"),
        ({"guidance_rescale": "2"}, "guidance_rescale"),
        ({"cfg_normalize": "perhaps"}, "cfg_normalize"),
        ({"combine_rule": "sum"}, "combine_rule"),
        ({"layers": "4"}, "layers"),
        ({"num_frames": "9"}, "num_frames"),
        ({"true_cfg_scal": "4"}, "true_cfg_scal"),
        ({"svg[model]": "x"}, "svg"),
        ({"a[b][c][d]": "x"}, "a[b][c][d]"),
        ({"extra_body[sed]": "5"}, "sed"),
        ({"prompt": "a", "prompt[a]": "b"}, "prompt[a]"),
    ],
)
def test_a_bad_field_is_a_400_that_names_it(app, engine, fields, param):
    assert_refused(edit(app, fields), param)
    assert engine.requests == {}


def test_a_misspelt_field_gets_a_hint(app):
    assert_refused(edit(app, {"input_fidelty": "high"}), "input_fidelty", "did you mean input_fidelity?")


def test_a_mask_is_refused_with_a_remedy(app):
    files = [("image", ("cat.png", CAT)), ("mask", ("mask.png", CAT))]
    assert_refused(edit(app, files=files), "mask", "mask.png", "in the prompt")


def test_a_prompt_that_is_a_file_is_refused(app):
    files = [("image", ("cat.png", CAT)), ("prompt", ("prompt.txt", b"a hat"))]
    assert_refused(edit(app, {"prompt": None}, files), "prompt")


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("application/x-www-form-urlencoded", b"prompt=a&image=b"),
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"no form"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n"),
        (None, b"prompt=a"),
    ],
)
def test_other_bodies_are_refused(app, content_type, content):
    response = send(app, EDITS, content=content, headers={"Content-Type": content_type} if content_type else {})
    assert_refused(response, "body", "multipart/form-data" if "boundary" not in (content_type or "") else "form")


def test_a_truncated_form_is_refused(app):
    whole = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na hat\r\n--x\r\n'
    whole += b'Content-Disposition: form-data; name="image"; filename="cat.png"\r\n\r\n' + CAT + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert send(app, EDITS, content=whole, headers=headers).status_code == 200
    assert_refused(send(app, EDITS, content=whole[:-30], headers=headers), "image")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["0 bytes"]),
        (b"not an image", ["PNG"]),
        (CAT[:40], ["decoded"]),
        (b"<svg/>", ["PNG"]),
        (png_bomb(60_000, 60_000), ["33554432 pixels"]),  # PIL refuses it
        (png_bomb(10_000, 10_000), ["33554432 pixels"]),  # PIL only warns
        (png_bomb(6000, 6000), ["6000x6000", "33554432 pixels"]),
    ],
    ids=["empty", "text", "truncated", "svg", "huge bomb", "bomb", "too large"],
)
@pytest.mark.parametrize(("before", "param"), [([], "image"), ([("image[]", CAT), ("image[]", DOG)], "image[2]")])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_cant_be_used_is_named(app, engine, data, words, before, param):
    files = [*before, ("image[]" if before else "image", ("cat.png", data))]
    assert_refused(edit(app, files=files), param, *words)
    assert engine.requests == {}


@pytest.mark.parametrize("fields", [{}, {"image": ""}, {"image[]": []}])
def test_an_edit_needs_an_image(app, fields):
    assert_refused(edit(app, fields, files=[("user", (None, b"me"))]), "image", "/v1/images/generations")


@pytest.mark.parametrize(("name", "param"), [("image", "image"), ("image[]", "image[0]"), ("image[a]", "image")])
def test_an_image_that_is_a_text_is_refused(app, name, param):
    files = [(name, (None, b"data:image/png;base64,iVBORw0KGgo="))]
    assert_refused(edit(app, files=files), param, "filename")


@pytest.mark.parametrize(("limit", "sent"), [(16, 4), (2, 3)])
def test_too_many_images_are_refused_before_they_are_decoded(engine, monkeypatch, limit, sent):
    app = make_app(engine, monkeypatch, EDIT_INFO, structs.replace(LIMITS, max_input_images=limit))
    monkeypatch.setattr(serving, "read_image", None)
    files = [("image[]", (f"{i}.png", CAT)) for i in range(sent)]
    assert_refused(edit(app, files=files), "image", f"1 to {min(3, limit)} images")


def test_the_operator_limits_pixels_and_bytes(engine, monkeypatch):
    app = make_app(engine, monkeypatch, EDIT_INFO, structs.replace(LIMITS, max_input_pixels=127, max_upload_bytes=5000))
    assert_refused(edit(app), "image", "16x8", "127 pixels")
    assert edit(app, files=[("image", DOG)]).status_code == 200
    assert_refused(edit(app, files=[("image", ("big.png", b"x" * 5000))]), "body", "5000 bytes")


def test_an_upload_without_a_length_is_cut_off_at_the_limit(engine, monkeypatch):
    app = make_app(engine, monkeypatch, EDIT_INFO, structs.replace(LIMITS, max_upload_bytes=5000))
    sent = []

    async def chunks():
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="cat.png"\r\n\r\n'
        for _ in range(50):
            sent.append(1000)
            yield b"x" * 1000

    response = send(app, EDITS, content=chunks(), headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert_refused(response, "body", "5000 bytes")
    assert sum(sent) < 8000


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"output_format": "jpeg"}, "output_format"),
        ({"background": "opaque"}, "background"),
        ({"layers": "0"}, "layers"),
        ({"layers": "many"}, "layers"),
    ],
)
def test_what_a_layered_model_cant_do_is_refused(engine, monkeypatch, fields, param):
    assert_refused(edit(make_app(engine, monkeypatch, LAYERED_INFO), fields), param)


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_prompt_with_a_placeholder_of_an_image(engine, monkeypatch, field):
    info = replace(EDIT_INFO, text=replace(EDIT_INFO.text, reserved=("<image>",)))
    app = make_app(engine, monkeypatch, info)
    assert_refused(edit(app, {field: "an <image>"}), field, "<image>")
    assert engine.requests == {}


@pytest.mark.parametrize(("image_format", "side"), [("jpeg", 65_504), ("webp", 16_384)])
def test_a_side_that_the_file_format_can_not_hold(engine, monkeypatch, image_format, side):
    """Found out before the image is made."""
    app = make_app(engine, monkeypatch, EDIT_INFO, structs.replace(LIMITS, max_image_pixels=8 * side))
    assert_refused(edit(app, {"size": f"{side}x8", "output_format": image_format}), "output_format", "png")
    assert engine.requests == {}
    assert edit(app, {"size": f"{side}x8", "output_format": "png"}).status_code == 200


def test_images_that_unpack_to_too_many_pixels_together(engine, monkeypatch):
    """Each of n results takes all of them along, so the engine would hold them n times."""
    app = make_app(engine, monkeypatch, EDIT_INFO, structs.replace(LIMITS, max_input_pixels=128))
    files = [("image[]", ("cat.png", CAT)), ("image[]", ("cat.png", CAT))]  # of 128 pixels each
    assert edit(app, {"n": "2"}, files).status_code == 200
    engine.requests.clear()
    assert_refused(edit(app, {"n": "3"}, files), "n", "at most 2", "256 pixels")
    narrow = structs.replace(LIMITS, max_input_pixels=128)
    five = replace(EDIT_INFO, max_images=5)
    app = make_app(engine, monkeypatch, five, narrow)
    assert_refused(edit(app, files=[("image[]", ("cat.png", CAT))] * 5), "image", "640 pixels", "512")
    assert engine.requests == {}
