"""vLLM's endpoint plugin: the images, the videos and the health routes in its OpenAI server."""

from __future__ import annotations

import multiprocessing
from argparse import Namespace
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.datastructures import State

from vllm_cfg_plugin.compat import client_index, drain_before_shutdown, note_engine_client
from vllm_cfg_plugin.engine.progress import address_of_client
from vllm_cfg_plugin.entrypoints.engine_calls import EngineCalls
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd, unpredicted_on_error
from vllm_cfg_plugin.entrypoints.health import health_addresses, replace_health_route
from vllm_cfg_plugin.entrypoints.images import routes as images
from vllm_cfg_plugin.entrypoints.images.service import ImagesService
from vllm_cfg_plugin.entrypoints.input_budget import InputBudget
from vllm_cfg_plugin.entrypoints.videos import routes as videos
from vllm_cfg_plugin.entrypoints.videos.service import VideosService
from vllm_cfg_plugin.executor.lifeline import die_with_parent

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.tasks import SupportedTask


class DiffusionEndpointPlugin:
    """vLLM's endpoint plugin contract (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "vllm_cfg_plugin"
    required_tasks: tuple[SupportedTask, ...] | None = ("plugin",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(images.router)
        app.include_router(videos.router)
        replace_health_route(app)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        if engine_client is None:  # vLLM's render server, which `required_tasks` keeps us out of
            return
        if multiprocessing.parent_process() is not None:
            # One of several API servers: a kill -9 of their parent would leave them without an engine.
            die_with_parent()
        names = args.served_model_name or [args.model]
        front_end = FrontEnd.from_vllm_config(engine_client.vllm_config)
        with unpredicted_on_error():
            front_end = front_end.with_cost(await engine_client.collective_rpc("calibrate"))
        calls = EngineCalls(engine_client, lambda: _is_stopping(state))
        drain_before_shutdown(engine_client, calls.drain)
        state.engine_calls = calls
        note_engine_client(engine_client)
        state.health_addresses = health_addresses(engine_client.vllm_config)
        state.max_upload_bytes = front_end.limits.max_upload_bytes
        state.input_budget = InputBudget(front_end.limits.max_input_bytes_in_flight)
        state.images_service = ImagesService(calls, front_end, names)
        state.videos_service = VideosService(calls, front_end, names)
        if front_end.progress_address:
            calls.updates.listen(address_of_client(front_end.progress_address, client_index(engine_client)))


def _is_stopping(state: State) -> bool:
    server = getattr(state, "server", None)  # set by vLLM once uvicorn runs
    return server is not None and server.should_exit
