"""What a diffusers checkpoint says about itself, read from its JSON files alone.

Runs in the front end before anything heavy is imported; must not import torch, diffusers or vLLM. A checkpoint is a
local folder or a hub repository id; of the latter only the small JSON files are fetched here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.params import GUIDANCE_FIELDS

if TYPE_CHECKING:
    from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest

MODEL_INDEX = "model_index.json"
DEFAULTS_FILE = "generation_config.json"

# Components that no family does without where model_index.json names them, by how their names begin.
_NEEDED = ("transformer", "vae", "text_encoder", "image_encoder", "tokenizer", "scheduler", "processor")

ImageSize = tuple[int, int]


@dataclass(frozen=True)
class TextRules:
    """How a family's texts become tokens of a sequence.

    Attributes:
        max_tokens: longest text that the model takes, in tokens of its sequence; a request for one whose `options` have
            `max_sequence_length` may set a lower limit, and its default may be lower.
        template: what a prompt is wrapped in before the tokenizer sees it.
        prefix_tokens: leading tokens of the template whose embeddings the model never sees.
        tokenizer: its folder in the checkpoint; "" where texts are not counted, and none is too long.
        pads: every text is padded to the limit of its request.
        extra_tokens: what every text takes in the sequence beside its own tokens.
        sees_images: the text encoder reads a request's images too.
        pieces: the parts of a text that are tokenized each by itself.
        image_template: what comes before the prompt for each of the images, which are numbered from 1.
        captioned: prompts in whose place the text encoder writes a caption of the image.
        reserved: what a prompt may not hold, because it would stand for an image that is not there.
    """

    max_tokens: int
    template: str = "{}"
    prefix_tokens: int = 0
    tokenizer: str = "tokenizer"
    pads: bool = False
    extra_tokens: int = 0
    sees_images: bool = False
    pieces: Callable[[str], Sequence[str]] = lambda text: [text]
    image_template: str = ""
    captioned: tuple[str, ...] = ()
    reserved: tuple[str, ...] = ()

    def with_images(self, prompt: str, images: int) -> str:
        """A prompt as the text encoder is given it, but for the template."""
        return "".join(self.image_template.format(number + 1) for number in range(images)) + prompt

    def sequence_tokens(self, tokens: int, limit: int) -> int:
        """What a text of so many tokens takes in the model's sequence, where texts may have `limit` tokens."""
        return (limit if self.pads else tokens) + self.extra_tokens


