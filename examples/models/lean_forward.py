"""The training forward: the same numbers as diffusers and transformers compute, without the work nobody reads.

The prompt template's prefix is the same in every prompt, so it runs once a batch instead of once a caption, the last
block of the transformer computes no new text states, and attention is written out: for this few tokens a head, that is
far faster on a CPU than the fused one.
"""

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

PREFIX_TOKENS = 34  # QwenImagePipeline.prompt_template_encode_start_idx: what it drops from the text states
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
Rotation = tuple[Tensor, Tensor]  # cosines and sines


def rotate_halves(x: Tensor, rotation: Rotation) -> Tensor:
    """Apply the language model's rotary embedding, which pairs the first half of a head with the second."""
    first, second = x.chunk(2, -1)
    return x * rotation[0] + torch.cat([-second, first], -1) * rotation[1]


def rotate_pairs(x: Tensor, rotation: Rotation) -> Tensor:
    """Apply the diffusion transformer's rotary embedding, which pairs neighbours; x is (batch, token, head, dim)."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(3)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Return softmax attention where the mask is true; all are (batch, head, token, dim)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    return scores.float().masked_fill(~mask, -1e9).softmax(-1).to(value.dtype) @ value


def text_rotation(language_model: nn.Module, length: int) -> Rotation:
    """Return the language model's rotary embedding of the first positions."""
    config = language_model.config
    dim = config.hidden_size // config.num_attention_heads
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def project_heads(layer: nn.Module, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Return one language layer's queries, keys and values, (batch, head, token, dim)."""
    attention, normed = layer.self_attn, layer.input_layernorm(x)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (p(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
    return rotate_halves(query, rotation), rotate_halves(key, rotation), value


def finish_layer(layer: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """Return one language layer's output from what its attention found."""
    x = x + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def encode_text(language_model: nn.Module, prefix: Tensor, ids: Tensor) -> Tensor:
    """Return the states of the tokens after the prefix, as the pipeline hands them to the transformer.

    `ids` is padded on the right; attention is causal, so padding changes no state before it.
    """
    batch, length = ids.shape
    split = len(prefix)
    cos, sin = text_rotation(language_model, split + length)
    before, after = (cos[:split], sin[:split]), (cos[split:], sin[split:])
    causal = torch.ones(split + length, split + length, dtype=torch.bool).tril()
    shared, own = language_model.embed_tokens(prefix)[None], language_model.embed_tokens(ids)
    for layer in language_model.layers:
        shared_query, shared_key, shared_value = project_heads(layer, shared, before)
        query, key, value = project_heads(layer, own, after)
        key = torch.cat([shared_key.expand(batch, -1, -1, -1), key], 2)
        value = torch.cat([shared_value.expand(batch, -1, -1, -1), value], 2)
        own = finish_layer(layer, own, attend(query, key, value, causal[split:]))
        shared = finish_layer(layer, shared, attend(shared_query, shared_key, shared_value, causal[:split, :split]))
    return language_model.norm(own)


def joint_rotation(transformer: QwenImageTransformer2DModel, side: int, text_length: int) -> Rotation:
    """Return the transformer's rotary embedding, text tokens first, for square pictures of side x side tokens."""
    image, text = transformer.pos_embed([[(1, side, side)]], max_txt_seq_len=text_length, device=torch.device("cpu"))
    joint = torch.cat([text, image])[:, None]
    return joint.real.contiguous(), joint.imag.contiguous()


def modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return the normed input, shifted and scaled as the time step asks."""
    return norm(x) * (1 + scale) + shift


def run_block(
    block: nn.Module, image: Tensor, text: Tensor, time: Tensor, mask: Tensor, rotation: Rotation, last: bool
) -> tuple[Tensor, Tensor]:
    """Run one dual-stream block; the last one leaves the text alone, since nothing reads it."""
    attn, length = block.attn, text.shape[1]
    image_mod = block.img_mod[1](time)[:, None].chunk(6, -1)
    text_mod = block.txt_mod[1](time)[:, None].chunk(6, -1)
    image_in = modulate(block.img_norm1, image, *image_mod[:2])
    text_in = modulate(block.txt_norm1, text, *text_mod[:2])

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.heads, -1))

    query = attn.norm_q(heads(attn.to_q(image_in)))
    key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(text_in))), attn.norm_k(heads(attn.to_k(image_in)))], 1)
    value = torch.cat([heads(attn.add_v_proj(text_in)), heads(attn.to_v(image_in))], 1)
    if last:
        query = rotate_pairs(query, (rotation[0][length:], rotation[1][length:]))
    else:
        query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(text_in))), query], 1)
        query = rotate_pairs(query, rotation)
    joint = [x.transpose(1, 2) for x in (query, rotate_pairs(key, rotation), value)]
    attended = attend(*joint, mask).transpose(1, 2).flatten(2)
    if not last:
        text = text + text_mod[2] * attn.to_add_out(attended[:, :length])
        text = text + text_mod[5] * block.txt_mlp(modulate(block.txt_norm2, text, *text_mod[3:5]))
        attended = attended[:, length:]
    image = image + image_mod[2] * attn.to_out[0](attended)
    return image + image_mod[5] * block.img_mlp(modulate(block.img_norm2, image, *image_mod[3:5])), text


def predict_velocity(
    transformer: QwenImageTransformer2DModel, latents: Tensor, text: Tensor, mask: Tensor, sigma: Tensor
) -> Tensor:
    """Return the transformer's prediction for packed latents; `mask` is true where `text` is no padding."""
    image = transformer.img_in(latents)
    text = transformer.txt_in(transformer.txt_norm(text))
    embedding = transformer.time_text_embed(sigma, image)
    time = F.silu(embedding)
    rotation = joint_rotation(transformer, round(latents.shape[1] ** 0.5), text.shape[1])
    joint_mask = torch.cat([mask, mask.new_ones(image.shape[:2])], 1)[:, None, None]
    blocks = transformer.transformer_blocks
    for block in blocks:
        image, text = run_block(block, image, text, time, joint_mask, rotation, block is blocks[-1])
    return transformer.proj_out(transformer.norm_out(image, embedding))


@torch.no_grad()
def check_exact(
    transformer: QwenImageTransformer2DModel,
    text_encoder: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    captions: list[str],
) -> float:
    """Return the largest difference from what diffusers' own pipeline computes for these captions."""
    pipeline = QwenImagePipeline(None, None, text_encoder, tokenizer, transformer)
    states, mask = pipeline.encode_prompt(captions)
    tokens = tokenizer([TEMPLATE.format(c) for c in captions], padding=True, return_tensors="pt").input_ids
    ours = encode_text(text_encoder.model.language_model, tokens[0, :PREFIX_TOKENS], tokens[:, PREFIX_TOKENS:])
    mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    latents, sigma = torch.randn(len(captions), 64, transformer.config.in_channels), torch.rand(len(captions))
    theirs = transformer(latents, states, mask, sigma, [[(1, 8, 8)]] * len(captions), return_dict=False)[0]
    return (predict_velocity(transformer, latents, ours, mask, sigma) - theirs).abs().max().item()
