"""How many tokens a prompt takes in the model, by the checkpoint's own tokenizer; must not import torch or vLLM."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.registry import PipelineFamily, family_of

_CACHED_PROMPTS = 256


class TokenCounter:
    """Callable `prompt -> tokens`: what the pipeline's text encoder keeps of the prompt in its template.

    Prompts repeat (negative prompts above all), so counts of recent ones are kept.
    """

    def __init__(self, tokenizer: Any, family: PipelineFamily) -> None:
        self._tokenizer = tokenizer
        self._family = family
        self._count = lru_cache(maxsize=_CACHED_PROMPTS)(self._count_uncached)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> TokenCounter:
        """Load the tokenizer of a checkpoint, local or on the hub.

        Raises:
            ConfigurationError: the checkpoint has no tokenizer that can be loaded.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.model, subfolder="tokenizer", revision=checkpoint.revision
            )
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"model {checkpoint.model!r}: its tokenizer/ can't be loaded: {error}") from error
        return cls(tokenizer, family_of(checkpoint))

    def __call__(self, prompt: str) -> int:
        return self._count(prompt)

    def _count_uncached(self, prompt: str) -> int:
        ids = self._tokenizer(self._family.prompt_template.format(prompt)).input_ids
        return len(ids) - self._family.template_prefix_tokens
