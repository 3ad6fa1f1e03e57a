"""vLLM's own server application on its own engine, within this process: what `vllm serve` runs, but for its socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from openai import AsyncOpenAI
from vllm.entrypoints.openai.api_server import build_app, build_async_engine_client, init_app_state
from vllm.utils.argparse_utils import FlexibleArgumentParser

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser


@asynccontextmanager
async def served(model: Path, *options: str) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's client of a model, served with these options of the command line."""
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([str(model), *options])
    args.model = args.model_tag  # as the `serve` command does
    async with build_async_engine_client(args) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        transport = httpx.ASGITransport(app)
        async with (
            httpx.AsyncClient(transport=transport, timeout=120) as http_client,
            AsyncOpenAI(base_url="http://app/v1", api_key="none", max_retries=0, http_client=http_client) as client,
        ):
            yield client
