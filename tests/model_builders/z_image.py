"""Random-weight Z-Image models of a few small sizes, made of diffusers' own classes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests.model_builders.qwen_image import SIZES, TOKENIZER, ModelSize

LATENT_CHANNELS = 4
# That of the real model's tokenizer, as far as it serves one user message.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def build_z_image(folder: Path, *, size: str = "tiny", dynamic_shifting: bool = False, seed: int = 0) -> Path:
    """Save a random Z-Image pipeline that diffusers can load, with small defaults; returns its folder.

    One image token is 16 x 16 pixels. The noise schedule is the real Z-Image's, or with `dynamic_shifting` one that
    depends on the size of the image.
    """
    shape = SIZES[size]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = Qwen2Tokenizer.from_pretrained(TOKENIZER)
        tokenizer.chat_template = CHAT_TEMPLATE
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shifting),
            vae=_vae(),
            text_encoder=_text_encoder(len(tokenizer), shape.text_width),
            tokenizer=tokenizer,
            transformer=transformer(shape),
        ).save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"height": 64, "width": 64, "num_inference_steps": 6}')
    return folder


def transformer(size: ModelSize) -> ZImageTransformer2DModel:
    """A transformer with diffusers' own initial weights, but for the pad tokens: those would be zeros."""
    model = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=size.heads * size.head_dim,
        n_layers=size.layers,
        n_refiner_layers=1,
        n_heads=size.heads,
        n_kv_heads=size.heads,
        cap_feat_dim=size.text_width,
        axes_dims=list(size.rope_axes),
        axes_lens=[1024, 64, 64],
    )
    for token in (model.x_pad_token, model.cap_pad_token):
        torch.nn.init.normal_(token)
    return model.eval().requires_grad_(False)


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 8, 8],
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(4)  # untrained, it would paint everything nearly grey
    return vae.eval()


def _text_encoder(vocabulary: int, width: int) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=24,
        max_position_embeddings=1024,
    )
    return Qwen3Model(config).eval()
