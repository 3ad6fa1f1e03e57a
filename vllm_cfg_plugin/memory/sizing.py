"""How many bytes a checkpoint's components and its requests take, without loading or computing anything.

Weights are counted in the headers of the checkpoint's files, or where there are none yet in models built from its
configurations on torch's meta device; what a step and a decode need besides is found by the pipeline's own code on that
device. Must not import vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from msgspec import UNSET
from safetensors import safe_open

from vllm_cfg_plugin.checkpoint import Checkpoint, PipelineInfo
from vllm_cfg_plugin.distributed.sequence_group import Peers, SequenceGroup, together
from vllm_cfg_plugin.memory.placement import Component, ModelMemory
from vllm_cfg_plugin.memory.tracking import peak_bytes
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline, generator_of
from vllm_cfg_plugin.pipelines.common.tensor_parallel import divide
from vllm_cfg_plugin.pipelines.offload import offloadable
from vllm_cfg_plugin.pipelines.quantized import layers_of
from vllm_cfg_plugin.pipelines.registry import describe, pipeline_class
from vllm_cfg_plugin.pipelines.sample_request import blank_embeds, sample_request
from vllm_cfg_plugin.pipelines.weight_files import component_class, component_names, model_library, weight_files

_META = torch.device("meta")
_FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors: what is loaded in the type that is asked for
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # any other: 1


class _MetaPeers(Peers):
    """The first of some processes that share a forward on the meta device, where there is nothing to trade."""

    rank = 0

    def __init__(self, size: int) -> None:
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def all_to_all(self, parts: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(parts)

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.size == 1 else rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])


class _MetaGroup(_MetaPeers, SequenceGroup):
    """The same, of those that share its rows and those that share its weights."""

    is_stoppable = False
    trades = 0

    def __init__(self, sequence: int, tensor: int) -> None:
        super().__init__(sequence * tensor)
        self.sequence: Peers = _MetaPeers(sequence)
        self.tensor: Peers = _MetaPeers(tensor)
        self.failures = 0

    def any(self, flags: Sequence[bool]) -> list[bool]:
        return [*flags]

    def fail(self) -> None:
        """The others are not there."""


def model_memory(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    variant: str = "",
    quantization: str | None = None,
    sequence_parallel_size: int = 1,
    tensor_parallel_size: int = 1,
) -> ModelMemory:
    """What a checkpoint takes of one process where it is loaded in this dtype.

    Args:
        variant: of the names of weight files.
        quantization: of the transformers' layers.
        sequence_parallel_size, tensor_parallel_size: among how many processes a forward's rows and the transformers'
            weights are divided.

    Raises:
        ConfigurationError: the checkpoint can't be served.
    """
    pipeline = meta_pipeline(checkpoint, dtype)
    info = describe(checkpoint)
    whole, group = _parameter_bytes(pipeline), _MetaGroup(sequence_parallel_size, tensor_parallel_size)
    for name, plan in pipeline.tensor_plans().items():
        if name in whole:
            divide(getattr(pipeline, name), plan, group.tensor)
    components = component_sizes(checkpoint, pipeline, dtype, variant, quantization is not None, whole)
    _leave_two_layers(pipeline.transformer)
    with torch.inference_mode():
        request = sample_request(info)
        branch = _branch(pipeline, info, request)
        with together(group):
            one, two = (_forward_bytes(pipeline, [branch] * count) for count in (1, 2))
        decode = _decode_bytes(pipeline, branch)
    tokens = request.image_tokens + request.condition_tokens + branch.embeds.tokens.shape[0]
    per_token = -(-(two - one) // tokens)
    return ModelMemory(
        components=components,
        branch_tokens=tokens,
        image_tokens=request.image_tokens,
        step_bytes=max(0, one - per_token * tokens),
        step_token_bytes=per_token,
        decode_token_bytes=-(-decode // request.image_tokens),
    )


def _parameter_bytes(pipeline: EnginePipeline) -> dict[str, int]:
    """Of each component that is a model."""
    models: dict[str, Any] = pipeline.components  # type: ignore[attr-defined]
    return {
        name: sum(parameter.nbytes for parameter in model.parameters())
        for name, model in models.items()
        if isinstance(model, torch.nn.Module)
    }


def component_sizes(
    checkpoint: Checkpoint,
    pipeline: EnginePipeline,
    dtype: torch.dtype,
    variant: str,
    is_quantized: bool,
    whole: Mapping[str, int],
) -> dict[str, Component]:
    """The weights of each component of a pipeline on the meta device, as its files or else its models have them.

    Args:
        whole: bytes of each model's parameters, before some were divided.
    """
    family = type(pipeline)
    folder = Path(checkpoint.model).expanduser()
    names = [name for name, own in component_names(checkpoint, family).items() if model_library(*own)]
    has_files = folder.is_dir() and all(any((folder / name).glob("*.safetensors")) for name in names)
    files = weight_files(checkpoint, family, variant) if has_files else {}
    sizes = {}
    for name in names:
        model = getattr(pipeline, name)
        if model is None:
            continue
        layers = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers_of(model)]
        in_model = sum(parameter.nbytes for parameter in model.parameters())
        item = torch.float32.itemsize if name in family.float32_components else dtype.itemsize
        total = sum(_file_bytes(path, item) for path in files[name]) if name in files else whole[name]
        total = total * in_model // whole[name]
        if is_quantized and name.startswith("transformer"):  # the layers' weights take one byte each
            total -= total * sum(layers) * (item - 1) // (item * in_model)
        streamed = in_model - sum(layers) + sum(sorted(layers)[-2:])
        lists = family.layer_lists if name.startswith("transformer") else {}
        in_turn = sum(parameter.nbytes for layer, _ in offloadable(model, lists) for parameter in layer.parameters())
        # A quantized file's layers shrink alike.
        sizes[name] = Component(total, -(-total * streamed // in_model), total * in_turn // in_model)
    return sizes


def _leave_two_layers(model: torch.nn.Module) -> None:
    """Layers run one after the other in the same memory, so the first and the last of each list tell as much as all."""
    for name, child in model.named_children():
        if isinstance(child, torch.nn.ModuleList) and len(child) > 2:
            setattr(model, name, torch.nn.ModuleList([child[0], child[-1]]))


def _file_bytes(path: Path, item_bytes: int) -> int:
    """Bytes of the tensors of a safetensors file, where floating-point numbers take so many each."""
    total = 0
    with safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            kind = tensor.get_dtype()
            total += prod(tensor.get_shape()) * (item_bytes if kind in _FLOATS else _ITEM_BYTES.get(kind, 1))
    return total


def meta_pipeline(checkpoint: Checkpoint, dtype: torch.dtype) -> EnginePipeline:
    """The checkpoint's pipeline, its models built from their configurations on the meta device, without tokenizers."""
    family = pipeline_class(checkpoint)
    components: dict[str, Any] = {}
    for name, names in component_names(checkpoint, family).items():
        if library := model_library(*names):
            of_component = torch.float32 if name in family.float32_components else dtype
            build = _diffusers_model if library == "diffusers" else _transformers_model
            model = build(checkpoint, name, component_class(*names))
            components[name] = torch.nn.Module.to(model, of_component)  # diffusers' own `to` warns of what it keeps
        elif name.startswith("tokenizer"):
            components[name] = None
    return family.load(checkpoint.model, dtype=dtype, device=_META, revision=checkpoint.revision, **components)


