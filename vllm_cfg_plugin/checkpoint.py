"""What a diffusers checkpoint says about itself, read from its JSON files alone.

Runs in the front end before anything heavy is imported; must not import torch, diffusers or vLLM. A checkpoint is a
local folder or a hub repository id; of the latter only the small JSON files are fetched here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_cfg_plugin.errors import ConfigurationError

if TYPE_CHECKING:
    from vllm_cfg_plugin.params import DiffusionParams

MODEL_INDEX = "model_index.json"
DEFAULTS_FILE = "generation_config.json"


@dataclass(frozen=True)
class PipelineInfo:
    """What the front end must know of a model to validate a request and to count its tokens.

    Attributes:
        size_multiple: height and width must be multiples of this many pixels.
        pixels_per_token: side of the square of pixels that one image token covers.
        max_text_tokens: longest text, in tokens of its sequence, that the model takes.
        min_steps: fewest denoising steps for which the noise schedule is finite.
        default_params: what an unset field means for this model.
    """

    size_multiple: int
    pixels_per_token: int
    max_text_tokens: int
    min_steps: int
    default_params: DiffusionParams

    def image_tokens(self, height: int, width: int) -> int:
        return (height // self.pixels_per_token) * (width // self.pixels_per_token)


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

    def check_weights(self) -> None:
        """Check the weight files of a local checkpoint by their headers; reads a few kilobytes of each.

        Raises:
            ConfigurationError: a file is missing, truncated or not a safetensors file.
        """
        folder = Path(self.model).expanduser()
        if not folder.is_dir():
            return
        for path in sorted(folder.glob("*/*.safetensors.index.json")):
            shards = set((self.read_json(f"{path.parent.name}/{path.name}") or {}).get("weight_map", {}).values())
            if missing := sorted(shard for shard in shards if not (path.parent / shard).is_file()):
                raise ConfigurationError(
                    f"model {self.model!r} is incomplete: {path.parent.name}/{missing[0]} is missing"
                )
        for path in sorted(folder.glob("*/*.safetensors")):
            if problem := _safetensors_problem(path):
                raise ConfigurationError(f"model {self.model!r}: {path.parent.name}/{path.name} is broken: {problem}")

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


def _safetensors_problem(path: Path) -> str:
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
