"""At start-up: what of a model goes to host memory, before any rank loads anything; must not import vLLM."""

from __future__ import annotations

from typing import Any

import torch

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.memory.placement import GIB, Card, describe_placement, fits, gib, place, refusal
from vllm_cfg_plugin.memory.sizing import model_memory
from vllm_cfg_plugin.pipelines.registry import describe

logger = get_logger(__name__)


def choose_places(
    checkpoint: Checkpoint, settings: EngineSettings, dtype: torch.dtype, card: Card | None
) -> dict[str, Any]:
    """The settings that say where weights go: what the operator asked for, else the first placement that fits.

    Args:
        card: each rank's; None where ranks run on a CPU, whose memory is not ours to divide.

    Raises:
        ConfigurationError: the model does not fit, or its pipeline can't be placed otherwise than diffusers does it.
    """
    asked = {"cfg_text_encoder": settings.cfg_text_encoder or "all", "cpu_offload_gb": settings.cpu_offload_gb}
    if describe(checkpoint).call_arguments is not None:
        _check_nothing_is_asked(checkpoint, settings)
        return asked
    if card is None:
        return asked
    try:
        sizes = settings.sequence_parallel_size, settings.tensor_parallel_size
        model = model_memory(checkpoint, dtype, settings.variant, settings.quantization, *sizes)
    except ConfigurationError:
        raise
    except Exception as error:  # of another package's pipeline: it may not run on the meta device
        logger.warning("What %s needs of a GPU can't be told beforehand: %s", checkpoint.model, error)
        return asked
    ranks = settings.cfg_parallel_size
    placement = place(model, card, ranks, settings.cfg_text_encoder, int(settings.cpu_offload_gb * GIB))
    if not fits(placement, card):
        raise ConfigurationError(refusal(checkpoint.model, placement, card, ranks))
    logger.info(
        "Memory: with %s the fullest rank needs %s of %s",
        describe_placement(placement, ranks),
        gib(placement.needed),
        gib(card.usable),
    )
    return {"cfg_text_encoder": placement.text_encoder, "cpu_offload_gb": placement.offloaded / GIB}


def _check_nothing_is_asked(checkpoint: Checkpoint, settings: EngineSettings) -> None:
    for name in ("cfg_text_encoder", "quantization", "cpu_offload_gb"):
        if (value := getattr(settings, name)) not in (None, "all", 0):
            raise ConfigurationError(
                f"{name}={value!r} is not valid for model {checkpoint.model!r}: a {checkpoint.class_name()} runs as "
                "diffusers loads it; leave it out"
            )
