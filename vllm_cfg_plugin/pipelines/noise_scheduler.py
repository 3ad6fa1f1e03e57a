"""A checkpoint's noise scheduler, made from its JSON files alone: how many timesteps it takes; must not import vLLM."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from vllm_cfg_plugin.checkpoint import MODEL_INDEX, Checkpoint
from vllm_cfg_plugin.errors import InvalidRequestError

CONFIG_FILE = "scheduler_config.json"
_IMAGE_TOKENS = 4096  # shifts timesteps and does not change their number

# (noise scheduler, number of denoising steps, image tokens, device of its timesteps)
SetTimesteps = Callable[[Any, int, int, torch.device], None]


def timestep_counter(checkpoint: Checkpoint, set_timesteps: SetTimesteps) -> Callable[[int], int]:
    """Number of denoising steps -> number of timesteps: what `PipelineInfo.num_timesteps` is.

    Nothing is read or made before it is asked.

    Args:
        set_timesteps: the family's own.
    """

    @lru_cache(maxsize=256)
    def count(num_inference_steps: int) -> int:
        scheduler = _make(checkpoint)
        try:
            set_timesteps(scheduler, num_inference_steps, _IMAGE_TOKENS, torch.device("cpu"))
            timesteps = torch.as_tensor(scheduler.timesteps)
        except InvalidRequestError:
            raise
        except Exception as error:
            name, reason = type(scheduler).__name__, str(error) or type(error).__name__  # an assertion has no text
            raise ValueError(f"{name} can't be set to {num_inference_steps} steps: {reason}") from error
        if not torch.isfinite(timesteps).all():
            raise ValueError(f"the timesteps of {type(scheduler).__name__} are not finite for {num_inference_steps}")
        return len(timesteps)

    return count


def _make(checkpoint: Checkpoint) -> Any:
    """The noise scheduler that diffusers would load.

    Raises:
        ValueError: there is no such class, or it does not take its configuration.
    """
    config = checkpoint.component_config("scheduler", CONFIG_FILE)
    library, name = (checkpoint.read_json(MODEL_INDEX) or {})["scheduler"]
    try:
        return getattr(import_module(library), name).from_config(config)
    except Exception as error:
        raise ValueError(f"{library}.{name} can't be made: {error}") from error