def _diffusers_model(checkpoint: Checkpoint, name: str, cls: Any) -> Any:
    with _META:
        return cls.from_config(checkpoint.component_config(name)).eval()


def _transformers_model(checkpoint: Checkpoint, name: str, cls: Any) -> Any:
    with _META:
        return cls(cls.config_class.from_dict(checkpoint.component_config(name))).eval()


def _branch(pipeline: EnginePipeline, info: PipelineInfo, request: DiffusionRequest) -> BranchInput:
    """One branch of a request, its text as long as the model's own limit lets it be."""
    limit = info.default_params.max_sequence_length
    limit = info.text.max_tokens if limit is UNSET or limit is None else limit
    tokens = info.text.sequence_tokens(limit, limit)
    return BranchInput(
        request=request,
        latents=pipeline.draw_noise(request, generator_of(request)),
        embeds=blank_embeds(pipeline, tokens),
        timestep=pipeline.make_noise_scheduler(request).timesteps[0],
        condition=pipeline.encode_images(request) if request.images else [],
    )


def _forward_bytes(pipeline: EnginePipeline, branches: Sequence[BranchInput]) -> int:
    return _peak(lambda: pipeline.predict_noise(**pipeline.pack_branches(branches)))


def _decode_bytes(pipeline: EnginePipeline, branch: BranchInput) -> int:
    return _peak(lambda: pipeline.decode(branch.latents, branch.request, branch.condition))


def _peak(run: Callable[[], Any]) -> int:
    with peak_bytes(_META) as counted, suppress(NotImplementedError):  # pixels have no numbers to bring to the host
        run()
    return counted.peak
