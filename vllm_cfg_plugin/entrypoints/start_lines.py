"""What a server says of itself when it is ready: the lines that an operator reads. Knows no HTTP."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd
from vllm_cfg_plugin.entrypoints.service import endpoint_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def start_lines(front_end: FrontEnd, vllm_config: VllmConfig, args: Namespace) -> list[str]:
    """Model, ranks, limits, routes and address."""
    info, limits = front_end.info, front_end.limits
    settings = EngineSettings.from_vllm_config(vllm_config)
    engines, model_config = vllm_config.parallel_config.data_parallel_size, vllm_config.model_config
    kind = model_config.architectures[0]
    if info.call_arguments is not None:
        class_name = Checkpoint(model_config.model, model_config.revision).class_name()
        kind = f"{class_name} of diffusers, each request by itself"
    names = ", ".join(args.served_model_name or [args.model])
    scheme = "https" if args.ssl_keyfile else "http"
    address = args.uds or f"{scheme}://{args.host or 'localhost'}:{args.port}"
    results = f"{info.produces}s of up to {limits.max_image_pixels} pixels"
    return [
        f"Serving {names}: {kind}, {info.task}, in {str(model_config.dtype).removeprefix('torch.')}",
        f"Ranks: {engines} engine(s) of {settings.cfg_parallel_size} (--cfg-parallel-size)",
        f"Limits: {results}, {limits.max_inference_steps} steps, {limits.max_request_seconds} s a request; "
        f"{vllm_config.scheduler_config.max_num_seqs} at work, "
        f"{vllm_config.scheduler_config.max_num_queued_reqs} in all (docs/operating.md)",
        f"Routes: POST {endpoint_of(info)}, GET /v1/models, /health, /metrics, /docs",
        f"Ready at {address}/v1"
        + (", with an API key" if args.api_key else "")
        + (f"; a page to try it: {address}/" if settings.cfg_page else ""),
    ]
