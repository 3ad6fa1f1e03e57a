"""Has a class for every pipeline class of diffusers, by its name."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers

from vllm_cfg_plugin.pipelines.any_pipeline.call_parameters import parameters_of
from vllm_cfg_plugin.pipelines.any_pipeline.pipeline import AnyPipeline


@cache
def __getattr__(name: str) -> type[AnyPipeline]:
    cls: Any = getattr(diffusers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, diffusers.DiffusionPipeline):
        raise AttributeError(f"diffusers has no pipeline class {name!r}")
    fields = frozenset({"guidance_rescale"} & set(parameters_of(cls)))
    return type(name, (AnyPipeline,), {"diffusers_class": cls, "guidance_fields": fields})
