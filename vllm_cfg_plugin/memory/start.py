"""At start-up: where the text encoders go, before any rank loads anything; must not import vLLM."""

from __future__ import annotations

import torch

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.memory.placement import Card, describe_placement, fits, gib, place, refusal
from vllm_cfg_plugin.memory.sizing import model_memory

logger = get_logger(__name__)


def choose_text_encoder(checkpoint: Checkpoint, settings: EngineSettings, dtype: torch.dtype, card: Card | None) -> str:
    """Where the text encoders go, of `TEXT_ENCODERS`: what the operator asked for, else the first that fits.

    Args:
        card: each rank's; None where ranks run on a CPU, whose memory is not ours to divide.

    Raises:
        ConfigurationError: the model does not fit.
    """
    asked = settings.cfg_text_encoder
    if card is None:
        return asked or "all"
    try:
        model = model_memory(checkpoint, dtype, settings.variant, settings.quantization)
    except ConfigurationError:
        raise
    except Exception as error:  # of another package's pipeline: it may not run on the meta device
        logger.warning("What %s needs of a GPU can't be told beforehand: %s", checkpoint.model, error)
        return asked or "all"
    ranks = settings.cfg_parallel_size
    placement = place(model, card, ranks, asked)
    if not fits(placement, card):
        raise ConfigurationError(refusal(checkpoint.model, placement, card, ranks))
    logger.info(
        "Memory: with %s the fullest rank needs %s of %s",
        describe_placement(placement, ranks),
        gib(placement.needed),
        gib(card.usable),
    )
    return placement.text_encoder
