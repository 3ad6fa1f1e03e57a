"""vLLM's entry points into this package: platform, models, HTTP routes.

vLLM calls each of them in every one of its processes, some more than once, so they are idempotent and cheap: what is
heavy is imported inside. Must import nothing of vLLM, torch or diffusers at module level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_cfg_plugin.entrypoints.endpoint import DiffusionEndpointPlugin


def platform() -> str:
    """`vllm.platform_plugins`: the qualified name of our platform class."""
    return "vllm_cfg_plugin.platform.CfgPlatform"


def register() -> None:
    """`vllm.general_plugins`: the diffusers config format and the model class of every pipeline we serve."""
    from vllm_cfg_plugin.compat.quiet_logs import quiet_logs_of_child
    from vllm_cfg_plugin.model import register_models

    quiet_logs_of_child()
    register_models()


def endpoint() -> DiffusionEndpointPlugin:
    """`vllm.endpoint_plugins`: the OpenAI images and videos routes."""
    from vllm_cfg_plugin.compat.api_server import explain_unauthorized, know_own_port
    from vllm_cfg_plugin.compat.quiet_logs import quiet_logs
    from vllm_cfg_plugin.entrypoints.endpoint import DiffusionEndpointPlugin

    quiet_logs()
    explain_unauthorized()
    know_own_port()
    return DiffusionEndpointPlugin()
