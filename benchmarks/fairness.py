"""Small requests alone, beside a huge one, and after large decodes; how soon an aborted huge one is gone.

    python -m benchmarks.fairness [--model emoji] [--requests 30] [--rounds 3] [--out DIR]

One server with two ranks; one client that asks for a small image, waits for it and asks for the next. Each round:
alone; while a request of 2048x2048 and 200 steps is there, whose client then leaves; after three requests of one step
and 1, 2 and 3 megapixels came at once. A request is gone when the server counts it no more and its ranks compute
nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import psutil

from benchmarks.common import CORES, Job, machine, model_folder, percentile, report, start
from benchmarks.systems import START_TIMEOUT_S, Servers, pin_ranks
from examples.vllm_server import VllmServer

HUGE = (2048, 200)  # side and steps
DECODED_SIDES = (1024, 1440, 1728)
SMALL_STEPS = 10
FLAGS = ["--cfg-parallel-size", "2", "--max-request-seconds", "1000000"]  # by default the huge one is refused
HEAD_START_S = 5.0
IDLE_SHARE = 0.05  # of a core, by all ranks, of a server that has nothing to do
LEAST_S = 1.0

COLUMNS = ("small requests", "side", "p50 s", "p95 s", "p95 / alone")


class Client:
    """Asks a server for images."""

    def __init__(self, url: str, session: aiohttp.ClientSession, server: VllmServer) -> None:
        self._url = url
        self._session = session
        self._server = Servers([url], session)
        self._ranks = [
            process
            for process in psutil.Process(server.process.pid).children(recursive=True)
            if "CfgRank" in " ".join(process.cmdline())
        ]
        self._prompts = 0

    async def ask(self, side: int, steps: int, guided: bool = True) -> float:
        """Seconds until an image is there; its prompt is new."""
        self._prompts += 1
        began = time.perf_counter()
        await self._server.run(Job(f"a red apple, number {self._prompts}", side, steps, guided, seed=self._prompts))
        return time.perf_counter() - began

    async def ask_in_turn(self, side: int, count: int) -> list[float]:
        return [await self.ask(side, SMALL_STEPS) for _ in range(count)]

    @asynccontextmanager
    async def beside(self, *asked: tuple[int, int]) -> AsyncIterator[None]:
        """Requests of these sides and steps are at work inside; their clients leave at the end."""
        tasks = [asyncio.create_task(self.ask(side, steps)) for side, steps in asked]
        await asyncio.sleep(HEAD_START_S)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def gone(self) -> tuple[float, float]:
        """Seconds until the server counts no running request, and until its ranks compute nothing."""
        began = time.perf_counter()
        while await self.running():
            await asyncio.sleep(0.05)
        counted = time.perf_counter() - began
        before = self._cpu_seconds()
        while True:
            await asyncio.sleep(LEAST_S)
            now = self._cpu_seconds()
            if now - before < IDLE_SHARE * LEAST_S:
                return counted, time.perf_counter() - began - LEAST_S
            before = now

    async def running(self) -> float:
        """Requests that the server counts as running."""
        async with self._session.get(f"{self._url}/metrics") as response:
            found = re.search(r"^vllm:num_requests_running{.*} (\S+)$", await response.text(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def _cpu_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._ranks)


async def measure(client: Client, requests: int, rounds: int) -> tuple[list[list[object]], list[tuple[float, float]]]:
    """A row for each situation, and the seconds until the huge request was gone in each round."""
    taken: dict[tuple[str, int], list[float]] = {}
    gone = []
    for side in (64, 256):
        await client.ask(side, SMALL_STEPS)
    for _ in range(rounds):
        for side in (64, 256):
            taken.setdefault(("alone", side), []).extend(await client.ask_in_turn(side, requests))
        async with client.beside(HUGE):
            for side in (64, 256):
                name = f"beside {HUGE[0]}x{HUGE[0]}, {HUGE[1]} steps"
                taken.setdefault((name, side), []).extend(await client.ask_in_turn(side, requests))
            if not await client.running():
                raise RuntimeError(f"{name}: it was done before the small requests were, so these figures say nothing")
        gone.append(await client.gone())
        async with client.beside(*((side, 1) for side in DECODED_SIDES)):
            for side in (64, 256):
                name = "after 1 step of 1, 2 and 3 MP"
                taken.setdefault((name, side), []).extend(await client.ask_in_turn(side, requests))
        await client.gone()
    rows: list[list[object]] = []
    for (name, side), seconds in taken.items():
        p95 = percentile(seconds, 95)
        rows.append([name, side, percentile(seconds, 50), p95, p95 / percentile(taken["alone", side], 95)])
    return rows, gone


async def run(args: argparse.Namespace) -> tuple[list[list[object]], list[tuple[float, float]]]:
    requests = args.requests or (4 if args.quick else 30)
    rounds = args.rounds or (1 if args.quick else 3)
    timeout = aiohttp.ClientTimeout(total=None)
    with ExitStack() as stack:
        model, logs = stack.enter_context(model_folder(args.model)), stack.enter_context(tempfile.TemporaryDirectory())
        server = stack.enter_context(VllmServer(model, FLAGS, Path(logs) / "server.log"))
        server.wait_ready(START_TIMEOUT_S)
        pin_ranks(server, CORES)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            return await measure(Client(server.url, session, server), requests, rounds)


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--model", default="emoji", help="emoji, light or mid (default emoji)")
    parser.add_argument("--requests", type=int, help="small ones of a size and situation in a round")
    args = parser.parse_args()
    on = machine()
    rows, gone = asyncio.run(run(args))
    report("fairness", args.out, on, COLUMNS, rows)
    for counted, idle in gone:
        print(f"the huge request's client left: not counted after {counted:.2f} s, ranks idle after {idle:.1f} s")


if __name__ == "__main__":
    main()
