"""HTTP: `POST /v1/images/generations` in vLLM's OpenAI server.

Routes are thin: `protocol` knows the fields, `serving` does the work, `error_route` answers with errors.
"""

from __future__ import annotations

import multiprocessing
from argparse import Namespace
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, with_cancellation
from vllm.utils import random_uuid

from vllm_cfg_plugin.entrypoints.engine_calls import EngineCalls
from vllm_cfg_plugin.entrypoints.error_route import OpenAIErrorRoute
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd
from vllm_cfg_plugin.entrypoints.protocol import ImagesRequest, ImagesResponse
from vllm_cfg_plugin.entrypoints.serving import ImagesService
from vllm_cfg_plugin.worker.lifeline import die_with_parent

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.tasks import SupportedTask


router = APIRouter(route_class=OpenAIErrorRoute)


@router.post("/v1/images/generations", responses={HTTPStatus.OK.value: {"model": ImagesResponse}})
@with_cancellation
@load_aware_call
async def generate_images(body: ImagesRequest, raw_request: Request) -> JSONResponse:
    """Text to image: the fields of OpenAI's images API, and those of diffusion (`ImagesRequest`)."""
    request_id = raw_request.headers.get("X-Request-Id") or random_uuid()
    response = await raw_request.app.state.images_service.generate(body, f"img-{request_id}")
    return JSONResponse(response.model_dump())


class ImagesEndpointPlugin:
    """vLLM's endpoint plugin contract (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "vllm_cfg_plugin"
    required_tasks: tuple[SupportedTask, ...] | None = ("plugin",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        if engine_client is None:  # vLLM's render server, which `required_tasks` keeps us out of
            return
        if multiprocessing.parent_process() is not None:
            # One of several API servers: a kill -9 of their parent would leave them without an engine.
            die_with_parent()
        names = args.served_model_name or [args.model]
        front_end = FrontEnd.from_vllm_config(engine_client.vllm_config)
        calls = EngineCalls(engine_client, lambda: _is_stopping(state))
        state.images_service = ImagesService(calls, front_end, names)


def _is_stopping(state: State) -> bool:
    server = getattr(state, "server", None)  # set by vLLM once uvicorn runs
    return server is not None and server.should_exit
