"""What goes where: the first of some placements that a GPU has room for. Pure; must not import torch or vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_cfg_plugin.config import TEXT_ENCODERS

GIB = 2**30

# What a rank keeps from step to step: embeddings and conditions (256 MiB each), layouts and modulations.
CACHE_BYTES = 3 * GIB // 4

_TEXT_ENCODER = "text_encoder"  # how their names begin


@dataclass(frozen=True)
class Component:
    """The weights of one component.

    Attributes:
        nbytes: of all of them.
        streamed: of those that are on the device at a time, where its layers come from host memory one by one: what
            belongs to no layer, and the two largest layers.
        layers: of a transformer's layers, any number of which may be in host memory; 0: all must be on the device.
    """

    nbytes: int
    streamed: int
    layers: int = 0

    @property
    def in_turn(self) -> int:
        """Bytes of the two largest layers, for which there must be room where others are in host memory."""
        return self.streamed - (self.nbytes - self.layers)


@dataclass(frozen=True)
class ModelMemory:
    """What a checkpoint takes.

    Attributes:
        components: by their names in model_index.json.
        branch_tokens, image_tokens: of one branch of a request of the model's own size, and of its image.
        step_bytes, step_token_bytes: beside the weights, a packed forward takes the first, and the second for each
            token.
        decode_token_bytes: the same of a decode, for each token of the image.
    """

    components: Mapping[str, Component]
    branch_tokens: int
    image_tokens: int
    step_bytes: int
    step_token_bytes: int
    decode_token_bytes: int

    def step(self, branches: int) -> int:
        """Bytes of a packed forward of so many branches of the model's own size."""
        return self.step_bytes + self.step_token_bytes * self.branch_tokens * branches

    @property
    def layers(self) -> int:
        """Bytes of the transformers' layers that may be in host memory."""
        return sum(component.layers for component in self.components.values())

    @property
    def in_turn(self) -> int:
        """Bytes of two of them, the largest."""
        return max((component.in_turn for component in self.components.values() if component.layers), default=0)

    @property
    def decode(self) -> int:
        """Bytes of a decode of the model's own size."""
        return self.decode_token_bytes * self.image_tokens


@dataclass(frozen=True)
class Placement:
    """One way to place a model on equal ranks.

    Attributes:
        text_encoder: of `TEXT_ENCODERS`.
        resident: bytes of each component's weights on a rank that has it; at a time, where it is streamed.
        work: bytes of what a request of the model's own size needs besides: {what: bytes}.
        needed: bytes on the fullest rank.
        host: bytes that each rank keeps in host memory.
        streamed: components that are there as a whole.
        offloaded: bytes of the transformers' layers that are there too.
    """

    text_encoder: str
    resident: Mapping[str, int]
    work: Mapping[str, int]
    needed: int
    host: int
    streamed: frozenset[str]
    offloaded: int


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        nbytes: of its memory.
        share: of it that may be used (`--gpu-memory-utilization`); CUDA itself and its kernels take of the rest.
    """

    nbytes: int
    share: float

    @property
    def usable(self) -> int:
        return int(self.nbytes * self.share)


def place(model: ModelMemory, card: Card, ranks: int, text_encoder: str | None = None, offloaded: int = 0) -> Placement:
    """The first placement that fits: everything on every rank, text encoders elsewhere, layers of transformers too.

    Where none does, the last.

    Args:
        text_encoder: of `TEXT_ENCODERS`, what an operator asked for; None leaves the choice to what fits.
        offloaded: bytes of transformers' layers that an operator wants in host memory; 0 leaves it to what fits.
    """
    # A rank alone is every rank.
    choices = (
        [where for where in TEXT_ENCODERS if ranks > 1 or where != "one"] if text_encoder is None else [text_encoder]
    )
    placements = [_placement(model, ranks, where, offloaded) for where in choices]
    found = next((placement for placement in placements if fits(placement, card)), placements[-1])
    if offloaded or fits(found, card):
        return found
    lacking = found.needed - card.usable + model.in_turn
    return _placement(model, ranks, choices[-1], lacking) if lacking <= model.layers else found


def fits(placement: Placement, card: Card) -> bool:
    return placement.needed <= card.usable


def refusal(model: str, placement: Placement, card: Card, ranks: int) -> str:
    """Why a model can't be placed, and where to look."""
    return (
        f"model {model!r} does not fit: with {describe_placement(placement, ranks)} a rank needs "
        f"{gib(placement.needed)} and may use {gib(card.usable)} ({card.share:g} of {gib(card.nbytes)})"
    )


def describe_placement(placement: Placement, ranks: int) -> str:
    """A placement in words."""
    on_gpu = "text encoders on the GPU" if placement.offloaded else "everything on the GPU"
    words = {
        "all": "text encoders on every rank" if ranks > 1 else on_gpu,
        "one": "text encoders on the first rank",
        "cpu": "text encoders" if placement.offloaded else "text encoders in host memory",
    }
    layers = f" and {gib(placement.offloaded)} of the transformer's layers in host memory"
    return words[placement.text_encoder] + layers * bool(placement.offloaded)


def gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GB"


def _placement(model: ModelMemory, ranks: int, text_encoder: str, offloaded: int) -> Placement:
    encoders = {name for name in model.components if name.startswith(_TEXT_ENCODER)}
    streamed = encoders if text_encoder == "cpu" else set[str]()
    resident = {
        name: component.streamed if name in streamed else component.nbytes
        for name, component in model.components.items()
    }
    offloaded = min(offloaded, model.layers)
    for name, component in model.components.items():
        resident[name] -= -(-offloaded * component.layers // max(1, model.layers))
    work = {"a step": model.step(2 if ranks == 1 else 1), "a decode": model.decode, "caches": CACHE_BYTES}
    if offloaded:
        work["layers on their way"] = model.in_turn
    needed = sum(resident.values()) + sum(work.values())
    if text_encoder == "one" and ranks > 1:  # the others decode
        needed -= min(work["a decode"], sum(resident[name] for name in encoders))
    host = sum(model.components[name].nbytes for name in streamed) + offloaded
    return Placement(text_encoder, resident, work, needed, host, frozenset(streamed), offloaded)
