"""HTTP: `GET /v1/models` and `/v1/models/{id}`, in place of vLLM's list, which speaks of contexts and permissions."""

from __future__ import annotations

import time
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import State

from vllm_cfg_plugin.entrypoints.error_route import OpenAIErrorRoute
from vllm_cfg_plugin.entrypoints.front_end import check_model_name

router = APIRouter(route_class=OpenAIErrorRoute)
_STARTED = int(time.time())


class Model(BaseModel):
    """One of the names under which the server's model is known, or an adapter of it.

    `root` is the file of an adapter, `parent` the model's own name.
    """

    id: str
    root: str | None = None
    parent: str | None = None
    object: Literal["model"] = "model"
    created: int = _STARTED
    owned_by: str = "vllm_cfg_plugin"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/v1/models", response_model=ModelList)
async def list_models(raw_request: Request) -> JSONResponse:
    """The served names, then the adapters."""
    models = ModelList(data=[*_models(raw_request.app.state).values()])
    return JSONResponse(models.model_dump(exclude_none=True))


@router.get("/v1/models/{model:path}", response_model=Model)
async def retrieve_model(model: str, raw_request: Request) -> JSONResponse:
    """One of them; 404 for others."""
    models = _models(raw_request.app.state)
    check_model_name(model, [*models])
    return JSONResponse(models[model].model_dump(exclude_none=True))


def _models(state: State) -> dict[str, Model]:
    names, adapters = state.model_names, state.adapters.named.values()
    models = [Model(id=name) for name in names]
    models += [Model(id=lora.name, root=lora.path, parent=names[0]) for lora in adapters]
    return {model.id: model for model in models}
