"""Our settings: where they live in vLLM's configuration and what a diffusion model changes of vLLM's defaults.

Settings travel in `VllmConfig.additional_config`, which vLLM hands to every process. Must not import torch or vLLM.
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.engine.cost import Calibration
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.logs import get_logger
from vllm_cfg_plugin.params import RequestLimits
from vllm_cfg_plugin.pipelines.registry import check_servable

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)

CONFIG_FORMAT = "diffusers"
PLUGIN_NAME = "vllm_cfg_plugin"  # of our entry points, in every group

# `max_num_batched_tokens` of a user who gives none: the budget is found at start-up. vLLM fills in an empty one, so
# this is a number that nobody asks for, above any `max_num_seqs` as vLLM demands.
FIND_TOKEN_BUDGET = 2**20 - 1

_CALIBRATION = "calibration"  # key of `additional_config`

# What vLLM's own flags default to for a diffusion model. A text prompt never reaches vLLM, so there is no tokenizer to
# load.
ENGINE_DEFAULTS: dict[str, Any] = {
    "config_format": CONFIG_FORMAT,
    "skip_tokenizer_init": True,
    "generation_config": "vllm",
    "enable_prefix_caching": False,
    # Requests that may share a step.
    "max_num_seqs": 32,
    # Image and text tokens per rank and step: sharing a step gains nothing once it is compute-bound and makes everybody
    # wait for everybody, so past this budget first come is first served.
    "max_num_batched_tokens": FIND_TOKEN_BUDGET,
    # Seconds for running requests to finish after SIGTERM; vLLM's own default aborts them at once.
    "shutdown_timeout": 5,
}


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of `additional_config` that is ours.

    Attributes:
        cfg_parallel_size: ranks that share the branches of guidance.
        cfg_shared_weights: one copy of the weights for all ranks of an engine; None: wherever that is possible.
        max_image_pixels, max_video_pixels, max_inference_steps, max_input_images, max_input_pixels, max_upload_bytes:
            what an operator allows a request.
        progress_address: ZMQ address on which a caller listens for denoising progress; empty: nobody does.
    """

    cfg_parallel_size: int = 1
    cfg_shared_weights: bool | None = None
    max_image_pixels: int = RequestLimits().max_image_pixels
    max_video_pixels: int = RequestLimits().max_video_pixels
    max_inference_steps: int = RequestLimits().max_inference_steps
    max_input_images: int = RequestLimits().max_input_images
    max_input_pixels: int = RequestLimits().max_input_pixels
    max_upload_bytes: int = RequestLimits().max_upload_bytes
    progress_address: str = ""

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> EngineSettings:
        """Read and check the settings.

        Raises:
            ConfigurationError: naming the setting, its value and what is allowed.
        """
        return cls.from_dict(_additional(vllm_config))

    @classmethod
    def from_dict(cls, additional: dict[str, Any]) -> EngineSettings:
        ours = {name: additional[name] for name in cls.__struct_fields__ if name in additional}
        try:
            settings = msgspec.convert(ours, cls)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"additional_config: {error}") from error
        for name in ("cfg_parallel_size", *RequestLimits.__struct_fields__):
            if getattr(settings, name) < 1:
                raise ConfigurationError(
                    f"{name}={getattr(settings, name)} is not valid: it must be an integer from 1 up"
                )
        return settings

    def shares_weights(self, device_type: str) -> bool:
        """Whether the ranks of an engine share their weights: on a CPU, unless it was switched off.

        Raises:
            ConfigurationError: it was asked for on a device where nothing can be shared.
        """
        if self.cfg_shared_weights and device_type != "cpu":
            raise ConfigurationError(
                f"cfg_shared_weights=True is not valid on {device_type}: every device holds weights of its own; only "
                "ranks on a CPU can share them. Leave it out"
            )
        return device_type == "cpu" and self.cfg_shared_weights is not False

    @property
    def limits(self) -> RequestLimits:
        return RequestLimits(**{name: getattr(self, name) for name in RequestLimits.__struct_fields__})


def keep_calibration(vllm_config: VllmConfig, calibration: Calibration) -> None:
    """Leave the calibration where `calibration_of` finds it, in the engine's own copy of the configuration."""
    vllm_config.additional_config = {**_additional(vllm_config), _CALIBRATION: msgspec.to_builtins(calibration)}


def calibration_of(vllm_config: VllmConfig) -> Calibration:
    """What `keep_calibration` left."""
    return msgspec.convert(_additional(vllm_config)[_CALIBRATION], Calibration)


def token_budget(vllm_config: VllmConfig) -> int:
    """Image and text tokens per rank and step: what the user asked for, else what was found at start-up; logs that."""
    asked = vllm_config.scheduler_config.max_num_batched_tokens
    if asked != FIND_TOKEN_BUDGET:
        return asked
    found = calibration_of(vllm_config).token_budget
    logger.info(
        "Token budget: %d tokens per rank and step (found at start-up; --max-num-batched-tokens overrides it)", found
    )
    return found


def _additional(vllm_config: VllmConfig) -> dict[str, Any]:
    additional = vllm_config.additional_config
    return additional if isinstance(additional, dict) else {}


def default_dtype(on_cpu: bool) -> str:
    """The compute dtype when the user asks for none: on a CPU fp32, for which invariant 1 is claimed bit for bit."""
    return "float32" if on_cpu else "bfloat16"


def diffusion_engine_args(model: str, cfg_parallel_size: int, **engine_args: Any) -> dict[str, Any]:
    """Keyword arguments of vLLM's `EngineArgs` for offline use; what the caller gives wins over our defaults.

    Args:
        engine_args: fields of `EngineSettings`, or anything that `EngineArgs` takes.

    Raises:
        ConfigurationError: a model that we don't serve, a setting out of range, or a VLLM_PLUGINS without us.
    """
    _check_plugin_is_allowed()
    from vllm.platforms import current_platform

    check_servable(Checkpoint(model, engine_args.get("revision")))
    settings = {name: engine_args.pop(name) for name in EngineSettings.__struct_fields__ if name in engine_args}
    additional = {
        **engine_args.pop("additional_config", {}),
        **settings,
        "cfg_parallel_size": cfg_parallel_size,
        "progress_address": new_progress_address(),
    }
    EngineSettings.from_dict(additional)
    dtype = {"dtype": default_dtype(current_platform.is_cpu())}
    return {**ENGINE_DEFAULTS, **dtype, **engine_args, "model": model, "additional_config": additional}


def new_progress_address() -> str:
    """Where an engine on this machine may publish progress: in Linux's abstract namespace, not a file."""
    return f"ipc://@vllm-cfg-progress-{uuid.uuid4().hex}"


def _check_plugin_is_allowed() -> None:
    """Without our platform vLLM fails with "Failed to infer device type", which names neither cause nor remedy."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        raise ConfigurationError(f"VLLM_PLUGINS={allowed!r} leaves us out: add {PLUGIN_NAME} to it, or unset it")
