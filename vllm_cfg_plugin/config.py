"""Our settings: where they live in vLLM's configuration and what a diffusion model changes of vLLM's defaults.

Settings travel in `VllmConfig.additional_config`, which vLLM hands to every process. Must not import torch or vLLM.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.params import RequestLimits

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_FORMAT = "diffusers"
PLUGIN_NAME = "vllm_cfg_plugin"  # of our entry points, in every group

# `max_num_batched_tokens` of a user who gives none: the budget is found at start-up. vLLM fills in an empty one, so
# this is a number that nobody asks for, above any `max_num_seqs` as vLLM demands.
FIND_TOKEN_BUDGET = 2**20 - 1

# What vLLM's own flags default to for a diffusion model. A text prompt never reaches vLLM, so there is no tokenizer to
# load.
ENGINE_DEFAULTS: dict[str, Any] = {
    "config_format": CONFIG_FORMAT,
    "skip_tokenizer_init": True,
    "generation_config": "vllm",
    "enable_prefix_caching": False,
    # Requests at work: in the steps, or in encodes and decodes beside them.
    "max_num_seqs": 32,
    # Results that are being made or wait for it, over HTTP and of all replicas; vLLM's own default has no end.
    "max_num_queued_reqs": 1024,
    # Image and text tokens per rank and step: sharing a step gains nothing once it is compute-bound and makes everybody
    # wait for everybody, so past this budget requests wait.
    "max_num_batched_tokens": FIND_TOKEN_BUDGET,
    # Seconds for running requests to finish after SIGTERM; vLLM's own default aborts them at once.
    "shutdown_timeout": 5,
}


# Options of vLLM that would do nothing for a diffusion pipeline, or break it: name -> what to do instead. Those that
# are about nothing of the kind are in `vllm_options.py`.
ONE_MACHINE = (
    "cfg_parallel_size sets the number of ranks, sequence_parallel_size and tensor_parallel_size how many processes "
    "share a rank's forwards, data_parallel_size the number of replicas"
)
_WEIGHTS_AS_THEY_ARE = "weights are loaded as they are in the checkpoint, in the type that dtype says"
_NO_LANGUAGE = "it is about generating text"
UNUSABLE_OPTIONS: dict[str, str] = {
    "pipeline_parallel_size": ONE_MACHINE,
    "prefill_context_parallel_size": ONE_MACHINE,
    "decode_context_parallel_size": ONE_MACHINE,
    "enable_expert_parallel": ONE_MACHINE,
    "nnodes": ONE_MACHINE,
    "distributed_executor_backend": "this plugin starts the ranks itself",
    "worker_cls": "this plugin has its own",
    "scheduler_cls": "this plugin has its own",
    "scheduling_policy": "the shortest request goes first, and none is overtaken often",
    "quantization_config": _WEIGHTS_AS_THEY_ARE,
    "load_format": _WEIGHTS_AS_THEY_ARE,
    "hf_overrides": "the checkpoint's own files say what the model is",
    "tokenizer": "the checkpoint has its own",
    "seed": "every request has a seed of its own",
    "max_num_queued_tokens": "max_num_queued_reqs says how many requests may wait, of whatever length",
    "limit_mm_per_prompt": "max_input_images limits a request's images",
    "max_model_len": "the checkpoint says how long a prompt may be, max_image_pixels how large an image",
    "enable_prompt_embeds": "requests bring texts and images",
    "speculative_config": _NO_LANGUAGE,
    "spec_method": _NO_LANGUAGE,
    "spec_model": _NO_LANGUAGE,
    "reasoning_parser": _NO_LANGUAGE,
    "kv_transfer_config": "there is no KV cache",
    "ec_transfer_config": "there is no cache of encoder outputs outside the ranks",
    "kv_offloading_size": "there is no KV cache",
}
# Of these options "auto" leaves the choice to us.
_AUTO_OPTIONS = ("dtype", "config_format")


# Of settings that are integers, where that is not 1.
LEAST_VALUES = {"cfg_max_restarts": 0}


_LORA_NUMBERS = ("max_loras", "max_lora_rank", "max_cpu_loras")

# On every rank, on the first one alone (which sends the others what it encoded), or in host memory, from where their
# layers come to the device one by one.
TEXT_ENCODERS = ("all", "one", "cpu")
QUANTIZATIONS = ("fp8", "int8")


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of `additional_config` that is ours.

    Attributes:
        cfg_parallel_size: ranks that share the branches of guidance.
        sequence_parallel_size, tensor_parallel_size: their product is how many processes, each on its own device or
            core, a rank is: they share its forwards by their rows, and by the model's weights.
        cfg_shared_weights: one copy of the weights for all ranks of an engine; None: wherever that is possible.
        cfg_max_restarts: how often, within ten minutes, all ranks are started anew because one has died.
        cfg_step_timeout: seconds after which ranks that owe an answer and send nothing count as dead.
        cfg_cache_bytes: of each of a rank's two caches, of what texts and what images of requests became.
        cfg_text_encoder: where the text encoders are, of `TEXT_ENCODERS`; None: found at start-up.
        enable_lora: whether requests may carry adapters.
        lora_modules: those that there are from the start, {name: path}.
        max_loras: different ones that requests at work may carry at a time; a request that needs more waits.
        max_lora_rank: of any adapter.
        max_cpu_loras: that each rank keeps in host memory; None: as many as `max_loras`.
        quantization: of the transformers' weights, of `QUANTIZATIONS`; None: as they are in the checkpoint.
        cpu_offload_gb: GiB of the transformers' weights that each rank keeps in host memory; 0: as many as it must.
        max_image_pixels, ...: what an operator allows, as in `RequestLimits`.
        max_step_ms: milliseconds that one rank's forwards may take in one step; None: found at start-up.
        cfg_page: whether the server has a page on which a person can try the model.
        cfg_trace: file that is to hold a trace of the ranks' steps; "" for none.
        variant: of the names of the model's weight files, as in `model.fp16.safetensors`; "" for those without one.
        progress_address: ZMQ address on which a caller listens for denoising progress; empty: nobody does.
        cause_address: likewise, for why the engine has ended or could not start.
        health_address: where engines can be asked whether their ranks serve, before the number of each.
    """

    cfg_parallel_size: int = 1
    sequence_parallel_size: int = 1
    tensor_parallel_size: int = 1
    cfg_shared_weights: bool | None = None
    cfg_max_restarts: int = 3
    cfg_step_timeout: int = 120
    cfg_cache_bytes: int = 256 * 2**20
    cfg_text_encoder: str | None = None
    enable_lora: bool = False
    lora_modules: dict[str, str] = {}
    max_loras: int = 16
    max_lora_rank: int = 128
    max_cpu_loras: int | None = None
    quantization: str | None = None
    cpu_offload_gb: float = 0
    max_image_pixels: int = RequestLimits().max_image_pixels
    max_video_pixels: int = RequestLimits().max_video_pixels
    max_inference_steps: int = RequestLimits().max_inference_steps
    max_request_seconds: int = RequestLimits().max_request_seconds
    max_input_images: int = RequestLimits().max_input_images
    max_input_pixels: int = RequestLimits().max_input_pixels
    max_upload_bytes: int = RequestLimits().max_upload_bytes
    max_input_bytes_in_flight: int = RequestLimits().max_input_bytes_in_flight
    max_step_ms: int | None = None
    cfg_page: bool = True
    cfg_trace: str = ""
    variant: str = ""
    progress_address: str = ""
    cause_address: str = ""
    health_address: str = ""

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> EngineSettings:
        """Read and check the settings.

        Raises:
            ConfigurationError: naming the setting, its value and what is allowed.
        """
        return cls.from_dict(additional_config(vllm_config))

    @classmethod
    def from_dict(cls, additional: dict[str, Any]) -> EngineSettings:
        ours = {name: additional[name] for name in cls.__struct_fields__ if name in additional}
        try:
            settings = msgspec.convert(ours, cls)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"additional_config: {error}") from error
        sizes = ("cfg_parallel_size", "sequence_parallel_size", "tensor_parallel_size")
        numbers = (*sizes, "cfg_step_timeout", "cfg_max_restarts", "cfg_cache_bytes", "max_step_ms", *_LORA_NUMBERS)
        for name in (*numbers, *RequestLimits.__struct_fields__):
            value, least = getattr(settings, name), LEAST_VALUES.get(name, 1)
            if value is not None and value < least:
                raise ConfigurationError(f"{name}={value} is not valid: it must be an integer from {least} up")
        if not settings.cpu_offload_gb >= 0:
            raise ConfigurationError(f"cpu_offload_gb={settings.cpu_offload_gb} is not valid: it must be 0 or more")
        for name, allowed in (("cfg_text_encoder", TEXT_ENCODERS), ("quantization", QUANTIZATIONS)):
            if (value := getattr(settings, name)) not in (None, *allowed):
                raise ConfigurationError(f"{name}={value!r} is not valid: it must be one of {', '.join(allowed)}")
        settings._check_lora(ours)
        return settings

    def _check_lora(self, given: Mapping[str, Any]) -> None:
        if not self.enable_lora and (unused := sorted(given.keys() & {"lora_modules", *_LORA_NUMBERS})):
            raise ConfigurationError(f"{unused[0]}={given[unused[0]]!r} is not valid without enable_lora")
        if self.enable_lora and self.tensor_parallel_size > 1:
            raise ConfigurationError(
                f"enable_lora=True is not valid with tensor_parallel_size={self.tensor_parallel_size}, whose processes "
                "have parts of layers: leave one of them out"
            )
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ConfigurationError(
                f"max_cpu_loras={self.max_cpu_loras} is not valid: it must be at least max_loras={self.max_loras}"
            )

    @property
    def max_loras_of_requests(self) -> int:
        """Adapters that a request may carry."""
        return self.max_loras if self.enable_lora else 0

    @property
    def processes(self) -> int:
        """How many a cfg rank is."""
        return self.sequence_parallel_size * self.tensor_parallel_size

    @property
    def encoder_rank(self) -> int | None:
        """The one cfg rank that has the text encoders; None where all have them."""
        return 0 if self.cfg_text_encoder == "one" and self.cfg_parallel_size > 1 else None

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

    def rank_name(self, process: int) -> str:
        """What the process of this number is: "1", cfg rank 1, or of several that it is "1.0", the first of them."""
        rank, place = divmod(process, self.processes)
        return str(rank) if self.processes == 1 else f"{rank}.{place}"

    @property
    def limits(self) -> RequestLimits:
        return RequestLimits(**{name: getattr(self, name) for name in RequestLimits.__struct_fields__})


