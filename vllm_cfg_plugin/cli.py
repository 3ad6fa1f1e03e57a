"""Our flags on vLLM's own command line, and the other flags' defaults when MODEL is a diffusers checkpoint.

vLLM copies only its declared fields from the parsed namespace, so our flags are written into `additional_config`, which
it declares. All checks here end in argparse's one-line error and exit code 2, before any process is started.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.config import ENGINE_DEFAULTS, EngineSettings, default_dtype, new_progress_address
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.pipelines.registry import check_servable

_FLAGS = {
    "cfg_parallel_size": "Ranks that share the branches of classifier-free guidance (1: one rank runs them in turn).",
    "max_image_pixels": "Largest image, in pixels, that a request may ask for.",
    "max_video_pixels": "Most pixels, of all frames together, of a video that a request may ask for.",
    "max_inference_steps": "Most denoising steps that a request may ask for.",
    "max_input_images": "Most images that a request may bring along.",
    "max_input_pixels": "Largest image, in pixels, that a request may bring along; four times as many in all, times n.",
    "max_upload_bytes": "Largest body, in bytes, of a request over HTTP.",
}
_SWITCHES = {
    "cfg_shared_weights": "One copy of the weights for all ranks of an engine. Default: on, where ranks run on a CPU.",
}
# Naming this plugin in VLLM_PLUGINS would opt in to downloads that stock vLLM does not do on its own.
_OPT_IN_ONLY = {"lora_hf_hub_resolver"}


def add_flags(parser: argparse.ArgumentParser, on_cpu: bool) -> None:
    """Add our flags to a complete `vllm serve` (or `AsyncEngineArgs`) parser; does nothing the second time."""
    actions = {action.dest: action for action in parser._actions}
    if "cfg_parallel_size" in actions:
        return
    _rebase(actions["additional_config"], _MergeConfig)
    for dest in ("model_tag", "model"):
        if dest in actions:
            _rebase(actions[dest], _ModelAction).on_cpu = on_cpu  # type: ignore[attr-defined]
    group = parser.add_argument_group("CFG-Parallel", "Diffusion pipelines with classifier-free guidance.")
    for name, text in _FLAGS.items():
        default = getattr(EngineSettings(), name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            action=_SettingAction,
            type=_positive_int,
            default=argparse.SUPPRESS,
            metavar="N",
            help=f"{text} Default: {default}.",
        )
    for name, text in _SWITCHES.items():
        group.add_argument(f"--{name.replace('_', '-')}", action=_SwitchAction, default=argparse.SUPPRESS, help=text)


def all_plugin_names() -> str:
    """Every installed vLLM plugin's name, for a VLLM_PLUGINS that also admits endpoint plugins and drops nothing."""
    groups = [group for group in entry_points().groups if group.startswith("vllm.")]
    names = {point.name for group in groups for point in entry_points(group=group)}
    return ",".join(sorted(names - _OPT_IN_ONLY))


def _rebase(action: argparse.Action, cls: type[argparse.Action]) -> argparse.Action:
    """Give an existing argument our behaviour, keeping its flags, type, default and help."""
    action.__class__ = cls
    return action


def _positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid: it must be an integer from 1 up")
    return value


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
        namespace.additional_config = {**(namespace.additional_config or {}), **settings}
        try:
            EngineSettings.from_dict(namespace.additional_config)
        except ConfigurationError as error:
            parser.error(str(error))
        _check_model(parser, namespace)

    def _settings(self, values: Any, option_string: str | None) -> dict[str, Any]:
        return values


class _SettingAction(_MergeConfig):
    """A flag of ours, which is one key of `additional_config`."""

    def _settings(self, values: Any, option_string: str | None) -> dict[str, Any]:
        return {self.dest: values}


class _SwitchAction(_MergeConfig, argparse.BooleanOptionalAction):
    """A setting that is on or off: `--name` and `--no-name`."""

    def _settings(self, values: Any, option_string: str | None) -> dict[str, Any]:
        return {self.dest: not str(option_string).startswith("--no-")}


class _ModelAction(argparse.Action):
    """Stores MODEL; a diffusers checkpoint brings our defaults for the flags that the user left alone."""

    on_cpu: bool

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        if isinstance(values, str) and _checkpoint(namespace, values).is_diffusers():
            defaults = {**ENGINE_DEFAULTS, "dtype": default_dtype(self.on_cpu)}
            for dest, value in defaults.items():
                if getattr(namespace, dest, None) == parser.get_default(dest):
                    setattr(namespace, dest, value)
            given = getattr(namespace, "additional_config", None) or {}
            namespace.additional_config = {"progress_address": new_progress_address(), **given}
            # vLLM loads routes of plugins only if they are named there; nothing was imported through it yet.
            os.environ.setdefault("VLLM_PLUGINS", all_plugin_names())
            _check_servable(parser, _checkpoint(namespace, values))
        _check_model(parser, namespace)


def _check_model(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
    """A model with a CFG-Parallel setting must be one that we serve; whichever of the two is parsed last finds out."""
    model = getattr(namespace, "model_tag", None)
    settings = (set(_FLAGS) | set(_SWITCHES)) & set(getattr(namespace, "additional_config", None) or {})
    if isinstance(model, str) and settings:
        checkpoint = _checkpoint(namespace, model)
        if not checkpoint.is_diffusers():
            _check_servable(parser, checkpoint)


def _checkpoint(namespace: argparse.Namespace, model: str) -> Checkpoint:
    return Checkpoint(model, getattr(namespace, "revision", None))


def _check_servable(parser: argparse.ArgumentParser, checkpoint: Checkpoint) -> None:
    try:
        check_servable(checkpoint)
    except ConfigurationError as error:
        parser.error(str(error))
