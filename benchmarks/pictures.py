"""Draws docs/dashboard.png and docs/trace.png from a real server under a few minutes of mixed traffic.

    python -m benchmarks.pictures [--seconds 180] [--prometheus prometheus] --out docs

A Prometheus (Debian's package `prometheus`, or the binary that --prometheus names) scrapes the server and answers the
queries of examples/grafana_dashboard.json; the trace is that of --cfg-trace. The traffic: guided and unguided requests
of 64 to 192 px that come at random, every fourth of them streamed with previews; some are refused, some clients leave,
half-way 30 come at once and a rank is killed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import aiohttp
import psutil
import requests

from benchmarks.common import EMOJI, machine, start
from benchmarks.draw import Query, Series, draw_dashboard, draw_trace, read_trace
from benchmarks.systems import START_TIMEOUT_S, request_body
from benchmarks.traffic import mixed_jobs
from examples.vllm_server import HOST, VllmServer, free_port

DASHBOARD = Path(__file__).parents[1] / "examples/grafana_dashboard.json"
SCRAPE_S = 2
FLAGS = ["--cfg-parallel-size", "2", "--served-model-name", "emoji", "--max-num-seqs", "12"]
PACE_S = 0.4  # mean time between two requests
BURST = 30


@contextmanager
def prometheus(binary: str, server: str, folder: Path) -> Iterator[str]:
    """The address of a Prometheus that scrapes a server, until the end of the block."""
    config = {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s"}
    scrape = {"job_name": "vllm", "static_configs": [{"targets": [server.removeprefix("http://")]}]}
    (folder / "prometheus.yml").write_text(json.dumps({"global": config, "scrape_configs": [scrape]}))
    address = f"{HOST}:{free_port()}"
    options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([binary, *options, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def answers_of(address: str, began: float, ended: float) -> Query:
    """Answers PromQL from a Prometheus, over this time; `$__rate_interval` as Grafana has it."""

    def query(expression: str) -> list[Series]:
        asked = {
            "query": expression.replace("$__rate_interval", f"{4 * SCRAPE_S}s"),
            "start": began,
            "end": ended,
            "step": SCRAPE_S,
        }
        answer = requests.get(f"{address}/api/v1/query_range", params=asked, timeout=30).json()
        if answer["status"] != "success":
            raise RuntimeError(f"{expression}: {answer}")
        return [
            Series(found["metric"], [(float(at) - began, float(value)) for at, value in found["values"]])
            for found in answer["data"]["result"]
        ]

    return query


async def traffic(server: VllmServer, seconds: float) -> None:
    """Clients of all kinds, for so long."""
    draw, tasks = random.Random(0), []
    jobs = [job for job in mixed_jobs(10_000, seed=1) if job.side < 256]
    ended = time.monotonic() + seconds
    is_calm = True
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def ask(**changes: object) -> None:
            body = {**request_body(jobs.pop()), **changes}
            patience = 0.3 if draw.random() < 0.05 else None  # of a client that leaves
            with suppress(TimeoutError, aiohttp.ClientError):
                async with asyncio.timeout(patience), session.post(url, json=body) as response:
                    await response.read()

        url = f"{server.url}/v1/images/generations"
        while (left := ended - time.monotonic()) > 0:
            if is_calm and left < seconds / 2:
                is_calm = False
                tasks += [asyncio.create_task(ask()) for _ in range(BURST)]
                _kill_a_rank(server)
            changes = {"stream": True, "partial_images": 3} if draw.random() < 0.25 else {}
            changes |= {"n": 11} if draw.random() < 0.1 else {}  # which is refused
            tasks.append(asyncio.create_task(ask(**changes)))
            await asyncio.sleep(draw.expovariate(1 / PACE_S))
        await asyncio.gather(*tasks)


def _kill_a_rank(server: VllmServer) -> None:
    for process in psutil.Process(server.process.pid).children(recursive=True):
        if re.search(r"CfgRank1", " ".join(process.cmdline())):
            process.kill()


async def mixed_batch(server: VllmServer) -> None:
    """Ten requests at once, two of them streamed: what the picture of a trace shows."""
    async with aiohttp.ClientSession() as session:

        async def ask(number: int) -> None:
            body = request_body(batch[number])
            if number % 5 == 0:
                body |= {"stream": True, "partial_images": 2}
            async with session.post(f"{server.url}/v1/images/generations", json=body) as response:
                await response.read()

        batch = [job for job in mixed_jobs(40, seed=7) if job.side < 256 and job.steps < 20][:10]
        await asyncio.gather(*(ask(number) for number in range(len(batch))))


def main() -> None:
    parser: argparse.ArgumentParser = start(__doc__)
    parser.add_argument("--seconds", type=int, default=180, help="of traffic (default 180)")
    parser.add_argument("--prometheus", default="prometheus", help="the binary (default: that in PATH)")
    parser.set_defaults(out=Path("benchmark_results"))
    args = parser.parse_args()
    seconds = 20 if args.quick else args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trace = folder / "trace.json"
        server = stack.enter_context(VllmServer(EMOJI, [*FLAGS, "--cfg-trace", str(trace)], folder / "server.log"))
        server.wait_ready(START_TIMEOUT_S)
        asyncio.run(mixed_batch(server))  # warms up
        time.sleep(1)
        before = len(read_trace(trace)[1])
        asyncio.run(mixed_batch(server))
        time.sleep(1)  # an idle engine writes what it has
        lanes, spans = read_trace(trace)
        draw_trace(lanes, spans[before:], args.out / "trace.png")
        address = stack.enter_context(prometheus(args.prometheus, server.url, folder))
        began = time.time()
        asyncio.run(traffic(server, seconds))
        time.sleep(4 * SCRAPE_S)
        draw_dashboard(
            json.loads(DASHBOARD.read_text()), answers_of(address, began, time.time()), args.out / "dashboard.png"
        )
    print(f"drew {args.out}/trace.png and {args.out}/dashboard.png")


if __name__ == "__main__":
    main()
