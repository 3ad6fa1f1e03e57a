"""What vLLM's model layer must know of a diffusers checkpoint: a config and a class; the weights never pass through it.

vLLM asks its ModelRegistry what kind of model it serves (a pooling model without attention caches) and a config parser
for the model's config. Both are answered here; the real pipeline is loaded by our worker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig
from vllm.model_executor.models import ModelRegistry
from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER, register_config_parser
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.config import CONFIG_FORMAT, FIND_TOKEN_BUDGET
from vllm_cfg_plugin.pipelines.registry import architecture_of, architectures

# vLLM's own prompt of a request is one placeholder token; the text travels in the request's parameters.
PLACEHOLDER_PROMPT: Any = {"type": "token", "prompt_token_ids": [0]}
# vLLM warns where max_num_batched_tokens is more than max_num_seqs prompts of this length.
_MAX_PROMPT_TOKENS = FIND_TOKEN_BUDGET


class DiffusionModel(torch.nn.Module):
    """Stands for a pipeline in vLLM's registry; never instantiated."""

    is_pooling_model: ClassVar[bool] = True
    is_attention_free: ClassVar[bool] = True

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        raise NotImplementedError(
            "a diffusion pipeline is loaded by vllm_cfg_plugin.worker, not by vLLM's model loader"
        )

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class DiffusersConfigParser(ConfigParserBase):
    """`config_format="diffusers"`: a minimal config from model_index.json."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], PreTrainedConfig]:
        checkpoint = Checkpoint(str(model), revision)
        architecture = architecture_of(checkpoint)
        # Sizes that vLLM reads of every model; they describe the placeholder prompt, nothing of the pipeline.
        sizes = {"hidden_size": 1, "num_attention_heads": 1, "num_hidden_layers": 1, "vocab_size": 1}
        config = PreTrainedConfig.from_dict(
            {"architectures": [architecture], "max_position_embeddings": _MAX_PROMPT_TOKENS, **sizes}
        )
        return config.to_dict(), config


def register_models() -> None:
    """Register the config format and every pipeline class; safe to call again."""
    if CONFIG_FORMAT in _CONFIG_FORMAT_TO_CONFIG_PARSER:
        return
    register_config_parser(CONFIG_FORMAT)(DiffusersConfigParser)
    for architecture in architectures():
        # The class object, not a "module:Class" string: vLLM inspects lazy names in a subprocess, which costs seconds.
        ModelRegistry.register_model(architecture, DiffusionModel)
