"""HTTP: `GET /health` in place of vLLM's, which knows only whether the engine's process lives."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_cfg_plugin.config import EngineSettings
from vllm_cfg_plugin.executor.health import address_of, serves

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_ASK_MS = 1000

router = APIRouter()


@router.get("/health", response_class=Response)
async def health(raw_request: Request) -> Response:
    """200 while an engine of this server can serve; 503 while all start their ranks anew, or when one is dead."""
    state = raw_request.app.state
    try:
        await state.engine_client.check_health()
    except EngineDeadError:
        return Response(status_code=HTTPStatus.SERVICE_UNAVAILABLE)
    asked = [asyncio.to_thread(serves, address, _ASK_MS) for address in state.health_addresses]
    answers = await asyncio.gather(*asked)
    is_up = any(answers) or not answers
    return Response(status_code=HTTPStatus.OK if is_up else HTTPStatus.SERVICE_UNAVAILABLE)


def health_addresses(vllm_config: VllmConfig) -> list[str]:
    """Of all engines; none where some run on another machine, which can't be asked."""
    prefix = EngineSettings.from_vllm_config(vllm_config).health_address
    engines = vllm_config.parallel_config.data_parallel_size
    if not prefix or engines != vllm_config.parallel_config.data_parallel_size_local:
        return []
    return [address_of(prefix, engine) for engine in range(engines)]
