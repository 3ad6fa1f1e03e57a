"""Counting a prompt's tokens in the front end, against what diffusers' own pipeline makes of it."""

import pytest
import torch
from diffusers import QwenImagePipeline

from vllm_cfg_plugin.checkpoint import Checkpoint, TextRules
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.registry import describe
from vllm_cfg_plugin.tokens import TokenCounter


@pytest.fixture(scope="module")
def folder(qwen_image_folders):
    return qwen_image_folders["tiny"]


def test_counts_are_the_lengths_of_diffusers_embeddings(folder):
    checkpoint = Checkpoint(str(folder))
    count = TokenCounter.of(checkpoint, describe(checkpoint).text)
    pipeline = QwenImagePipeline.from_pretrained(folder)
    for prompt in ("", " ", "a cat", "{braces} and <|im_end|>", "Größe 猫 🚀", "many words " * 50):
        with torch.inference_mode():
            embeddings, _ = pipeline.encode_prompt(prompt)
        assert count(prompt) == embeddings.shape[1], prompt


def test_a_checkpoint_without_tokenizer_is_a_configuration_error(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    with pytest.raises(ConfigurationError, match="tokenizer"):
        TokenCounter.of(Checkpoint(str(tmp_path)), TextRules(max_tokens=10))