def with_our_defaults(given: Mapping[str, Any], on_cpu: bool) -> dict[str, Any]:
    """Options of vLLM for a diffusion model: those that the user gave, and our defaults of others."""
    defaults = {**ENGINE_DEFAULTS, "dtype": default_dtype(on_cpu)}
    chosen = {name: value for name, value in given.items() if not (name in _AUTO_OPTIONS and value == "auto")}
    return defaults | chosen


def check_settings(additional: object) -> None:
    """Check what a user of a diffusion model gives as `additional_config`, which nobody else reads then.

    Raises:
        ConfigurationError: it is no dictionary, or has a name that is no setting of ours.
    """
    if not isinstance(additional, dict):
        example = '{"cfg_parallel_size": 2}'
        raise ConfigurationError(
            f"additional_config={additional!r} is not valid: it must be settings such as {example}"
        )
    if unknown := set(additional) - set(EngineSettings.__struct_fields__):
        raise ConfigurationError(f"additional_config: {unknown_name(min(unknown), EngineSettings.__struct_fields__)}")


def unknown_name(name: str, known: Iterable[str]) -> str:
    """Words for a name that there is not, with those that are alike."""
    alike = get_close_matches(name, known)
    return f"there is no {name}" + f": did you mean {' or '.join(alike)}?" * bool(alike)


def additional_config(vllm_config: VllmConfig) -> dict[str, Any]:
    """vLLM's dictionary for settings of plugins; empty where somebody put something else there."""
    additional = vllm_config.additional_config
    return additional if isinstance(additional, dict) else {}


def default_dtype(on_cpu: bool) -> str:
    """The compute dtype when the user asks for none: on a CPU fp32, for which invariant 1 is claimed bit for bit."""
    return "float32" if on_cpu else "bfloat16"


def new_address(purpose: str) -> str:
    """Where an engine may reach its caller on this machine: in Linux's abstract namespace, not a file."""
    return f"ipc://@vllm-cfg-{purpose}-{uuid.uuid4().hex}"
