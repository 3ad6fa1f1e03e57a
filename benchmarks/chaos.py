"""A server whose ranks are killed and stopped again and again, under traffic whose every image is known.

    python -m benchmarks.chaos [--minutes 30] [--every 8] [--clients 16] [--data-parallel-size 1] [--quick] [--out DIR]

One `vllm serve` of the bundled model with two ranks, or with so many engines of two, and a closed loop of so many
clients with mixed requests (half of them guided, 64 to 256 px, 4 to 30 steps). Every `--every` seconds one fault: kill
-9 of a rank, of all, of one twice in a row, of a process that ranks are forked from, or SIGSTOP of a rank, which is
noticed after `--cfg-step-timeout` (5 s here). Printed are the requests, those that failed or came with other bytes than
before the first fault, their latencies, and each process's memory before the first fault and after the last. Exit code
1 if any failed or differ.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable

import aiohttp
import psutil

from benchmarks import traffic
from benchmarks.common import machine, report, start
from benchmarks.endurance import (
    CLIENTS,
    MEMORY_ROW,
    ROW,
    Record,
    Traffic,
    memory_rows,
    processes,
    resident_megabytes,
    serving,
)
from examples.vllm_server import VllmServer

JOBS = 24
FLAGS = ["--cfg-parallel-size", "2", "--cfg-max-restarts", "1000", "--cfg-step-timeout", "5"]


def _ranks(server: VllmServer) -> list[psutil.Process]:
    return [process for title, process in processes(server).items() if title.startswith("CfgRank")]


def kill_one(server: VllmServer, draw: random.Random) -> int:
    draw.choice(_ranks(server)).kill()
    return 1


def kill_all(server: VllmServer, draw: random.Random) -> int:
    ranks = _ranks(server)
    for rank in ranks:
        rank.kill()
    return len(ranks)


def kill_twice(server: VllmServer, draw: random.Random) -> int:
    first = kill_one(server, draw)
    time.sleep(1.5)
    return first + kill_one(server, draw)


def kill_template(server: VllmServer, draw: random.Random) -> int:
    templates = [process for title, process in processes(server).items() if title.startswith("CfgTemplate")]
    draw.choice(templates).kill()
    return 2  # its ranks end with it


def stop_one(server: VllmServer, draw: random.Random) -> int:
    draw.choice(_ranks(server)).send_signal(signal.SIGSTOP)
    return 1


FAULTS: dict[str, Callable[[VllmServer, random.Random], int]] = {
    "kill -9 of a rank": kill_one,
    "kill -9 of all ranks": kill_all,
    "kill -9 twice in a row": kill_twice,
    "kill -9 of the template": kill_template,
    "SIGSTOP of a rank": stop_one,
}


async def harm(server: VllmServer, every: float, until: float) -> tuple[Counter[str], int]:
    """All faults in turn until then; how often each, and how many ranks died or stopped of them."""
    draw, done, ranks = random.Random(1), Counter[str](), 0
    while time.monotonic() + every < until:
        for name, fault in FAULTS.items():
            await asyncio.sleep(every * draw.uniform(0.5, 1.5))
            if time.monotonic() >= until:
                break
            try:
                ranks += await asyncio.to_thread(fault, server, draw)
            except (psutil.NoSuchProcess, IndexError, KeyError):
                continue  # ranks that are just being started have no title yet
            done[name] += 1
    return done, ranks


async def endure(server: VllmServer, seconds: float, every: float, clients: int) -> tuple[Record, Counter[str], int]:
    timeout, connector = aiohttp.ClientTimeout(total=300), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        requests = Traffic(server.url, session, traffic.mixed_jobs(JOBS, seed=9))
        await requests.learn()
        (faults, ranks), record = await asyncio.gather(
            harm(server, every, time.monotonic() + seconds), requests.run(seconds, clients)
        )
        return record, faults, ranks


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--every", type=float, default=8.0, help="seconds between two faults")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--data-parallel-size", type=int, default=1, help="engines, of two ranks each")
    args = parser.parse_args()
    seconds = 60 * (args.minutes or (0.5 if args.quick else 30))
    on = machine()
    with serving([*FLAGS, "--data-parallel-size", str(args.data_parallel_size)]) as server:
        before = resident_megabytes(server)
        record, faults, ranks = asyncio.run(endure(server, seconds, args.every, args.clients))
        after = resident_megabytes(server)
    report("chaos", args.out, on, ("faults", "rank deaths", *ROW), [(sum(faults.values()), ranks, *record.row)])
    report("chaos-faults", args.out, on, ("fault", "times"), list(faults.items()))
    report("chaos-memory", args.out, on, MEMORY_ROW, memory_rows(before, after))
    if record.failures or record.wrong:
        sys.exit(f"failed: {dict(record.failures)}, wrong bytes: {record.wrong}")


if __name__ == "__main__":
    main()
