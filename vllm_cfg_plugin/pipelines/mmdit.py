"""The blocks of the MMDiT families over packed sequences, on diffusers' own modules; must not import vLLM.

Stable Diffusion 3 (https://arxiv.org/abs/2403.03206), Flux, LongCat-Image and Qwen-Image keep text and image in two
streams that attend to each other; Flux and LongCat-Image then lay them into one. See `worker/packing.py` for why a
sequence's result is bitwise the same in any company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch

from vllm_cfg_plugin.pipelines.linear import feed_forward, linear
from vllm_cfg_plugin.pipelines.modulation import Factors, Modulation, add_gated, modulate, span_starts
from vllm_cfg_plugin.pipelines.packed_attention import JointLayout, joint_attention


@dataclass(frozen=True)
class Spans:
    """Neighbouring sequences of one modulation: these modulations, and the rows of each span in every stream."""

    modulations: list[Modulation]
    text: list[slice]
    image: list[slice]

    @classmethod
    def of(cls, modulations: Sequence[Modulation], layout: JointLayout) -> Self:
        """The spans of sequences with these modulations, one per sequence."""
        firsts = span_starts(modulations)
        return cls([modulations[i] for i in firsts], layout.text.cut(firsts), layout.image.cut(firsts))

    def factors(self, number: int) -> list[Factors]:
        """Each span's factors of block `number`."""
        return [modulation.blocks[number] for modulation in self.modulations]


class DualBlock(NamedTuple):
    """The modules of one dual-stream block, whatever its family calls them.

    Attributes:
        attn: joint attention.
        image_norms, text_norms: layer norms before attention and before the MLP, without weights of their own.
        image_mlp, text_mlp: diffusers' FeedForward; no `text_mlp` where nothing reads the text any more.
    """

    attn: Any
    image_norms: tuple[Any, Any]
    text_norms: tuple[Any, Any]
    image_mlp: Any
    text_mlp: Any | None


def forward_dual_block(
    block: DualBlock, image: torch.Tensor, text: torch.Tensor, spans: Spans, number: int, layout: JointLayout
) -> None:
    """Block `number` of the model, on image and text [rows, dim]: both are changed in place."""
    factors = spans.factors(number)
    image_out, text_out = joint_attention(
        block.attn,
        modulate(block.image_norms[0], image, spans.image, factors, 0),
        modulate(block.text_norms[0], text, spans.text, factors, 6),
        layout,
    )
    add_gated(image, linear(block.attn.to_out[0], image_out), spans.image, factors, 2)
    image_in = modulate(block.image_norms[1], image, spans.image, factors, 3)
    add_gated(image, feed_forward(block.image_mlp, image_in), spans.image, factors, 5)
    if block.text_mlp is None:
        return
    add_gated(text, linear(block.attn.to_add_out, text_out), spans.text, factors, 8)
    text_in = modulate(block.text_norms[1], text, spans.text, factors, 9)
    add_gated(text, feed_forward(block.text_mlp, text_in), spans.text, factors, 11)
    if image.dtype == torch.float16:  # like upstream: keep an overflow finite
        image.clip_(-65504, 65504)
        text.clip_(-65504, 65504)


def modulate_last(norm: Any, image: torch.Tensor, spans: Spans) -> torch.Tensor:
    """The image after the last block, [rows, dim], normalised for the output projection."""
    factors = [(modulation.shift, modulation.scale) for modulation in spans.modulations]
    return modulate(norm, image, spans.image, factors, 0)
