"""A server under hours of ordinary and of rude traffic: does its memory stay where it was?

    python -m benchmarks.soak [--minutes 30] [--clients 8] [--quick] [--out DIR]

One `vllm serve` of the bundled model with two ranks. A closed loop of so many clients sends mixed requests (half of
them guided, 64 to 256 px, 4 to 30 steps), each of a prompt of its own; beside them one client leaves before its image
is there, again and again, and one sends nonsense. Printed are the requests, those that failed, their latencies, and
each process's resident memory at the start and after each tenth of the time, with caches that are full after some
seconds. Exit code 1 if any failed.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time

import aiohttp

from benchmarks import traffic
from benchmarks.common import Job, machine, report, start
from benchmarks.endurance import ROW, Record, Traffic, resident_megabytes, serving
from examples.vllm_server import VllmServer

# Caches that are full soon: what grows on when they are is no cache.
FLAGS = ["--cfg-parallel-size", "2", "--cfg-cache-bytes", str(2**20)]
SAMPLES = 10
BODIES = ({"prompt": "a", "size": "1x1"}, {"prompt": 1}, {"prompt": "a", "n": 10**9}, {"prompt": "a " * 10**5}, [])


async def leave_early(requests: Traffic, until: float) -> None:
    for number in itertools.count():
        if time.monotonic() > until:
            return
        job = Job(f"a house, left number {number}", side=256, steps=30, guided=True, seed=number)
        await requests.abandon(job, after=0.3 + number % 7 / 5)


async def send_nonsense(url: str, session: aiohttp.ClientSession, until: float) -> None:
    for body in itertools.cycle(BODIES):
        if time.monotonic() > until:
            return
        async with session.post(f"{url}/v1/images/generations", json=body) as response:
            await response.read()
        await asyncio.sleep(0.2)


async def watch_memory(server: VllmServer, seconds: float) -> list[dict[str, float]]:
    samples = [resident_megabytes(server)]
    for _ in range(SAMPLES):
        await asyncio.sleep(seconds / SAMPLES)
        samples.append(resident_megabytes(server))
    return samples


async def endure(server: VllmServer, seconds: float, clients: int) -> tuple[Record, list[dict[str, float]]]:
    timeout, connector = aiohttp.ClientTimeout(total=300), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        requests = Traffic(server.url, session, traffic.mixed_jobs(int(50 * seconds), seed=11))
        until = time.monotonic() + seconds
        record, samples, *_ = await asyncio.gather(
            requests.run(seconds, clients),
            watch_memory(server, seconds),
            leave_early(requests, until),
            send_nonsense(server.url, session, until),
        )
        return record, samples


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--clients", type=int, default=8)
    args = parser.parse_args()
    seconds = 60 * (args.minutes or (0.5 if args.quick else 30))
    on = machine()
    with serving(FLAGS) as server:
        record, samples = asyncio.run(endure(server, seconds, args.clients))
    report("soak", args.out, on, ROW, [record.row])
    minutes = [f"{seconds / 60 * sample / SAMPLES:.1f} min" for sample in range(SAMPLES + 1)]
    rows = [(title, *(sample.get(title, float("nan")) for sample in samples)) for title in samples[0]]
    report("soak-memory", args.out, on, ("RSS in MB", *minutes), rows)
    if record.failures:
        sys.exit(f"failed: {dict(record.failures)}")


if __name__ == "__main__":
    main()
