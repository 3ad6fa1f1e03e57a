"""Work-arounds for what vLLM's API server answers."""

from __future__ import annotations

import os
from typing import Any


def explain_unauthorized() -> None:
    """Have vLLM's check of `--api-key` answer with OpenAI's error object.

    Symptom: {"error": "Unauthorized"}, which OpenAI's clients can't take apart. Cause: vLLM writes it so. Exit
    condition: it writes an object.
    """
    from starlette.responses import JSONResponse
    from vllm.entrypoints.serve.middleware import authenticate

    message = "the API key is wrong or missing: send one of those of --api-key as a bearer token"
    body = {"error": {"message": message, "type": "AuthenticationError", "param": None, "code": 401}}
    authenticate.JSONResponse = lambda content, status_code: JSONResponse(body, status_code)  # type: ignore[misc, assignment]


def know_own_port() -> None:
    """Keep an API server that stops from looking at the process of another one of the same `vllm serve`.

    Symptom: with `--api-server-count 2` each start ends with "port 8000 is used by process ...", and now and then with
    psutil's ZombieProcess or NoSuchProcess as a traceback. Cause: the servers share their port, and one that stops asks
    who else has it and for that process's command line, which may end meanwhile. Exit condition: vLLM leaves its own
    processes out.
    """
    import psutil
    from vllm.entrypoints.launchers import launcher

    find = launcher.find_process_using_port
    if getattr(find, "knows_own", False):
        return

    def find_stranger(port: int) -> psutil.Process | None:
        try:
            process = find(port)
            is_own = process is not None and process.ppid() == os.getppid()
            command = process.cmdline() if process is not None else []
        except psutil.Error:  # it has ended
            return None
        if process is None or is_own:
            return None
        process.cmdline = lambda: command  # type: ignore[method-assign]
        return process

    find_stranger.knows_own = True  # type: ignore[attr-defined]
    launcher.find_process_using_port = find_stranger


def remove_dead_routes(app: Any) -> None:
    """Take out routes of vLLM's that can do nothing for a diffusion pipeline.

    Symptom: /tokenize, /pooling and others are described in /docs and answer with errors. Cause: vLLM adds them for
    every model of the pooling runner. Exit condition: it asks what the model can do.
    """
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in _DEAD_ROUTES]


_DEAD_ROUTES = frozenset(
    (
        *(
            "/tokenize",
            "/detokenize",
            "/pooling",
            "/invocations",
            "/kv_event_sources",
            "/v1/systemone",
            "/v1/decisions",
        ),
        *("/v1/embeddings", "/v2/embed", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    )
)
