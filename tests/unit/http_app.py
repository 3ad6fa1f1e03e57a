"""The HTTP application in front of a fake engine, and ways to call it; shared by the tests of the routes."""

import asyncio
import base64
import io
from argparse import Namespace
from types import SimpleNamespace

import httpx
import msgspec
from fastapi import FastAPI
from openai import AsyncOpenAI
from PIL import Image
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.exceptions import QueueOverflowError

from tests.unit.fakes import INFO, LIMITS, answer
from vllm_cfg_plugin.engine.calibration import Calibration
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.entrypoints.endpoint import DiffusionEndpointPlugin
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd
from vllm_cfg_plugin.params import DiffusionRequest

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"


class FakeEngine:
    """`AsyncLLM.encode` as far as the routes use it; `behave` may return a tensor, raise or never return."""

    def __init__(self) -> None:
        self.requests: dict[str, DiffusionRequest] = {}
        self.cancelled: list[str] = []
        self.traces: list[dict[str, str] | None] = []  # that the requests are parts of
        self.behave = None
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_queued_reqs=None, max_num_seqs=32),
            parallel_config=SimpleNamespace(data_parallel_size=1, data_parallel_size_local=1),
            model_config=SimpleNamespace(architectures=["QwenImagePipeline"], dtype="torch.float32"),
            additional_config={},
        )
        self.errored = False
        self.should_keep_api_server_alive = False
        self.queue_room = 1000
        self.is_running = True
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=None))
        self.calibration = Calibration(cost=UNCALIBRATED, token_budget=1000, default_tokens=16)

    async def collective_rpc(self, method):
        """A call of the ranks, whose answers come as vLLM's wire brings them."""
        assert method == "calibrate"
        return [msgspec.to_builtins(self.calibration)] * 2

    def shutdown(self, timeout=None):
        """Its server closes its connection."""

    def check_admission(self, n=1, request_id=None):
        """As `AsyncLLM`'s, with `queue_room` for the queue's limit."""
        if len(self.requests) + n > self.queue_room:
            raise QueueOverflowError

    async def encode(self, prompt, pooling_params, request_id, trace_headers=None):
        assert prompt == {"type": "token", "prompt_token_ids": [0]}
        assert pooling_params.task == "plugin"
        request = msgspec.convert(pooling_params.extra_kwargs, DiffusionRequest)
        self.check_admission(1, request_id)
        self.requests[request_id] = request
        self.traces.append(trace_headers)
        try:
            await asyncio.sleep(0)
            tensor = await self.behave(request) if self.behave else answer(request)
        except asyncio.CancelledError:
            self.cancelled.append(request_id)
            raise
        yield SimpleNamespace(request_id=request_id, outputs=SimpleNamespace(data=tensor), finished=True)


def make_app(engine, monkeypatch, info=INFO, limits=LIMITS):
    """vLLM's application with our routes, as its server would build it for a model of this description."""
    monkeypatch.setattr(FrontEnd, "from_vllm_config", lambda config: FrontEnd(info, limits, len))
    app = FastAPI()
    init_exception_handler(app)
    plugin = DiffusionEndpointPlugin()
    plugin.attach_router(app)
    args = Namespace(
        served_model_name=["emoji", "alias"],
        model="/models/emoji",
        log_error_stack=False,
        host=None,
        port=8000,
        uds=None,
        ssl_keyfile=None,
        api_key=None,
    )
    asyncio.run(plugin.init_state(engine, app.state, args))
    app.state.args = args
    app.state.engine_client = engine
    app.state.server = SimpleNamespace(should_exit=False)
    return app


def send(app, path, **request) -> httpx.Response:
    """POST; `request` as for httpx."""

    async def post():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, **request)

    return asyncio.run(post())


def get(app, url, method="GET", **request) -> httpx.Response:
    """Follow a link; `request` as for httpx."""

    async def follow():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False)) as client:
            return await client.request(method, url, **request)

    return asyncio.run(follow())


def ask(app, use):
    """What `use(client)` returns for OpenAI's own client."""

    async def with_client():
        http_client = httpx.AsyncClient(transport=httpx.ASGITransport(app))
        async with AsyncOpenAI(
            base_url="http://test/v1", api_key="none", max_retries=0, http_client=http_client
        ) as client:
            return await use(client)

    return asyncio.run(with_client())


def disconnect_mid_denoise(app, engine, path, content_type: str, body: bytes) -> None:
    """Send a request and go away as soon as the engine has it."""
    engine.behave = lambda request: asyncio.sleep(60)
    disconnect_when(lambda: bool(engine.requests), app, path, content_type, body)


def disconnect_when(is_time, app, path, content_type: str, body: bytes) -> None:
    """Send a request and go away as soon as `is_time()`."""

    async def run():
        middle = len(body) // 2
        messages = [
            {"type": "http.request", "body": body[:middle], "more_body": True},
            {"type": "http.request", "body": body[middle:]},
        ]

        async def receive():
            if messages:
                return messages.pop(0)
            while not is_time():
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def ignore(message):
            pass

        headers = [(b"content-type", content_type.encode())]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        await app(scope, receive, ignore)
        for _ in range(20):
            await asyncio.sleep(0)

    asyncio.run(run())


def decode(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))
