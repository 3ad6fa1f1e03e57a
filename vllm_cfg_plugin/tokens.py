"""How many tokens a prompt takes in the model, by the checkpoint's own tokenizer; must not import torch or vLLM."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from vllm_cfg_plugin.checkpoint import Checkpoint, TextRules
from vllm_cfg_plugin.errors import ConfigurationError

_CACHED_PROMPTS = 256


class TokenCounter:
    """Callable `prompt -> tokens`: what the pipeline's text encoder keeps of the prompt in its template.

    Prompts repeat (negative prompts above all), so counts of recent ones are kept.
    """

    def __init__(self, tokenizer: Any, rules: TextRules) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
        self._count = lru_cache(maxsize=_CACHED_PROMPTS)(self._count_uncached)

    @classmethod
    def of(cls, checkpoint: Checkpoint, rules: TextRules) -> Callable[[str], int]:
        """Load the tokenizer of a checkpoint, local or on the hub.

        Raises:
            ConfigurationError: the checkpoint has no tokenizer that can be loaded.
        """
        if not rules.tokenizer:
            return lambda prompt: 0
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.model, subfolder=rules.tokenizer, revision=checkpoint.revision
            )
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"model {checkpoint.model!r}: its {rules.tokenizer}/ can't be loaded: {error}"
            ) from error
        return cls(tokenizer, rules)

    def __call__(self, prompt: str) -> int:
        return self._count(prompt)

    def _count_uncached(self, prompt: str) -> int:
        pieces = self._rules.pieces(self._rules.template.format(prompt))
        return sum(len(self._tokenizer(piece).input_ids) for piece in pieces) - self._rules.prefix_tokens
