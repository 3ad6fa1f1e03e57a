"""Our flags on vLLM's own command line, and the other flags' defaults when MODEL is a diffusers checkpoint.

vLLM copies only its declared fields from the parsed namespace, so our flags are written into `additional_config`, which
it declares. What depends on several arguments happens once all are parsed, so their order means nothing. All checks
here end in argparse's one-line error and exit code 2, before any process is started.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import entry_points
from typing import Any

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.compat.engine_deaths import serve_and_say_why_the_engine_ended
from vllm_cfg_plugin.compat.quiet_logs import quiet_logs, quiet_logs_of_children
from vllm_cfg_plugin.config import (
    LEAST_VALUES,
    TEXT_ENCODERS,
    EngineSettings,
    check_settings,
    new_address,
    with_our_defaults,
)
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.adapter_files import check_adapters
from vllm_cfg_plugin.pipelines.registry import check_servable
from vllm_cfg_plugin.vllm_options import check_options

_FLAGS = {
    "cfg_parallel_size": "Ranks that share the branches of classifier-free guidance (1: one rank runs them in turn).",
    "sequence_parallel_size": "Processes, each on a GPU or core of its own, that share every forward of a rank by its "
    "tokens; they must divide the model's attention heads. It pays for large images and videos.",
    "cfg_max_restarts": "How often in ten minutes ranks that died are started anew before the engine gives up.",
    "cfg_step_timeout": "Seconds after which ranks that owe an answer and send nothing count as dead.",
    "cfg_cache_bytes": "Bytes of each of a rank's two caches: of encoded texts, and of encoded images of requests.",
    "max_image_pixels": "Largest image, in pixels, that a request may ask for.",
    "max_video_pixels": "Most pixels, of all frames together, of a video that a request may ask for.",
    "max_inference_steps": "Most denoising steps that a request may ask for.",
    "max_request_seconds": "Longest time, in seconds, that a request may take by itself, all n results, as predicted.",
    "max_input_images": "Most images that a request may bring along.",
    "max_input_pixels": "Largest image, in pixels, that a request may bring along; four times as many in all, times n.",
    "max_upload_bytes": "Largest body, in bytes, of a request over HTTP.",
    "max_input_bytes_in_flight": "Bytes of all inputs, bodies and decoded images with their copies, of all requests at "
    "once, and of answers until they are read (of each API server); a request without room is answered with 429.",
    "max_step_ms": (
        "Most milliseconds that one rank's forwards may take in one step; a request that takes more by itself is "
        "forwarded beside the steps of the others. Default: 1000, or what the model's own size takes if that is more."
    ),
}
_TEXTS = {
    "cfg_text_encoder": (
        "|".join(TEXT_ENCODERS),
        "Text encoders on every rank (all), on the first one, which sends the others what it encoded (one), or in "
        "host memory, streamed layer by layer (cpu). Default: the first of these for which the GPUs have room.",
    ),
    "variant": (
        "NAME",
        "Of the names of the model's weight files, as in model.fp16.safetensors. Default: those without one.",
    ),
    "cfg_trace": (
        "FILE",
        "Write what each rank does, step by step, for https://ui.perfetto.dev; at most 1 GiB. Default: none.",
    ),
}
_SWITCHES = {
    "cfg_page": "A page at / of the server, on which a person can try the model. Default: on.",
    "cfg_shared_weights": "One copy of the weights for all ranks of an engine. Default: on, where ranks run on a CPU.",
}
_LORA_OPTIONS = ("enable_lora", "lora_modules", "max_loras", "max_lora_rank", "max_cpu_loras")  # of vLLM
# Naming this plugin in VLLM_PLUGINS would opt in to downloads that stock vLLM does not do on its own.
_OPT_IN_ONLY = {"lora_hf_hub_resolver"}


def add_flags(parser: argparse.ArgumentParser, on_cpu: bool) -> None:
    """Add our flags to a complete `vllm serve` (or `AsyncEngineArgs`) parser; does nothing the second time."""
    actions = {action.dest: action for action in parser._actions}
    if "cfg_parallel_size" in actions:
        return
    # Keeps its flags, type, default and help.
    actions["additional_config"].__class__ = _MergeConfig
    parser.parse_known_args = _DiffusionParsing(parser, on_cpu)  # type: ignore[method-assign, assignment]
    group = parser.add_argument_group("CFG-Parallel", "Diffusion pipelines with classifier-free guidance.")
    for name, text in _FLAGS.items():
        default = getattr(EngineSettings(), name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            action=_NumberAction,
            default=argparse.SUPPRESS,
            metavar="N",
            help=text if default is None else f"{text} Default: {default}.",
        )
    for name, (metavar, text) in _TEXTS.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, action=_SettingAction, default=argparse.SUPPRESS, metavar=metavar, help=text)
    for name, text in _SWITCHES.items():
        group.add_argument(f"--{name.replace('_', '-')}", action=_SwitchAction, default=argparse.SUPPRESS, help=text)


def all_plugin_names() -> str:
    """Every installed vLLM plugin's name, for a VLLM_PLUGINS that also admits endpoint plugins and drops nothing."""
    groups = [group for group in entry_points().groups if group.startswith("vllm.")]
    names = {point.name for group in groups for point in entry_points(group=group)}
    return ",".join(sorted(names - _OPT_IN_ONLY))


