"""Tensor parallelism: the ranks of a forward each have a part of a model's weights; must not import vLLM.

After Megatron-LM (https://arxiv.org/abs/1909.08053). Of two linear layers that follow each other the first one's
outputs are divided, attention heads or hidden channels, and the second one's inputs alike, so that only what comes out
of the second has to be added up. A family states which of its layers are which, as a `TensorPlan`; diffusers has plans
for two of the families, and they leave the modulations whole, a third of Qwen-Image's weights.

Sums are taken in the order of the ranks, wherever a row lies: an all_reduce among more than two ranks gives a row other
bits in another place, and an image would depend on its batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_cfg_plugin.distributed.sequence_group import Peers, current_group
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.common.attention import rms_norm
from vllm_cfg_plugin.pipelines.common.linear import linear
from vllm_cfg_plugin.pipelines.quantized import QuantizedLinear

_RANKS = "_divided_among"  # attribute of a model


class Outputs(Enum):
    """What becomes of the outputs of a layer that is divided."""

    OWN = "each rank has some of the channels, and goes on with them"
    GATHERED = "each rank has some of the channels, and all get all"
    SUMMED = "each rank has the part of the sum that comes of its own inputs, and all get the sum"


@dataclass(frozen=True)
class Share:
    """How a layer is divided.

    Attributes:
        parts: widths, as ratios, of what lies side by side in the divided channels: each of them is divided by itself.
    """

    outputs: Outputs
    parts: tuple[int, ...] = (1,)

    @property
    def weight_dim(self) -> int:
        """Of a weight, [outputs, inputs] or [channels], the dimension that is divided."""
        return 1 if self.outputs is Outputs.SUMMED else 0


TensorPlan = Mapping[str, Share]  # pattern of modules' names (`fnmatch`) -> share; all others are whole on every rank


def tensor_plan(own: Sequence[str], summed: Sequence[str], gathered: Sequence[str] = ()) -> TensorPlan:
    """A plan from patterns of names, by what becomes of the outputs."""
    kinds = {Outputs.OWN: own, Outputs.SUMMED: summed, Outputs.GATHERED: gathered}
    return {pattern: Share(outputs) for outputs, patterns in kinds.items() for pattern in patterns}


def shares_of(model: nn.Module, plan: TensorPlan) -> dict[str, Share]:
    """{name: share} of a model's modules that are divided."""
    return {
        name: share
        for name, _ in model.named_modules()
        for pattern, share in plan.items()
        if fnmatchcase(name, pattern)
    }


