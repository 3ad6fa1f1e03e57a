"""vLLM's endpoint plugin: the images, the videos and the health routes in its OpenAI server."""

from __future__ import annotations

import multiprocessing
import secrets
from argparse import Namespace
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from vllm import envs

from vllm_cfg_plugin.compat.api_server import remove_dead_routes
from vllm_cfg_plugin.compat.engine_deaths import note_engine_client
from vllm_cfg_plugin.compat.engines import client_index, count_aborts, drain_before_shutdown
from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.engine.progress import address_of_client
from vllm_cfg_plugin.entrypoints import adapter_routes, health, models, page
from vllm_cfg_plugin.entrypoints.engine_calls import EngineCalls
from vllm_cfg_plugin.entrypoints.error_route import answer_unknown_route
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd, unpredicted_on_error
from vllm_cfg_plugin.entrypoints.images import routes as images
from vllm_cfg_plugin.entrypoints.images.links import ImageLinks
from vllm_cfg_plugin.entrypoints.images.service import ImagesService
from vllm_cfg_plugin.entrypoints.input_budget import InputBudget
from vllm_cfg_plugin.entrypoints.start_lines import start_lines
from vllm_cfg_plugin.entrypoints.videos import routes as videos
from vllm_cfg_plugin.entrypoints.videos.service import VideosService
from vllm_cfg_plugin.executor.lifeline import die_with_parent
from vllm_cfg_plugin.logs import get_logger

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.tasks import SupportedTask


logger = get_logger(__name__)


class DiffusionEndpointPlugin:
    """vLLM's endpoint plugin contract (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "vllm_cfg_plugin"
    required_tasks: tuple[SupportedTask, ...] | None = ("plugin",)

    def attach_router(self, app: FastAPI) -> None:
        remove_dead_routes(app)
        app.include_router(images.router)
        app.include_router(images.plain_router)
        app.include_router(videos.router)
        for router in (health.router, models.router):
            replace_routes(app, router)
        if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            replace_routes(app, adapter_routes.router)
        if getattr(app.state, "args", None) is None or wants_page(app.state.args):
            app.include_router(page.router)
        app.add_exception_handler(HTTPException, answer_unknown_route)

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
        calls.predict = front_end.predict
        drain_before_shutdown(engine_client, calls.drain)
        state.engine_calls = calls
        note_engine_client(engine_client)
        count_aborts(engine_client)
        state.model_names = names
        state.engine_client = engine_client
        state.adapters = front_end.adapters
        state.health_addresses = health.health_addresses(engine_client.vllm_config)
        state.max_upload_bytes = front_end.limits.max_upload_bytes
        state.input_budget = InputBudget(front_end.limits.max_input_bytes_in_flight)
        settings = EngineSettings.from_vllm_config(engine_client.vllm_config)
        state.page_info = page.page_info(front_end, names[0])
        # A name of this server, or of nobody where it has none.
        links = ImageLinks(settings.health_address.rpartition("-")[2] or secrets.token_hex(16))
        state.images_service = ImagesService(calls, front_end, names, links)
        state.videos_service = VideosService(calls, front_end, names)
        if client_index(engine_client) == 0:
            for line in start_lines(front_end, engine_client.vllm_config, args):
                logger.info("%s", line)
        if front_end.progress_address:
            calls.updates.listen(address_of_client(front_end.progress_address, client_index(engine_client)))


def wants_page(args: Namespace) -> bool:
    """Whether the operator wants `GET /` to be a page."""
    return EngineSettings.from_dict(getattr(args, "additional_config", None) or {}).cfg_page


def replace_routes(app: FastAPI, router: APIRouter) -> None:
    """Have ours in place of vLLM's: called, and described in /docs."""
    ours = {getattr(route, "path", "") for route in router.routes}
    others = [route for route in app.router.routes if getattr(route, "path", "") not in ours]
    app.router.routes[:] = [*router.routes, *others]


def _is_stopping(state: State) -> bool:
    server = getattr(state, "server", None)  # set by vLLM once uvicorn runs
    return server is not None and server.should_exit
