"""The blocks of the MMDiT families over packed sequences, on diffusers' own modules; must not import vLLM.

Stable Diffusion 3 (https://arxiv.org/abs/2403.03206), Flux, LongCat-Image and Qwen-Image keep text and image in two
streams that attend to each other; Flux and LongCat-Image then lay them into one. See `packing.py` for why a
sequence's result is bitwise independent of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F

from vllm_cfg_plugin.pipelines.common.attention import (
    JointLayout,
    joint_attention,
    make_joint_layout,
    self_attention,
)
from vllm_cfg_plugin.pipelines.common.linear import feed_forward, gelu_linear, linear
from vllm_cfg_plugin.pipelines.common.modulation import (
    Modulation,
    StreamSpans,
    add_gated,
    modulate,
    modulate_last,
    project_modulations,
)
from vllm_cfg_plugin.pipelines.common.packing import LayoutCache
from vllm_cfg_plugin.pipelines.common.tensor_parallel import Outputs, Share, TensorPlan, tensor_plan
from vllm_cfg_plugin.pipelines.common.upload import upload
from vllm_cfg_plugin.pipelines.offload import in_turn

# Names of the layers' children that give modulations, see `EnginePipeline.layer_lists`.
LAYER_LISTS: Mapping[str, Sequence[str]] = {
    "transformer_blocks": ("norm1", "norm1_context"),
    "single_transformer_blocks": ("norm",),
}

_DUAL, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
# Of Flux, LongCat-Image and Stable Diffusion 3, with the attention that some blocks of the last have besides.
DUAL_BLOCK_PLAN: TensorPlan = tensor_plan(
    own=[f"{_DUAL}.attn*.to_[qkv]", f"{_DUAL}.attn.add_[qkv]_proj", f"{_DUAL}.ff*.net.0.proj"],
    summed=[f"{_DUAL}.attn*.to_out.0", f"{_DUAL}.attn.to_add_out", f"{_DUAL}.ff*.net.2"],
    gathered=[f"{_DUAL}.norm1.linear", f"{_DUAL}.norm1_context.linear"],
)
# Of Flux and LongCat-Image. The last layer takes what attention gives beside the hidden channels, four times as many.
SINGLE_BLOCK_PLAN: TensorPlan = {
    **tensor_plan(
        own=[f"{_SINGLE}.attn.to_[qkv]", f"{_SINGLE}.proj_mlp"], summed=[], gathered=[f"{_SINGLE}.norm.linear"]
    ),
    f"{_SINGLE}.proj_out": Share(Outputs.SUMMED, parts=(1, 4)),
}


@dataclass(frozen=True)
class Spans:
    """The spans of every stream; those of the image may divide a sequence."""

    text: StreamSpans
    image: StreamSpans
    joint: StreamSpans

    @classmethod
    def of(cls, modulations: Sequence[Modulation], layout: JointLayout) -> Self:
        """The spans of sequences with these modulations, one per sequence."""
        return cls(*(StreamSpans.of(modulations, stream) for stream in (layout.text, layout.image, layout.joint)))


class DualBlock(NamedTuple):
    """The modules of one dual-stream block, whatever its family calls them.

    Attributes:
        attn: joint attention.
        image_norms, text_norms: layer norms before attention and before the MLP, without weights of their own.
        image_mlp, text_mlp: diffusers' FeedForward; no `text_mlp` where nothing reads the text any more.
        image_attn: the image's attention to itself, which some blocks of Stable Diffusion 3.5 have besides.
    """

    attn: Any
    image_norms: tuple[Any, Any]
    text_norms: tuple[Any, Any]
    image_mlp: Any
    text_mlp: Any | None
    image_attn: Any | None = None


def forward_dual_block(
    block: DualBlock, image: torch.Tensor, text: torch.Tensor, spans: Spans, number: int, layout: JointLayout
) -> None:
    """Block `number` of the model, on windows of image and text [rows, dim]: both are changed in place."""
    of_image, of_text = spans.image.factors(number), spans.text.factors(number)
    first = 6 if block.image_attn is None else 9  # the text's factors come after the image's
    image_norm, text_norm = block.image_norms[0], block.text_norms[0]
    image_out, text_out = joint_attention(
        block.attn,
        modulate(image_norm, image, of_image, 0),
        modulate(text_norm, text, of_text, first),
        layout,
    )
    own_in = None if block.image_attn is None else modulate(image_norm, image, of_image, 6)
    add_gated(image, linear(block.attn.to_out[0], image_out, layout.image), of_image, 2)
    if block.image_attn is not None and own_in is not None:
        own_out = self_attention(block.image_attn, own_in, layout.image, None)
        add_gated(image, linear(block.image_attn.to_out[0], own_out, layout.image), of_image, 8)
    image_in = modulate(block.image_norms[1], image, of_image, 3)
    add_gated(image, feed_forward(block.image_mlp, image_in, layout.image), of_image, 5)
    if block.text_mlp is None:
        return
    add_gated(text, linear(block.attn.to_add_out, text_out, layout.text), of_text, first + 2)
    text_in = modulate(block.text_norms[1], text, of_text, first + 3)
    add_gated(text, feed_forward(block.text_mlp, text_in, layout.text), of_text, first + 5)
    _keep_finite(image)
    _keep_finite(text)


def forward_single_block(block: Any, stream: torch.Tensor, spans: Spans, number: int, layout: JointLayout) -> None:
    """Block `number` of the model, one of its single-stream blocks, on a window of the joint stream [rows, dim]."""
    factors = spans.joint.factors(number)
    normed = modulate(block.norm.norm, stream, factors, 0)
    attended = self_attention(block.attn, normed, layout.joint, layout.rotation)
    hidden = gelu_linear(block.proj_mlp, normed, layout.joint)
    change = linear(block.proj_out, torch.cat([attended, hidden], dim=1), layout.joint)
    add_gated(stream, change, factors, 2)
    _keep_finite(stream)


def forward_blocks(
    model: Any, image: torch.Tensor, text: torch.Tensor, modulations: Sequence[Modulation], layout: JointLayout
) -> torch.Tensor:
    """The prediction of a Flux, LongCat-Image or Stable Diffusion 3 transformer, [image tokens, channels].

    Args:
        image, text: windows of the embedded streams, [rows, dim]; they are changed.
    """
    spans = Spans.of(modulations, layout)
    for number, block in enumerate(in_turn(model.transformer_blocks)):
        forward_dual_block(_dual_block(block), image, text, spans, number, layout)
    single_blocks = getattr(model, "single_transformer_blocks", ())
    if len(single_blocks):
        whole = (stream.split(stream.gather(own)) for stream, own in ((layout.text, text), (layout.image, image)))
        joint = layout.joint.join(rows for pair in zip(*whole, strict=True) for rows in pair)
        stream = layout.joint.window(joint)
        for number, block in enumerate(in_turn(single_blocks), start=len(model.transformer_blocks)):
            forward_single_block(block, stream, spans, number, layout)
        image = layout.image.window(layout.part(layout.joint.split(layout.joint.gather(stream)))[0])
    predicted = linear(model.proj_out, modulate_last(model.norm_out.norm, image, spans.image), layout.image)
    return layout.image.gather(predicted)[: layout.image.total]


def block_modulations(model: Any, embedding: torch.Tensor, count: int) -> list[Modulation]:
    """What `count` conditions do to a Flux, LongCat-Image or Stable Diffusion 3 transformer.

    Args:
        embedding: of the conditions, [rows, dim], padded.
    """
    dual_blocks = in_turn(model.transformer_blocks, "modulation")
    single_blocks = in_turn(getattr(model, "single_transformer_blocks", ()), "modulation")
    layers = chain(
        ((block.norm1.linear, block.norm1_context.linear) for block in dual_blocks),
        ((block.norm.linear,) for block in single_blocks),
    )
    return project_modulations(layers, model.norm_out.linear, F.silu(embedding), count)


def layout_of_ids(
    layouts: LayoutCache,
    pos_embed: Any,
    img_ids: Sequence[torch.Tensor],
    txt_ids: Sequence[torch.Tensor],
    count: int,
    device: torch.device,
) -> JointLayout:
    """The layout of `count` sequences by their position ids, a tensor [tokens, axes] each.

    A layout is remembered by which tensors these are, not by what is in them: reading them back from a GPU would wait
    for all that is queued there. So they must not be changed in place between calls.

    Raises:
        ValueError: not one tensor of ids for each sequence.
    """
    for name, ids in (("img_ids", img_ids), ("txt_ids", txt_ids)):
        if len(ids) != count:
            raise ValueError(f"{name} has {len(ids)} entries for {count} timesteps: there must be one per sequence")

    def make() -> tuple[JointLayout, Any]:
        rotations = []
        for text, image in zip(txt_ids, img_ids, strict=True):
            cos, sin = pos_embed(upload(torch.cat([text, image]), device))  # neighbours are equal: [tokens, head_dim]
            rotations.append(torch.complex(cos[:, ::2].contiguous(), sin[:, ::2].contiguous()))
        text_lengths, image_lengths = (tuple(own.shape[0] for own in ids) for ids in (txt_ids, img_ids))
        # The ids stay with their layout: while they live, no other tensor has their identity.
        return make_joint_layout(text_lengths, image_lengths, rotations, device), (*txt_ids, *img_ids)

    layout: JointLayout = layouts.get((device, *map(id, txt_ids), *map(id, img_ids)), make)[0]
    return layout


def rows_of(name: str, stream: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """[all tokens, channels] of packed [1, all tokens, channels] or an ordinary batch [n, tokens, channels].

    Raises:
        ValueError: the sequences don't fill the stream.
    """
    rows = stream.shape[0] * stream.shape[1]
    if rows != sum(lengths):
        raise ValueError(
            f"{name} has {rows} rows, but its sequences {list(lengths)} have {sum(lengths)}: they must be the same"
        )
    return stream.flatten(0, 1)


def _dual_block(block: Any) -> DualBlock:
    return DualBlock(
        attn=block.attn,
        image_norms=(block.norm1.norm, block.norm2),
        text_norms=(block.norm1_context.norm, block.norm2_context),
        image_mlp=block.ff,
        text_mlp=block.ff_context,
        image_attn=getattr(block, "attn2", None),
    )


def _keep_finite(stream: torch.Tensor) -> None:
    """Clip a stream that may overflow, in place, as diffusers does."""
    if stream.dtype == torch.float16:
        stream.clip_(-65504, 65504)