class _MergeConfig(argparse.Action):
    """`--additional-config JSON` beside our flags: merges into a copy instead of replacing."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        settings = self._settings(values, option_string)
        if not isinstance(settings, dict):
            parser.exit(2, f"{parser.prog}: error: {option_string} takes a JSON object, not {settings!r}\n")
        self._take(namespace, settings)

    def _take(self, namespace: argparse.Namespace, settings: dict[str, Any]) -> None:
        namespace.additional_config = {**(namespace.additional_config or {}), **settings}

    def _settings(self, values: Any, option_string: str | None) -> dict[str, Any]:
        return values


class _FlagAction(_MergeConfig):
    """A flag of ours, which is one key of `additional_config` when all flags are read."""

    def _take(self, namespace: argparse.Namespace, settings: dict[str, Any]) -> None:
        vars(namespace)[_FLAGS_READ] = {**vars(namespace).get(_FLAGS_READ, {}), **settings}


class _SettingAction(_FlagAction):
    """A flag with a value."""

    def _settings(self, values: Any, option_string: str | None) -> dict[str, Any]:
        return {self.dest: values}


class _NumberAction(_SettingAction):
    """A setting that is a number. What is wrong with it is said here: argparse would print 300 lines of usage first."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        least = LEAST_VALUES.get(self.dest, 1)
        number = int(values) if values.lstrip("+-").isdecimal() else least - 1
        if number < least:
            why = f"{values!r} is not valid: it must be an integer from {least} up"
            parser.exit(2, f"{parser.prog}: error: argument {option_string}: {why}\n")
        super().__call__(parser, namespace, number, option_string)


class _SwitchAction(_FlagAction, argparse.BooleanOptionalAction):
    """A setting that is on or off: `--name` and `--no-name`."""

    def _settings(self, values: Any, option_string: str | None) -> dict[str, Any]:
        return {self.dest: not str(option_string).startswith("--no-")}


class _DiffusionParsing:
    """A parser's `parse_known_args`, and after it what a diffusers checkpoint as MODEL brings.

    Args:
        parser: whose method this replaces.
        on_cpu: whether the model will run on a CPU.
    """

    def __init__(self, parser: argparse.ArgumentParser, on_cpu: bool) -> None:
        self._parser = parser
        self._parse = parser.parse_known_args
        self._on_cpu = on_cpu

    def __call__(
        self, args: Sequence[str] | None = None, namespace: Any = None, **options: Any
    ) -> tuple[argparse.Namespace, list[str]]:
        namespace = argparse.Namespace() if namespace is None else namespace
        # argparse fills in a default only where there is nothing yet, so what is still `_NOT_GIVEN` at the end was not
        # given, and what was given is told from its default even where the two are equal.
        watched = ("model", *_LORA_OPTIONS, *with_our_defaults({}, self._on_cpu))
        for dest in watched:
            if not hasattr(namespace, dest):
                setattr(namespace, dest, _NOT_GIVEN)
        namespace, rest = self._parse(args, namespace, **options)
        given = {dest: value for dest in watched if (value := getattr(namespace, dest)) is not _NOT_GIVEN}
        vars(namespace).update({dest: self._parser.get_default(dest) for dest in watched if dest not in given})
        try:
            _merge_flags(namespace)
            if _has_diffusion_model(namespace, given, self._parser.get_default):
                check_options(vars(namespace), self._parser.get_default)
                vars(namespace).update(with_our_defaults(given, self._on_cpu))
        except ConfigurationError as error:
            # Not `error()`, which prints vLLM's 300 lines of usage first.
            self._parser.exit(2, f"{self._parser.prog}: error: {error}\n")
        return namespace, rest


_NOT_GIVEN = object()
_FLAGS_READ = "_flags_of_cfg_plugin"  # attribute of a namespace that is being parsed