@dataclass(frozen=True)
class PipelineInfo:
    """What a pipeline can do: what the front end must know to validate a request and to count its tokens.

    Attributes:
        text: how texts are tokenized.
        size_multiple: height and width must be multiples of this many pixels.
        pixels_per_token: side of the square of pixels that one image token covers.
        max_side: most pixels of height and of width, where its positions end; 0 is no limit.
        max_frames: most frames of a video, likewise.
        default_params: what an unset field means for this model.
        cfg_scale: the field that is the scale of classifier-free guidance, as diffusers' pipeline names it.
        cfg_scale_offset: what to add to that field for the scale s of `neg + s * (pos - neg)`.
        distilled_scale: the field that is an input of a distilled model; "" where there is none.
        needs_negative_prompt: without a negative prompt there is no guidance; if not, a missing one is an empty one.
        options: fields of `DiffusionParams` that this model reads beyond those that every model reads.
        with_more_branches: adds to a guided request, which has two branches, those that this model's guidance has
            beyond them: their `prompts` and `text_tokens`.
        guidance_fields: those of `GUIDANCE_FIELDS` that its `combine_branches` reads; set by the registry.
        min_images, max_images: images that a request must and may bring along.
        takes_mask: the last of a request's images says where the first one is to be changed.
        produces: "image" or "video".
        frames_per_latent: frames of a video that one latent frame stands for; frames must be a multiple plus 1.
        fps: frames per second at which a video is meant to be shown.
        num_timesteps: of the noise scheduler for so many denoising steps; ValueError where it can't be set to so many.
        condition_tokens: (tokens of its sequences, tokens of its text) that images of these (width, height) add; of the
            text beyond what stands for them in `image_template`.
        images_take_result_size: images are brought to the size of the result, which `condition_tokens` is then given.
        default_size: (height, width) of the result for images of these (width, height); None: `default_params` say.
        sizes: (height, width) of all results that it makes; empty where its multiples are the only limit.
        lacks: fields that all other models read.
        extra_fields: what `DiffusionParams.extra` may hold: name -> Python's annotation of its type.
        strength: the default of the extra field of this name, the share of the steps that are taken.
        call_arguments: for a model that runs as diffusers' own pipeline, what `DiffusionRequest.call` is for parameters
            whose defaults are filled in; None for all others.
    """

    text: TextRules
    size_multiple: int
    pixels_per_token: int
    default_params: DiffusionParams
    cfg_scale: str
    cfg_scale_offset: float = 0.0
    distilled_scale: str = ""
    max_side: int = 0
    max_frames: int = 0
    needs_negative_prompt: bool = True
    options: frozenset[str] = frozenset()
    min_images: int = 0
    max_images: int = 0
    with_more_branches: Callable[[DiffusionRequest], DiffusionRequest] = lambda request: request
    guidance_fields: frozenset[str] = GUIDANCE_FIELDS
    takes_mask: bool = False
    produces: str = "image"
    frames_per_latent: int = 1
    fps: int = 0
    num_timesteps: Callable[[int], int] = field(default=lambda steps: steps, compare=False)
    condition_tokens: Callable[[Sequence[ImageSize]], tuple[int, int]] = lambda sizes: (0, 0)
    images_take_result_size: bool = False
    default_size: Callable[[Sequence[ImageSize]], ImageSize] | None = None
    sizes: tuple[ImageSize, ...] = ()
    lacks: frozenset[str] = frozenset()
    extra_fields: Mapping[str, str] = field(default_factory=dict)
    strength: float = 1.0
    call_arguments: Callable[[DiffusionParams], dict[str, Any]] | None = field(default=None, compare=False)

    def image_tokens(self, height: int, width: int, num_frames: int = 1, layers: int = 0) -> int:
        """Tokens of the latents; a layered image has one more than its layers."""
        latent_frames = (num_frames - 1) // self.frames_per_latent + 1 + layers
        return latent_frames * (height // self.pixels_per_token) * (width // self.pixels_per_token)

    def tokens_of_images(self, sizes: Sequence[ImageSize], height: int, width: int) -> tuple[int, int]:
        """`condition_tokens` of images of these (width, height) for a result of that size."""
        return self.condition_tokens([(width, height)] * len(sizes) if self.images_take_result_size else sizes)

    @property
    def is_transparent(self) -> bool:
        """Whether results have an alpha channel: those of layered models."""
        return "layers" in self.options

    @property
    def task(self) -> str:
        """What the model is for, in the words of diffusers' tasks: "text-to-image", "image-to-video", ..."""
        return f"{'image' if self.min_images else 'text'}-to-{self.produces}"


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers checkpoint, local or on the hub.

    Attributes:
        model: folder or repository id, as the user wrote it.
        revision: branch, tag or commit of a repository.
    """

    model: str
    revision: str | None = None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in file `name` (a path inside the checkpoint), or None where there is no such file.

        Raises:
            ConfigurationError: the file is there and is not a JSON object.
        """
        path = self._local_path(name)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"model {self.model!r}: {name} can't be read: {error}") from error
        if not isinstance(content, dict):
            raise ConfigurationError(f"model {self.model!r}: {name} must hold a JSON object")
        return content

    def component_config(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """The configuration of a component.

        Raises:
            ConfigurationError: there is none.
        """
        config = self.read_json(f"{component}/{file}")
        if config is None:
            raise ConfigurationError(f"model {self.model!r} is incomplete: {component}/{file} is missing")
        return config

    def class_name(self) -> str | None:
        """The pipeline class in model_index.json; None where the model is not a diffusers checkpoint."""
        index = self.read_json(MODEL_INDEX)
        name = None if index is None else index.get("_class_name")
        return name if isinstance(name, str) else None

    def is_diffusers(self) -> bool:
        """Whether this looks like a diffusers checkpoint; what can't be found is not one.

        A repository that is in the hub's cache as an ordinary model is answered from there: serving one must not wait
        for the network because this plugin is installed.
        """
        if self._is_cached("config.json") and not self._is_cached(MODEL_INDEX):
            return False
        try:
            return self.class_name() is not None
        except ConfigurationError:
            return False

    def _is_cached(self, name: str) -> bool:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        if Path(self.model).expanduser().exists():
            return False
        try:
            return isinstance(try_to_load_from_cache(self.model, name, revision=self.revision), str)
        except HFValidationError:
            return False

    def check_components(self) -> None:
        """Check that a local checkpoint has the folder of each component that its model_index.json names.

        Raises:
            ConfigurationError: something is missing.
        """
        folder = Path(self.model).expanduser()
        if not folder.is_dir():
            return
        for component, value in (self.read_json(MODEL_INDEX) or {}).items():
            is_named = isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
            if not is_named or not component.startswith(_NEEDED):
                continue
            if not (folder / component).is_dir():
                raise ConfigurationError(f"model {self.model!r} is incomplete: {component}/ is missing")

    def _local_path(self, name: str) -> Path | None:
        folder = Path(self.model).expanduser()
        if folder.exists():
            path = folder / name
            return path if path.is_file() else None
        return self._from_hub(name)

    def _from_hub(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            return Path(hf_hub_download(self.model, name, revision=self.revision))
        except LocalEntryNotFoundError as error:
            raise ConfigurationError(
                f"model {self.model!r} is no folder here, and the hub can't be reached to look for it there"
            ) from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ConfigurationError(f"model {self.model!r} is neither a folder nor a repository: {error}") from error


def safetensors_problem(path: Path) -> str:
    """Why the file can't be whole; '' if it can (safetensors: 8 bytes of header length, a JSON header, tensors)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        if size < 8 or header_length > size - 8:
            return f"its {size} bytes end before its header does"
        try:
            header = json.loads(file.read(header_length))
        except ValueError:
            return "its header is not JSON"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + header_length + max(ends, default=0)
    return "" if size == expected else f"it has {size} bytes and should have {expected}"
