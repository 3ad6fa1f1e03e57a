"""The systems that serving.py compares, behind one method: servers over HTTP, and diffusers behind a queue."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import aiohttp
import psutil

from benchmarks import traffic
from benchmarks.common import CORES, NEGATIVE, SCALE, Job
from benchmarks.rivals import Rival
from examples.vllm_server import VllmServer

START_TIMEOUT_S = 180


class System(Protocol):
    async def run(self, job: Job) -> None:
        """Return when the job's image is there."""


class Servers:
    """Servers that share the requests; each goes to the one with fewest in flight."""

    def __init__(self, urls: Sequence[str], session: aiohttp.ClientSession) -> None:
        self._in_flight = dict.fromkeys(urls, 0)
        self._session = session

    async def run(self, job: Job) -> None:
        url = min(self._in_flight, key=lambda url: self._in_flight[url])
        self._in_flight[url] += 1
        try:
            async with self._session.post(f"{url}/v1/images/generations", json=request_body(job)) as response:
                answer = await response.read()
                if response.status != 200:
                    raise RuntimeError(f"{url} answered {response.status}: {answer.decode()}")
        finally:
            self._in_flight[url] -= 1


def request_body(job: Job) -> dict[str, str | int | float | None]:
    return {
        "prompt": job.prompt,
        "size": f"{job.side}x{job.side}",
        "num_inference_steps": job.steps,
        "seed": job.seed,
        "true_cfg_scale": SCALE if job.guided else 1.0,
        "negative_prompt": NEGATIVE if job.guided else None,
    }


class DiffusersQueue:
    """First come, first served, `most` equal requests at a time."""

    def __init__(self, rival: Rival, most: int) -> None:
        self._rival = rival
        self._most = most
        self._waiting: list[Job] = []
        self._done: dict[Job, asyncio.Future[None]] = {}
        self._worker: asyncio.Task[None] | None = None

    async def run(self, job: Job) -> None:
        self._waiting.append(job)
        self._done[job] = asyncio.get_running_loop().create_future()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        await self._done[job]

    async def _work(self) -> None:
        while self._waiting:
            batch = traffic.take_batch(self._waiting, self._most)
            try:
                await asyncio.to_thread(self._rival.run, batch)
            except RuntimeError as error:
                for job in batch:
                    self._done.pop(job).set_exception(error)
            else:
                for job in batch:
                    self._done.pop(job).set_result(None)


def pin_ranks(server: VllmServer, cores: Sequence[int]) -> None:
    """Bind the server's rank r to the r-th of these cores, by the titles that the rank processes carry.

    Raises:
        LookupError: no process has such a title.
    """
    found = 0
    for process in psutil.Process(server.process.pid).children(recursive=True):
        if rank := re.search(r"CfgRank(\d+)", " ".join(process.cmdline())):
            found += 1
            for thread in process.threads():
                psutil.Process(thread.id).cpu_affinity([cores[int(rank[1]) % len(cores)]])
    if not found:
        raise LookupError("the server has no process with CfgRank in its title")


def start_servers(stack: ExitStack, model: str, logs: Path) -> dict[str, list[str]]:
    """Start cfg2 and dp2; system -> its servers' URLs."""
    options = {"cfg2": (2, CORES), "dp2-a": (1, CORES[:1]), "dp2-b": (1, CORES[1:])}
    urls: dict[str, list[str]] = {}
    for name, (ranks, cores) in options.items():
        flags = ["--cfg-parallel-size", str(ranks)]
        server = stack.enter_context(VllmServer(model, flags, logs / f"{name}.log"))
        server.wait_ready(START_TIMEOUT_S)
        pin_ranks(server, cores)
        urls.setdefault(name.partition("-")[0], []).append(server.url)
    return urls
