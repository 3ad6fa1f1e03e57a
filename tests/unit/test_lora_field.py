"""The field `lora`: what users write of it, and what is said of mistakes."""

import pytest
from msgspec import UNSET

from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.lora_field import checked_lora
from vllm_cfg_plugin.params import LoRA

NAMED = {name: LoRA(name, f"/adapters/{name}", f"key of {name}") for name in ("pixel", "ink", "chalk")}


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        (UNSET, []),
        (None, []),
        ([], []),
        ("pixel", [("pixel", 1.0)]),
        ({"name": "pixel", "scale": -4}, [("pixel", -4.0)]),
        ([{"name": "ink", "scale": 0.5}, "pixel"], [("ink", 0.5), ("pixel", 1.0)]),
    ],
)
def test_what_may_be_asked(value, asked):
    found = checked_lora(value, NAMED, 2)
    assert [(lora.name, lora.scale) for lora in found] == asked
    assert all((lora.path, lora.key) == (NAMED[lora.name].path, NAMED[lora.name].key) for lora in found)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("oil", r'lora\[0\]\.name="oil" is not valid: .* \(pixel, ink, chalk\)'),
        ([{"name": "pixel", "scale": 4.1}], r"lora\[0\]\.scale=4\.1 is not valid: it must be a number from -4 to 4"),
        ([{"name": "pixel", "scale": True}], r"lora\[0\]\.scale"),
        ([{"name": "pixel", "scale": float("nan")}], r"lora\[0\]\.scale"),
        (["ink", {"name": "pixel", "weight": 1}], r"lora\[1\]="),
        ([{"scale": 1}], r"lora\[0\]="),
        (7, r"lora\[0\]=7"),
        (["ink", "ink"], "one is named twice"),
        (["ink", "pixel", "chalk"], r"at most 2 adapters \(--max-loras\)"),
    ],
)
def test_mistakes(value, message):
    with pytest.raises(InvalidRequestError, match=message):
        checked_lora(value, NAMED, 2)


def test_a_server_without_adapters_says_so():
    assert checked_lora(None, {}, 0) == []
    with pytest.raises(InvalidRequestError, match="leave it out: this server was started without --enable-lora"):
        checked_lora("pixel", {}, 0)
