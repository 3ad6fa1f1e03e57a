"""The arguments of a direct call are those of diffusers' own `__call__`: none is ignored without a word."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from vllm_cfg_plugin.errors import InvalidRequestError


class CallArguments:
    """What a pipeline was called with, as attributes; remembers which of them were read.

    Args:
        pipeline: its class inherits from a class of diffusers, whose `__call__` has the parameters and defaults.
        options: parameters that diffusers' call lacks, and other defaults than diffusers'.

    Raises:
        TypeError: an argument that the call does not have, as from any function.
    """

    def __init__(
        self, pipeline: object, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        signature = inspect.signature(_diffusers_call(type(pipeline)))
        known = dict(signature.parameters)
        for name, default in options.items():
            kind = known[name].kind if name in known else inspect.Parameter.KEYWORD_ONLY
            known[name] = inspect.Parameter(name, kind, default=default)
        bound = signature.replace(parameters=list(known.values())).bind(pipeline, *args, **kwargs)
        self._parameters = known
        self._given = {name: value for name, value in bound.arguments.items() if name != "self"}
        self._read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._parameters:
            raise AttributeError(name)
        self._read.add(name)
        return self._given.get(name, self._parameters[name].default)

    def check_all_were_read(self) -> None:
        """To be called before any work.

        Raises:
            InvalidRequestError: an argument was given that acts in diffusers' own loop alone.
        """
        for name, value in self._given.items():
            if name not in self._read and value is not None and value is not self._parameters[name].default:
                raise InvalidRequestError(name, value, "left out: only diffusers' own pipeline takes it")


def _diffusers_call(pipeline_class: type) -> Any:
    """`__call__` of the class of diffusers that a class inherits from."""
    return next(
        vars(base)["__call__"]
        for base in pipeline_class.__mro__
        if base.__module__.startswith("diffusers.") and "__call__" in vars(base)
    )
