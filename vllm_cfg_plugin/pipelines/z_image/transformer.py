"""Z-Image's transformer over packed sequences, on diffusers' own weights; must not import vLLM.

Same network as diffusers' `transformer_z_image.py` (https://arxiv.org/abs/2511.22699), but n sequences lie end to end
in one stream: each has its own image size, text length and timestep, attends to itself alone, and none is padded to
another's length. See `common/packing.py` for why a sequence's result is bitwise independent of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.utils import apply_lora_scale

from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.common import fused
from vllm_cfg_plugin.pipelines.common.adopt import become
from vllm_cfg_plugin.pipelines.common.attention import rms_norm, scaled_rms_norm, self_attention
from vllm_cfg_plugin.pipelines.common.linear import linear
from vllm_cfg_plugin.pipelines.common.modulation import (
    Factors,
    Modulation,
    ModulationCache,
    SpanFactors,
    StreamSpans,
    add_gated,
    modulate_last,
    modulations_at,
)
from vllm_cfg_plugin.pipelines.common.packing import LayoutCache, PackedRows, pad_rows
from vllm_cfg_plugin.pipelines.common.tensor_parallel import tensor_plan
from vllm_cfg_plugin.pipelines.common.upload import upload
from vllm_cfg_plugin.pipelines.offload import in_turn
from vllm_cfg_plugin.pipelines.z_image.layout import Grid, PaddedStream, ZImageLayout, lay_out, make_layout

# The patch that diffusers' pipeline asks for: of one frame, two latent pixels each way.
PATCH, FRAMES_PATCH = 2, 1
_PATCH_KEY = f"{PATCH}-{FRAMES_PATCH}"

_PER_BLOCK = 4  # the norm's scale before attention, the one behind it, then the same two of the MLP


_LAYERS = ("noise_refiner.*", "context_refiner.*", "layers.*")


class PackedZImageTransformer(ZImageTransformer2DModel):
    """diffusers' ZImageTransformer2DModel with a packed forward; for inference only."""

    # The modulations are whole: they are made of 256 channels, a fiftieth of the weights.
    tensor_plan: ClassVar = tensor_plan(
        own=[f"{layer}.{name}" for layer in _LAYERS for name in ("attention.to_[qkv]", "feed_forward.w[13]")],
        summed=[f"{layer}.{name}" for layer in _LAYERS for name in ("attention.to_out.0", "feed_forward.w2")],
    )

    _layouts: LayoutCache
    modulations: ModulationCache

    # Of adapters: the layers that make modulations, and the parts whose layers diffusers' own code calls.
    modulation_layers: ClassVar[tuple[str, ...]] = ("adaLN_modulation.0", "adaLN_modulation.1")
    closed_parts: ClassVar[tuple[str, ...]] = ("t_embedder",)

    @classmethod
    def adopt(cls, transformer: ZImageTransformer2DModel) -> Self:
        """Give a loaded transformer the packed forward: the object itself, see `become`.

        Raises:
            ConfigurationError: the checkpoint is for image conditions, or for other patches than diffusers' pipeline.
        """
        config = transformer.config
        if (width := config.get("siglip_feat_dim")) is not None:
            raise ConfigurationError(
                f"transformer/config.json: siglip_feat_dim={width} is not supported: it must be null"
            )
        if _PATCH_KEY not in transformer.all_x_embedder:
            patches = [*zip(config["all_patch_size"], config["all_f_patch_size"], strict=True)]
            raise ConfigurationError(
                f"transformer/config.json: all_patch_size and all_f_patch_size {patches} are not supported: "
                f"{(PATCH, FRAMES_PATCH)} must be among them"
            )
        return become(cls, transformer, _layouts=LayoutCache(), modulations=ModulationCache())

    @apply_lora_scale("joint_attention_kwargs")
    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        cap_feats: Sequence[torch.Tensor],
        grids: Sequence[Grid],
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        timesteps_ahead: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the velocity of n packed sequences.

        Args:
            x: the patches of all latents, [1, all tokens, patch].
            t: [n], in 0..1: 1 is the image.
            cap_feats: prompt embeddings of each sequence, [text tokens, dim] of any lengths.
            grids: (frames, height, width) of each sequence in tokens.
            joint_attention_kwargs: `scale` weighs the LoRA layers.
            timesteps_ahead: those of later calls, [any number], which are modulated on the side; None where weights may
                change between calls: then nothing of a timestep is remembered.

        Returns:
            Predictions, laid out like `x`.

        Raises:
            ValueError: not one text and timestep per image, or images that don't fill their tokens.
        """
        if not len(grids) == len(cap_feats) == t.shape[0]:
            raise ValueError(
                f"there are {len(grids)} images, {len(cap_feats)} texts and {t.shape[0]} timesteps: give one of each "
                "per sequence"
            )
        lengths = [prod(grid) for grid in grids]
        if x.shape[1] != sum(lengths):
            raise ValueError(f"x has {x.shape[1]} patches, but its grids {list(grids)} have {sum(lengths)}")
        key = (tuple(grids), tuple(text.shape[0] for text in cap_feats), x.device)
        layout = self._layouts.get(key, lambda: make_layout(self, *key))
        modulations = modulations_at(self, t, timesteps_ahead, torch.float32)
        rows = self._forward_rows(x[0].split(lengths), cap_feats, modulations, layout)
        own_rows = zip(layout.image.rows.split(rows), lengths, strict=True)
        sample = torch.cat([own[:length] for own, length in own_rows])[None]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def compute_modulations(self, timesteps: Sequence[float], dtype: torch.dtype) -> list[Modulation]:
        """The modulation of each timestep (in 0..1), bitwise independent of the others.

        A block scales what its RMS norms give and has no shifts: the factors are the scales with the norms' own weights
        in them.

        Args:
            dtype: of the timesteps; factors are of the weights' dtype.
        """
        final: Any = self.all_final_layer[_PATCH_KEY]
        blocks: list[Any] = [*self.noise_refiner, *self.layers]
        values = upload(torch.tensor(timesteps, dtype=dtype), self.x_pad_token.device)
        time = self.t_embedder(pad_rows(values) * self.t_scale).to(self.x_pad_token.dtype)
        projected = [linear(block.adaLN_modulation[0], time) for block in in_turn(blocks, "modulation")]
        projected.append(linear(final.adaLN_modulation[1], F.silu(time)))
        weights = torch.stack([weight for block in blocks for weight in _norm_weights(block)])
        modulations = []
        for row in torch.cat(projected, dim=1)[: len(timesteps)]:
            factors = row.clone().view(-1, self.dim)  # scale, gate, scale, gate of each block; the last layer's scale
            factors[::2] += 1
            factors[1::2].tanh_()
            factors[:-1] *= weights
            *of_blocks, scale = factors.unbind()
            grouped = [tuple(of_blocks[i : i + _PER_BLOCK]) for i in range(0, len(of_blocks), _PER_BLOCK)]
            modulations.append(Modulation(grouped, scale, torch.zeros_like(scale), factors.nbytes))
        return modulations

    def _forward_rows(
        self,
        patches: Sequence[torch.Tensor],
        texts: Sequence[torch.Tensor],
        modulations: Sequence[Modulation],
        layout: ZImageLayout,
    ) -> torch.Tensor:
        """[image rows, patch] of all sequences from patches and prompt embeddings, each [tokens, ...]."""
        image_spans, spans = (StreamSpans.of(modulations, stream.rows) for stream in (layout.image, layout.joint))
        image = linear(
            self.all_x_embedder[_PATCH_KEY],
            layout.image.rows.window(lay_out(patches, layout.image.rows)),
            layout.image.rows,
        )
        image[layout.image_pads] = self.x_pad_token
        for number, block in enumerate(in_turn(self.noise_refiner)):
            _add_attention(block, image, layout.image, image_spans.factors(number))
            _add_feed_forward(block, image, layout.image.rows, image_spans.factors(number))
        images = layout.image.rows.split(layout.image.rows.gather(image))
        pairs = zip(images, self._refine_texts(texts, layout), strict=True)
        stream = layout.joint.rows.window(layout.joint.rows.join(piece for pair in pairs for piece in pair))
        depth = len(self.noise_refiner) + len(self.layers)
        for number, block in enumerate(in_turn(self.layers), len(self.noise_refiner)):
            _add_attention(block, stream, layout.joint, spans.factors(number))
            rows = layout.joint.rows
            if number == depth - 1:  # nothing reads the text any more
                stream, spans, rows = layout.image_of(stream), image_spans, layout.image.rows
            _add_feed_forward(block, stream, rows, spans.factors(number))
        final: Any = self.all_final_layer[_PATCH_KEY]
        return layout.image.rows.gather(
            linear(final.linear, modulate_last(final.norm_final, stream, spans), layout.image.rows)
        )

    def _refine_texts(self, texts: Sequence[torch.Tensor], layout: ZImageLayout) -> list[torch.Tensor]:
        """What of each text joins its image, [text rows, dim]; the timestep does not matter to it."""
        norm, projection = self.cap_embedder
        stream = linear(
            projection, rms_norm(norm, layout.text.rows.window(lay_out(texts, layout.text.rows))), layout.text.rows
        )
        stream[layout.text_pads] = self.cap_pad_token
        for block in in_turn(self.context_refiner):
            factors = SpanFactors.of([slice(None)], [_norm_weights(block)])
            _add_attention(block, stream, layout.text, factors)
            _add_feed_forward(block, stream, layout.text.rows, factors)
        return layout.text.rows.split(layout.text.rows.gather(stream))


def _add_attention(block: Any, stream: torch.Tensor, layout: PaddedStream, factors: SpanFactors) -> None:
    """Add a block's attention to the stream [rows, dim], in place."""
    normed = _scale_norm(block.attention_norm1, stream, factors, 0)
    attended = self_attention(block.attention, normed, layout.rows, layout.rotation)
    change = linear(block.attention.to_out[0], attended, layout.rows)
    add_gated(stream, scaled_rms_norm(change, None, block.attention_norm2.eps), factors, 1)


def _add_feed_forward(block: Any, stream: torch.Tensor, rows: PackedRows, factors: SpanFactors) -> None:
    """Add a block's gated MLP to the stream [rows, dim], in place."""
    normed, mlp = _scale_norm(block.ffn_norm1, stream, factors, 2), block.feed_forward
    change = linear(mlp.w2, F.silu(linear(mlp.w1, normed, rows)).mul_(linear(mlp.w3, normed, rows)), rows)
    add_gated(stream, scaled_rms_norm(change, None, block.ffn_norm2.eps), factors, 3)


def _scale_norm(norm: Any, stream: torch.Tensor, spans: SpanFactors, scale: int) -> torch.Tensor:
    """The RMS norm of each span's rows with the span's own weight (factor `scale`)."""
    if spans.table is not None:
        return fused.compiled(fused.scale_rows)(stream, spans.table[:, scale], spans.row_spans, norm.eps)
    rows_and_factors = zip(spans.rows, spans.factors, strict=True)
    pieces = [scaled_rms_norm(stream[span], own[scale], norm.eps) for span, own in rows_and_factors]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _norm_weights(block: Any) -> Factors:
    """A block's factors where no timestep scales them."""
    norms = (block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2)
    return tuple(norm.weight for norm in norms)
