"""Small random text encoders and the tokenizers that go with them: one token a letter, so no files are needed."""

from __future__ import annotations

import string

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

_LETTERS = [character for character in string.printable[:94] if not character.isspace()]


def clip_tokenizer(max_length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer of single letters."""
    tokens = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=max_length)


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer of single letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in _LETTERS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def clip_text_model(width: int, *, with_projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text encoder; its pooled output has `width` channels, projected or not."""
    vocabulary = len(clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()


def t5_encoder(width: int) -> T5EncoderModel:
    """A T5 encoder."""
    config = T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=16, d_ff=2 * width, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()