def _merge_flags(namespace: argparse.Namespace) -> None:
    """Our flags become a part of `additional_config`, whichever stood first.

    Raises:
        ConfigurationError: the two say different things.
    """
    flags = vars(namespace).pop(_FLAGS_READ, {})
    if not flags:
        return
    config = namespace.additional_config or {}
    for name, value in flags.items():
        if config.get(name, value) != value:
            raise ConfigurationError(f"{name}={value} is not valid: --additional-config says {config[name]}; give one")
    namespace.additional_config = {**config, **flags}


def _take_settings(namespace: argparse.Namespace, vllms_default: Callable[[str], Any]) -> None:
    """Options of vLLM that its own loader would act on, and would look for heads, become settings of ours."""
    for name in ("quantization", "cpu_offload_gb", "tensor_parallel_size"):
        asked, default = getattr(namespace, name), vllms_default(name)
        setattr(namespace, name, default)
        if asked != default:
            namespace.additional_config = {**(namespace.additional_config or {}), name: asked}


def _take_lora(namespace: argparse.Namespace, given: dict[str, Any], default_of: Callable[[str], Any]) -> None:
    """vLLM's own options of adapters, which are for its language models, become settings of ours.

    Raises:
        ConfigurationError: one is not valid, or an adapter can't be read.
    """
    asked = {name: given.pop(name) for name in _LORA_OPTIONS if name in given}
    asked = {name: value for name, value in asked.items() if not (value is None or value is False)}
    vars(namespace).update({name: default_of(name) for name in _LORA_OPTIONS})
    if "lora_modules" in asked:
        asked["lora_modules"] = _paths_of_adapters(asked["lora_modules"])
    namespace.additional_config = {**(namespace.additional_config or {}), **asked}
    settings = EngineSettings.from_dict(namespace.additional_config)
    if settings.enable_lora:
        model = getattr(namespace, "model_tag", None) or given["model"]
        if taken := settings.lora_modules.keys() & {*(getattr(namespace, "served_model_name", None) or [model])}:
            raise ConfigurationError(f"lora_modules: {min(taken)!r} is the name of the model: take another one")
        check_adapters(Checkpoint(model, getattr(namespace, "revision", None)), settings.lora_modules)


def _paths_of_adapters(modules: Sequence[Any]) -> dict[str, str]:
    """{name: path} of vLLM's `--lora-modules`."""
    paths: dict[str, str] = {}
    for module in modules:
        if module.name in paths:
            raise ConfigurationError(f"lora_modules: there are two adapters named {module.name!r}")
        if module.base_model_name:
            raise ConfigurationError(
                f"lora_modules: base_model_name={module.base_model_name!r} of {module.name!r} is not valid: leave it "
                "out, there is one model"
            )
        paths[module.name] = module.path
    return paths


def _has_diffusion_model(
    namespace: argparse.Namespace, given: dict[str, Any], vllms_default: Callable[[str], Any]
) -> bool:
    """Whether MODEL is a diffusion pipeline, which is then made ready.

    Raises:
        ConfigurationError: it is one that we don't serve, or none and has a setting of ours.
    """
    settings = getattr(namespace, "additional_config", None) or {}
    EngineSettings.from_dict(settings)
    model = getattr(namespace, "model_tag", None) or given.get("model")
    ours = set(settings) & {*_FLAGS, *_SWITCHES, *_TEXTS}
    if not isinstance(model, str):
        if ours:
            raise ConfigurationError(f"{min(ours)} needs a MODEL: a diffusers folder or the id of a repository")
        return False
    checkpoint = Checkpoint(model, getattr(namespace, "revision", None))
    is_diffusion = checkpoint.is_diffusers()
    if is_diffusion:
        quiet_logs()
        quiet_logs_of_children()
        _take_settings(namespace, vllms_default)
        _take_lora(namespace, given, vllms_default)
        settings = namespace.additional_config or {}
    if is_diffusion or ours:
        asked = EngineSettings.from_dict(settings)
        check_servable(checkpoint, asked.variant, asked.sequence_parallel_size, asked.tensor_parallel_size)
    if is_diffusion:
        check_settings(settings)
        addresses = {f"{purpose}_address": new_address(purpose) for purpose in ("progress", "health", "cause")}
        namespace.additional_config = {**addresses, **settings}
        if hasattr(namespace, "dispatch_function"):  # of the `vllm` command
            serve = partial(
                serve_and_say_why_the_engine_ended,
                namespace.dispatch_function,
                namespace.additional_config["cause_address"],
            )
            namespace.dispatch_function = serve
        # vLLM loads routes of plugins only if they are named there; nothing was imported through it yet.
        os.environ.setdefault("VLLM_PLUGINS", all_plugin_names())
    return is_diffusion
