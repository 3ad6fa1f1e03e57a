"""HTTP: `GET /`, a page on which a person tries the model; one file, nothing from elsewhere. Off by `--no-cfg-page`."""

from __future__ import annotations

import json
import secrets
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from msgspec import UNSET

from vllm_cfg_plugin.entrypoints.front_end import FrontEnd

router = APIRouter()

_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page(raw_request: Request) -> HTMLResponse:
    """The page, which knows the model that is served."""
    nonce = secrets.token_urlsafe(16)
    # A text in a script ends at a "<", whatever is said around it.
    info = json.dumps(raw_request.app.state.page_info).replace("<", "\\u003c")
    text = _template().replace("__NONCE__", nonce).replace("__INFO__", info)
    return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY.format(nonce=nonce)})


@cache
def _template() -> str:
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def page_info(front_end: FrontEnd, name: str) -> dict[str, Any]:
    """What the page must know of the model; `defaults` by the ids of its inputs."""
    info, params = front_end.info, front_end.info.default_params
    defaults = {
        "width": params.width,
        "height": params.height,
        "steps": params.num_inference_steps,
        "scale": getattr(params, info.cfg_scale),
        "negative": params.negative_prompt,
    }
    takes_size_of_images = info.default_size is not None
    left_out = ("width", "height") if takes_size_of_images else ()
    return {
        "model": name,
        "task": info.task,
        "produces": info.produces,
        "ranks": front_end.ranks,
        "min_images": info.min_images,
        "max_images": info.max_images,
        "scale_field": info.cfg_scale,
        "defaults": {id: value for id, value in defaults.items() if value not in (UNSET, None) and id not in left_out},
    }
