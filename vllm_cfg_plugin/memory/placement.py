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
    """

    nbytes: int
    streamed: int


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
        streamed: components that are there.
    """

    text_encoder: str
    resident: Mapping[str, int]
    work: Mapping[str, int]
    needed: int
    host: int
    streamed: frozenset[str]


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


def place(model: ModelMemory, card: Card, ranks: int, text_encoder: str | None = None) -> Placement:
    """The first placement that fits, from everything on every rank to text encoders in host memory; else the last.

    Args:
        text_encoder: of `TEXT_ENCODERS`, what an operator asked for; None leaves the choice to what fits.
    """
    # A rank alone is every rank.
    choices = (
        [where for where in TEXT_ENCODERS if ranks > 1 or where != "one"] if text_encoder is None else [text_encoder]
    )
    placements = [_placement(model, ranks, where) for where in choices]
    return next((placement for placement in placements if fits(placement, card)), placements[-1])


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
    everywhere = "text encoders on every rank" if ranks > 1 else "everything on the GPU"
    words = {"all": everywhere, "one": "text encoders on the first rank", "cpu": "text encoders in host memory"}
    return words[placement.text_encoder]


def gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GB"


def _placement(model: ModelMemory, ranks: int, text_encoder: str) -> Placement:
    encoders = {name for name in model.components if name.startswith(_TEXT_ENCODER)}
    streamed = encoders if text_encoder == "cpu" else set[str]()
    resident = {
        name: component.streamed if name in streamed else component.nbytes
        for name, component in model.components.items()
    }
    work = {"a step": model.step(2 if ranks == 1 else 1), "a decode": model.decode, "caches": CACHE_BYTES}
    needed = sum(resident.values()) + sum(work.values())
    if text_encoder == "one" and ranks > 1:  # the others decode
        needed -= min(work["a decode"], sum(resident[name] for name in encoders))
    host = sum(model.components[name].nbytes for name in streamed)
    return Placement(text_encoder, resident, work, needed, host, frozenset(streamed))
