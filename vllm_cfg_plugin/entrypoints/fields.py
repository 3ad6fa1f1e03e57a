"""The fields that every generation over HTTP has, whatever it makes: their schema, refusals, forms and parameters.

What a field may hold is decided here only as far as `resolve.resolve_requests` does not decide it. Nothing is silently
ignored: what can't be honoured is refused, naming the field. Must not import vLLM or torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.entrypoints import hints
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import CACHE_BRANCHES, CACHE_MODES, COMBINE_RULES, DiffusionParams, DiffusionRequest

MAX_PROMPT_CHARACTERS = 32_000  # OpenAI's limit

# Fields of a body that are those of `DiffusionParams`.
_PASSED_ON = tuple(
    name
    for name in DiffusionParams.__struct_fields__
    if name not in ("height", "width", "num_frames", "negative_prompt", "extra")
)
# Fields of a form that are texts, where "" and "null" are texts too.
_TEXTS = ("prompt", "negative_prompt")

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")

# field -> (values that ask for what we do, what to say to the others)
Served = dict[str, tuple[tuple[object, ...], str]]


class DiffusionFields(BaseModel):
    """Base of the bodies of requests.

    An explicit null means the default, as if the field were absent, except that a null `negative_prompt` means none.
    """

    # Strict: "2" is not a number and true is not 1. Unknown fields are kept to be refused with a hint.
    model_config = ConfigDict(strict=True, extra="allow")

    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS)
    model: str | None = None
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto for the model's own size")
    seed: int | None = Field(None, description="of the first result; drawn, and returned, if absent")
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT_CHARACTERS)
    num_inference_steps: int | None = None
    true_cfg_scale: float | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    guidance_interval: list[float] | None = Field(None, description="[start, stop], fractions of the steps")
    guidance_rescale: float | None = None
    cfg_normalize: bool | None = None
    max_sequence_length: int | None = Field(None, description="most tokens of a text")
    combine_rule: str | None = Field(None, description=", ".join(COMBINE_RULES))
    lora: list[Any] | dict[str, Any] | str | None = Field(
        None, description='adapters: a name, {"name": ..., "scale": ...} or a list of these'
    )
    cache: str | None = Field(None, description=f"of steps: {', '.join(CACHE_MODES)}")
    cache_interval: int | None = Field(None, description="every cache_interval-th step is computed")
    cache_range: list[float] | None = Field(None, description="[start, stop], fractions of the steps")
    cache_order: int | None = Field(None, description="0 reuses the last prediction, 1 and 2 extrapolate")
    cache_branches: str | None = Field(None, description=", ".join(CACHE_BRANCHES))
    user: str | None = Field(None, description="ignored")
    safety_identifier: str | None = Field(None, description="ignored")
    metadata: Any = Field(None, description="ignored")

    _is_form: bool = PrivateAttr(False)

    IMAGES: ClassVar[str] = ""  # the field of the images that come along; it is read before the others
    _SERVED: ClassVar[Served] = {}

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, data: Any) -> Any:
        return _lift_extra_body(data)

    @classmethod
    def from_form(cls, fields: dict[str, Any]) -> Self:
        """Of a form's fields, whose numbers and booleans are texts.

        An empty field means the default, as does "null", which is how OpenAI's JavaScript client wants a null written.

        Raises:
            InvalidRequestError: naming a field of the wrong type.
        """
        lifted = _lift_extra_body(fields)
        given = {
            name: None if value in ("", "null") and name not in _TEXTS else value for name, value in lifted.items()
        }
        body = cls._validated(given, is_strict=False)
        body._is_form = True
        return body

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Of a JSON object.

        Raises:
            InvalidRequestError: naming a field of the wrong type.
        """
        return cls._validated(fields, is_strict=True)

    @classmethod
    def _validated(cls, fields: dict[str, Any], is_strict: bool) -> Self:
        try:
            return cls.model_validate(fields, strict=is_strict)
        except ValidationError as errors:
            raise schema_error(errors.errors()[0]) from None

    def check(self, info: PipelineInfo) -> None:
        """Reject unknown fields, and values that the endpoint can't honour for this model.

        Raises:
            InvalidRequestError: naming the field.
        """
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in info.extra_fields:  # a null asks for nothing
                hint = self.hint(name, info)
                allowed = f"absent: this endpoint has no field of that name{hint and f'; {hint}'}"
                raise InvalidRequestError(name, value, allowed)
        for name, (values, allowed) in self.served(info).items():
            if getattr(self, name) not in values:
                raise InvalidRequestError(name, getattr(self, name), allowed)

    def served(self, info: PipelineInfo) -> Served:
        """The fields of which only some values can be honoured for this model."""
        return self._SERVED

    @classmethod
    def hint(cls, name: str, info: PipelineInfo) -> str:
        """What the user of an unknown field meant; '' where nobody knows."""
        return hints.hint(name, [*cls.model_fields, *info.extra_fields], info, cls.IMAGES)

    def check_result(self, request: DiffusionRequest) -> None:
        """Reject a result that no file can hold.

        Raises:
            InvalidRequestError: naming the field.
        """

    def to_params(self, info: PipelineInfo) -> DiffusionParams:
        """The parameters; `prompt` and the images are passed beside them.

        Raises:
            InvalidRequestError: of `size`.
        """
        width, height = self._sides()
        given = {name: value for name in _PASSED_ON if (value := getattr(self, name, None)) is not None}
        if "negative_prompt" in self.model_fields_set:
            given["negative_prompt"] = self.negative_prompt
        if self._is_form and "lora" in given and str(given["lora"]).startswith(("[", "{")):
            given["lora"] = _of_text(given["lora"], "")
        return DiffusionParams(height=height, width=width, extra=self._extra(info), **given)

    def _extra(self, info: PipelineInfo) -> dict[str, Any]:
        """What only some pipelines of diffusers have a field for."""
        given = {name: value for name, value in (self.model_extra or {}).items() if name in info.extra_fields}
        if self._is_form:
            given = {name: _of_text(value, info.extra_fields[name]) for name, value in given.items()}
        return {name: value for name, value in given.items() if value is not None}

    def _sides(self) -> tuple[int | UnsetType, int | UnsetType]:
        if self.size is None or self.size == "auto":
            return UNSET, UNSET
        match = _SIZE.fullmatch(self.size)
        if match is None:
            raise InvalidRequestError("size", self.size, 'WIDTHxHEIGHT in pixels, e.g. "512x512", or "auto"')
        return int(match[1]), int(match[2])

    def in_request_terms(self, error: InvalidRequestError) -> InvalidRequestError:
        """The parameters have names of their own for the images and for the sides of `size`."""
        if error.param == "image" and self.IMAGES:
            return error.renamed(self.IMAGES)
        if error.param not in ("width", "height"):
            return error
        allowed = f'WIDTHxHEIGHT or "auto": {error.param}={error.value} must be {error.allowed}'
        return InvalidRequestError("size", self.size, allowed)


