"""Arguments of a direct call: diffusers' own, read or refused."""

import pytest

from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.pipelines.common.arguments import CallArguments


class Upstream:
    """Stands for a class of diffusers."""

    def __call__(self, prompt=None, guidance_scale=3.5, sigmas=None, callback=None, clip_skip=0):
        raise AssertionError("only its signature is read")


Upstream.__module__ = "diffusers.pipelines.upstream"


class Ours(Upstream):
    def __call__(self, *args, **kwargs):
        return CallArguments(self, args, kwargs, {"guidance_scale": 1.0, "cfg_normalize": True})


def test_names_order_and_defaults_are_diffusers():
    """Names order and defaults are diffusers but for our options."""
    call = Ours()("a cat", sigmas=[1.0])
    assert (call.prompt, call.guidance_scale, call.sigmas, call.cfg_normalize) == ("a cat", 1.0, [1.0], True)
    assert Ours()("a cat", 2.0).guidance_scale == 2.0


@pytest.mark.parametrize("kwargs", [{"cfg_normalise": True}, {"prompt": "a dog"}])
def test_what_no_function_would_take_is_a_type_error(kwargs):
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        Ours()("a cat", **kwargs)


def test_an_argument_that_nobody_read_is_refused():
    call = Ours()("a cat", sigmas=[1.0])
    assert call.prompt == "a cat"
    with pytest.raises(InvalidRequestError, match=r"sigmas=\[1.0\] is not valid: it must be left out"):
        call.check_all_were_read()


def test_defaults_and_none_need_not_be_read():
    call = Ours()("a cat", callback=None, clip_skip=0, cfg_normalize=True)
    assert call.prompt == "a cat"
    call.check_all_were_read()


def test_a_parameter_that_there_is_not_is_no_attribute():
    with pytest.raises(AttributeError, match="height"):
        _ = Ours()("a cat").height
