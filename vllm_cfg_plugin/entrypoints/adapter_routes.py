"""HTTP: `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, in place of vLLM's, with its fields and answers.

As in vLLM they are there where VLLM_ALLOW_RUNTIME_LORA_UPDATING is set: whoever may call them names files of this
machine.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from vllm_cfg_plugin.entrypoints.adapters import Adapters, unusable
from vllm_cfg_plugin.entrypoints.error_route import OpenAIErrorRoute
from vllm_cfg_plugin.errors import InvalidRequestError

router = APIRouter(route_class=OpenAIErrorRoute)


class LoadLoRA(BaseModel):
    """Body of POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadLoRA(BaseModel):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadLoRA, raw_request: Request) -> PlainTextResponse:
    """Have all ranks read an adapter, which requests may name from then on."""
    state = raw_request.app.state
    adapters: Adapters = state.adapters
    if body.lora_name in state.model_names:
        raise InvalidRequestError("lora_name", body.lora_name, "another name than the model's own")
    lora = adapters.find(body.lora_name, body.lora_path, body.load_inplace)
    # In a worker, where it says why not.
    problems = await state.engine_client.collective_rpc("add_adapter", args=(lora.name, lora.path, lora.key))
    if problems[0]:
        raise unusable(body.lora_path, problems[0])
    adapters.add(lora)
    return PlainTextResponse(f"Success: LoRA adapter '{lora.name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadLoRA, raw_request: Request) -> PlainTextResponse:
    """Have no more requests name an adapter; those that carry it end with it."""
    adapters: Adapters = raw_request.app.state.adapters
    adapters.remove(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