def _of_text(value: Any, annotation: str) -> Any:
    """A form's text as the value that it stands for, where a text is not what is asked for."""
    if not isinstance(value, str) or re.search(r"\bstr\b", annotation):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value  # to be refused as what it is


def _lift_extra_body(data: Any) -> Any:
    """Python's client has an argument `extra_body` of fields beside the others; some write it into the body."""
    extra = data.get("extra_body") if isinstance(data, dict) else None
    if not isinstance(extra, dict) or not extra.keys().isdisjoint(data):
        return data
    return {**{name: value for name, value in data.items() if name != "extra_body"}, **extra}


def schema_error(error: Mapping[str, Any]) -> InvalidRequestError:
    """One of pydantic's errors about a body, in our words."""
    path = [part for part in error["loc"] if part not in ("body", "query")]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    if error["type"] == "json_invalid":
        return InvalidRequestError("body", error.get("ctx", {}).get("error"), "valid JSON")
    if not path:
        return InvalidRequestError("body", error.get("input"), "a JSON object, sent as application/json")
    if error["type"] == "missing":
        return InvalidRequestError(param, None, "given")
    allowed = error["msg"].replace("Input should be ", "").replace("String should have", "a string with")
    return InvalidRequestError(param, error.get("input"), allowed[:1].lower() + allowed[1:])
