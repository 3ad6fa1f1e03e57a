"""The model's parts: new ones, ones read from a diffusers folder, and the folder they are exported to."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

WIDTH = 160
HEADS = 5
TEXT_LAYERS = 2
BLOCKS = 5
ROPE_AXES = (4, 14, 14)  # frame, height and width shares of one head; a picture has one frame


@dataclass
class Parts:
    """What a diffusers QwenImagePipeline is made of, save its scheduler."""

    transformer: QwenImageTransformer2DModel
    text_encoder: Qwen2_5_VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    vae: AutoencoderKLQwenImage

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that training changes: those of the transformer and of the language model."""
        language = self.text_encoder.model.language_model.named_parameters(prefix="text")
        return dict(self.transformer.named_parameters(prefix="transformer")) | dict(language)


def new_text_encoder(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLForConditionalGeneration:
    """Return an untrained text encoder; its vision tower is as small as can be, since text alone is encoded."""
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "eos_token_id": "<|im_end|>",
            "pad_token_id": "<|endoftext|>",
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        }.items()
    }
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048,
        "rope_parameters": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default", "rope_theta": 1e4},
        "tie_word_embeddings": True,
        "bos_token_id": ids["pad_token_id"],
        "eos_token_id": ids.pop("eos_token_id"),
        "pad_token_id": ids.pop("pad_token_id"),
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": WIDTH}
    vision |= {"fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    init_language_model(encoder.model.language_model, tokenizer)
    return encoder


@torch.no_grad()
def init_language_model(language_model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Start the matrices wide enough to learn fast, and a word alike with and without a space before it."""
    for name, weight in language_model.named_parameters():
        if weight.ndim == 2:
            residual = 0.3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            nn.init.normal_(weight, std=residual * weight.shape[1] ** -0.5)
    embeddings = language_model.embed_tokens.weight
    words: dict[str, Tensor] = {}
    for token, index in tokenizer.get_vocab().items():
        word = words.setdefault(token.lstrip("Ġ").lower() or token, 0.5 * torch.randn(WIDTH))
        embeddings[index] = word + 0.1 * torch.randn(WIDTH)


@torch.no_grad()
def new_transformer(latent_channels: int) -> QwenImageTransformer2DModel:
    """Return an untrained diffusion transformer whose first prediction is zero."""
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * latent_channels,
        out_channels=latent_channels,
        num_layers=BLOCKS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=ROPE_AXES,
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if "timestep_embedder" in name:
                nn.init.normal_(module.weight, std=0.02)
            if name.endswith(("img_mod.1", "txt_mod.1")):
                nn.init.zeros_(module.weight)
                module.bias.view(6, WIDTH)[[2, 5]] = 0.2  # the gates start ajar: every block takes part at once
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def load_parts(base: Path, init_from: Path | None) -> Parts:
    """Return the base folder's tokenizer and VAE with a new transformer and text encoder, or trained ones."""
    tokenizer = Qwen2Tokenizer.from_pretrained(base / "tokenizer")
    vae = AutoencoderKLQwenImage.from_pretrained(base / "vae").eval()
    if init_from is None:
        return Parts(new_transformer(vae.config.z_dim), new_text_encoder(tokenizer), tokenizer, vae)
    transformer = QwenImageTransformer2DModel.from_pretrained(init_from / "transformer")
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(init_from / "text_encoder")
    return Parts(transformer, text_encoder, tokenizer, vae)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKLQwenImage, pictures: Tensor) -> Tensor:
    """Return normalised latents packed as the transformer takes them, (picture, token, channel), of N x 64 x 64 x 3."""
    config = vae.config
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    packed = []
    for chunk in pictures.split(64):
        pixels = chunk.permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1
        latents = (vae.encode(pixels).latent_dist.mode() - mean) / std
        count, channels, _, height, width = latents.shape
        packed.append(QwenImagePipeline._pack_latents(latents, count, channels, height, width))
    return torch.cat(packed)


def export(parts: Parts, weights: dict[str, Tensor], names: list[dict], base: Path, folder: Path) -> None:
    """Write the pipeline with these weights as a diffusers folder in fp16, replacing the files already there."""
    scheduler = FlowMatchEulerDiscreteScheduler(  # a shift of 0: time steps spread evenly, as training draws them
        use_dynamic_shifting=True, base_shift=0.0, max_shift=0.0, base_image_seq_len=64, max_image_seq_len=1024
    )
    shipped = copy.deepcopy(parts)
    for name, parameter in shipped.trained().items():
        parameter.data = weights[name]
    for module in (shipped.transformer, shipped.text_encoder, shipped.vae):
        module.half()
    pipeline = QwenImagePipeline(scheduler, shipped.vae, shipped.text_encoder, shipped.tokenizer, shipped.transformer)
    pipeline.save_pretrained(folder)
    if base.resolve() != folder.resolve():
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(base / "tokenizer" / name, folder / "tokenizer" / name)
    (folder / "emoji.json").write_text(json.dumps(names, indent=1) + "\n")
    tidy(folder)


def tidy(folder: Path) -> None:
    """Make the folder fit to share: no local path in a config, every file readable by all."""
    for config in folder.glob("*/config.json"):
        # transformers would compute in the stored dtype; fp32 is meant
        settings = json.loads(config.read_text().replace('"float16"', '"float32"'))
        settings.pop("_name_or_path", None)
        config.write_text(json.dumps(settings, indent=2) + "\n")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
