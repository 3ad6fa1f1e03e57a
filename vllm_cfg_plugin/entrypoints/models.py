"""HTTP: `GET /v1/models` and `/v1/models/{id}`, in place of vLLM's list, which speaks of contexts and permissions."""

from __future__ import annotations

import time
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from vllm_cfg_plugin.entrypoints.error_route import OpenAIErrorRoute
from vllm_cfg_plugin.entrypoints.front_end import check_model_name

router = APIRouter(route_class=OpenAIErrorRoute)
_STARTED = int(time.time())


class Model(BaseModel):
    """One of the names under which the server's model is known."""

    id: str
    object: Literal["model"] = "model"
    created: int = _STARTED
    owned_by: str = "vllm_cfg_plugin"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/v1/models", response_model=ModelList)
async def list_models(raw_request: Request) -> JSONResponse:
    """The served names."""
    names = raw_request.app.state.model_names
    return JSONResponse(ModelList(data=[Model(id=name) for name in names]).model_dump())


@router.get("/v1/models/{model:path}", response_model=Model)
async def retrieve_model(model: str, raw_request: Request) -> JSONResponse:
    """One of them; 404 for others."""
    check_model_name(model, raw_request.app.state.model_names)
    return JSONResponse(Model(id=model).model_dump())