def own_part(tensor: Any, share: Share | None, peers: Peers) -> torch.Tensor:
    """This rank's part of a parameter.

    Args:
        tensor: the whole one, or a slice object of safetensors, of which nothing else is read.
    """
    dim = 0 if share is None else share.weight_dim
    shape = tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape()
    if share is None or dim >= len(shape):  # a bias is added to a sum by every rank, and so is it scaled
        whole: torch.Tensor = tensor[:]
        return whole
    width = shape[dim]
    pieces = [tensor[rows] if dim == 0 else tensor[:, rows] for rows in _own_slices(width, share, peers)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def _own_slices(width: int, share: Share, peers: Peers) -> list[slice]:
    """Where this rank's channels lie. Heads divide evenly, as is checked before; others may be one more or less."""
    unit, rest = divmod(width, sum(share.parts))
    if rest or (share.outputs is Outputs.GATHERED and width % peers.size):
        raise ConfigurationError(
            f"tensor_parallel_size={peers.size} is not valid: a layer of the model has {width} channels, which can't "
            f"be shared as {':'.join(map(str, share.parts))}"
        )
    slices, first = [], 0
    for part in share.parts:
        begin, end = (first + unit * part * rank // peers.size for rank in (peers.rank, peers.rank + 1))
        slices.append(slice(begin, end))
        first += unit * part
    return slices


def divide(model: nn.Module, plan: TensorPlan, peers: Peers, *, keeps_whole: bool = False) -> None:
    """Keep this rank's part of a loaded model's weights; nothing happens to a model that is divided already.

    Args:
        keeps_whole: the whole weights stay in memory, because others share it: a part that can be a view is one.
    """
    if peers.size == 1 or is_divided(model):
        return
    for name, share in shares_of(model, plan).items():
        module = model.get_submodule(name)
        for leaf, whole in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            part = own_part(whole.detach(), share, peers)
            part = part.contiguous() if keeps_whole else part.clone(memory_format=torch.contiguous_format)
            is_parameter = isinstance(whole, nn.Parameter)
            setattr(module, leaf, nn.Parameter(part, requires_grad=False) if is_parameter else part)
    finish(model, plan, peers)


def finish(model: nn.Module, plan: TensorPlan, peers: Peers) -> None:
    """Make a model with this rank's part of its weights one whose layers know that.

    Raises:
        ConfigurationError: a layer is none that can be divided, a quantized one for example.
    """
    for name, share in shares_of(model, plan).items():
        module: Any = model.get_submodule(name)
        if isinstance(module, nn.RMSNorm):
            continue  # `normalized_shape` tells that its weight is a part
        if type(module) not in (nn.Linear, QuantizedLinear):
            raise ConfigurationError(
                f"tensor_parallel_size={peers.size} is not valid: {name} is a {type(module).__name__}, which can't be "
                "divided; leave it out"
            )
        module.out_features, module.in_features = module.weight.shape
        if share.outputs is not Outputs.OWN:
            model.set_submodule(name, _SHARED[share.outputs](module, peers.size))
    vars(model)[_RANKS] = peers.size


def is_divided(model: nn.Module) -> bool:
    """Whether a rank has a part of the model's weights only."""
    return _RANKS in vars(model)


class _Shared(nn.Module):
    """A linear layer that ranks share, as its rows come and go.

    Attributes:
        layer: this rank's part of it, without its bias where that is added to the sum.
        ranks: among so many it is divided.
    """

    def __init__(self, layer: Any, ranks: int) -> None:
        super().__init__()
        self.layer = layer
        self.ranks = ranks


class _Summed(_Shared):
    """One whose inputs are divided."""

    bias: torch.Tensor | None

    def __init__(self, layer: Any, ranks: int) -> None:
        super().__init__(layer, ranks)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        layer.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, own channels] to [rows, outputs]."""
        total = add_up(_peers(self.ranks), linear(self.layer, x))
        return total if self.bias is None else total.add_(self.bias)


class _Gathered(_Shared):
    """One whose outputs are divided, and all needed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, channels] to [rows, outputs]."""
        return project([self], x)[0]


_SHARED = {Outputs.SUMMED: _Summed, Outputs.GATHERED: _Gathered}


def project(layers: Iterable[Any], x: torch.Tensor) -> list[torch.Tensor]:
    """`linear(layer, x)` of each layer, [rows, outputs]; what ranks have divided comes together in one exchange.

    Args:
        layers: in turn: of each the weights may be gone when the next one comes.
    """
    outputs: list[torch.Tensor] = []
    divided: dict[int, int] = {}  # among how many ranks, by the number of the layer
    for number, layer in enumerate(layers):
        if isinstance(layer, _Gathered):
            divided[number] = layer.ranks
        outputs.append(linear(layer.layer if isinstance(layer, _Gathered) else layer, x))
    if divided:
        peers = _peers(next(iter(divided.values())))
        own = [outputs[number] for number in divided]
        gathered = peers.all_gather(torch.cat(own, dim=1)).unflatten(0, (peers.size, -1))  # [ranks, rows, own outputs]
        pieces = gathered.split([piece.shape[1] for piece in own], dim=2)
        for number, piece in zip(divided, pieces, strict=True):
            outputs[number] = piece.transpose(0, 1).flatten(1)
    return outputs


def rms_norms(norms: Sequence[Any], streams: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The RMS norm of each stream [rows, own channels] over all channels, also where ranks have divided them.

    Args:
        norms: torch's RMSNorm, with a weight, of each stream.
    """
    widths = [norm.normalized_shape[0] for norm in norms]
    if widths[0] == norms[0].weight.shape[0]:
        return [rms_norm(norm, stream) for norm, stream in zip(norms, streams, strict=True)]
    peers = _peers(widths[0] // norms[0].weight.shape[0])
    squares = torch.cat([stream.float().square().sum(dim=-1) for stream in streams])
    sums = reduce(torch.add, peers.all_gather(squares[None]).unbind()).split([len(stream) for stream in streams])
    scales = [(own / width + norm.eps).rsqrt()[:, None] for own, width, norm in zip(sums, widths, norms, strict=True)]
    return [
        (stream * scale).to(stream.dtype) * norm.weight
        for stream, scale, norm in zip(streams, scales, norms, strict=True)
    ]


def add_up(peers: Peers, rows: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's rows [rows, channels], on all ranks, in the order of the ranks."""
    if peers.size == 2:
        return reduce(torch.add, peers.all_gather(rows).chunk(2))
    padded = F.pad(rows, [0, 0, 0, -rows.shape[0] % peers.size])
    parts = peers.all_to_all(padded.unflatten(0, (peers.size, -1)))
    return peers.all_gather(reduce(torch.add, parts.unbind()))[: rows.shape[0]]


def _peers(ranks: int) -> Peers:
    """Those that share the current forward's weights.

    Raises:
        RuntimeError: they are not as many as the weights were divided among.
    """
    peers = current_group().tensor
    if peers.size != ranks:
        raise RuntimeError(f"the weights are divided among {ranks} ranks, and {peers.size} share this forward")
    return peers
