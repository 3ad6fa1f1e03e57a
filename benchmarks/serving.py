"""Mixed traffic through HTTP: one server with two cfg ranks, two independent one-rank servers, and diffusers.

    python -m benchmarks.serving [--quick] [--model mid] [--requests 40] [--rounds 3] [--load 0.7] [--clients 12]
                                 [--slo 4] [--system cfg2 --system dp2] [--out DIR]

Half of the requests are guided, of 64 to 256 px and 4 to 30 steps. Two traces are replayed against every system, a
block of one trace on each system before the next block begins: a closed loop of so many clients, which gives images
per second, and Poisson arrivals at `--load` times what dp2 reached in the closed loop, which give latencies. Latency
counts from the time at which a request was to arrive. Its objective (SLO) is `--slo` times what the same request takes
alone on a one-rank server. The first thing a system gets is a warm-up that is not counted.

cfg2: one `vllm serve`, two ranks. dp2: two one-rank servers; a request goes to the one with fewest in flight.
diffusers: its pipeline with two threads, one request after the other. diffusers-batch: the same, with all waiting
requests that agree in size, steps and guidance in one list of prompts. These two are a queue in this process: they
have no HTTP and no PNG to pay for. All systems have the same two cores, and so has the client.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import traffic
from benchmarks.common import Job, machine, model_folder, percentile, report, start
from benchmarks.rivals import diffusers_process
from benchmarks.systems import DiffusersQueue, Servers, System, start_servers
from benchmarks.traffic import Arrival, Latency

DIFFUSERS_BATCH = 8  # prompts in one list; beyond it this CPU gains nothing
WARM_UP_STEPS = 4
BASE = "dp2"  # what the others are compared with
SYSTEMS = ("cfg2", BASE, "diffusers", "diffusers-batch")
COLUMNS = (
    "system",
    "images/s, closed loop",
    f"against {BASE}",
    "guided p50 s",
    f"against {BASE} (guided p50)",
    "guided p95",
    "guided p99",
    "all p50",
    "all p95",
    "all p99",
    "within SLO",
)


async def replay(system: System, arrivals: Sequence[Arrival]) -> list[Latency]:
    """Open loop: every request comes at its time, whatever became of the others."""
    began = time.perf_counter()

    async def one(arrival: Arrival) -> Latency:
        await asyncio.sleep(arrival.at - (time.perf_counter() - began))
        await system.run(arrival.job)
        return Latency(arrival.job, time.perf_counter() - began - arrival.at)

    return await asyncio.gather(*(one(arrival) for arrival in arrivals))


async def saturate(system: System, jobs: Sequence[Job], clients: int) -> float:
    """Closed loop: every client takes the next job when its last one is done; seconds in all."""
    left = iter(jobs)

    async def client() -> None:
        for job in left:
            await system.run(job)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began


async def in_blocks(
    systems: dict[str, System], rounds: int, run: Callable[[System, int], Awaitable[object]]
) -> dict[str, list]:
    """`run(system, block)` of every system, block by block."""
    taken: dict[str, list] = {name: [] for name in systems}
    for block in range(rounds):
        for name, system in systems.items():
            taken[name].append(await run(system, block))
    return taken


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one system: images per second of the closed loop, the open loop's latencies and their summary."""

    rate: float
    latencies: list[Latency]
    summary: traffic.Summary


async def measure(
    systems: dict[str, System], requests: int, rounds: int, load: float, clients: int, slo: float
) -> dict[str, Measured]:
    """Warm-up, closed loop, open loop; see the module's text."""
    alone = {
        name: [await _alone(system, job) for job in traffic.one_of_each(WARM_UP_STEPS)]
        for name, system in systems.items()
    }
    step_s = traffic.step_seconds(alone["dp2"])
    seconds = await in_blocks(
        systems, rounds, lambda system, block: saturate(system, traffic.mixed_jobs(requests, 100 + block), clients)
    )
    rates = {name: rounds * requests / sum(taken) for name, taken in seconds.items()}
    blocks = [
        traffic.poisson(traffic.mixed_jobs(requests, 200 + block), load * rates["dp2"], block)
        for block in range(rounds)
    ]
    replayed = await in_blocks(systems, rounds, lambda system, block: replay(system, blocks[block]))
    latencies = {name: [latency for block in taken for latency in block] for name, taken in replayed.items()}
    return {
        name: Measured(rates[name], taken, traffic.summarise(taken, step_s, slo)) for name, taken in latencies.items()
    }


async def _alone(system: System, job: Job) -> Latency:
    began = time.perf_counter()
    await system.run(job)
    return Latency(job, time.perf_counter() - began)


@asynccontextmanager
async def open_systems(model: str) -> AsyncIterator[dict[str, System]]:
    """Start everything; diffusers first, because it is forked."""
    with ExitStack() as stack:
        rival = stack.enter_context(diffusers_process(model, threads=2))
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-logs-")))
        urls = start_servers(stack, model, logs)
        timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            servers = {name: Servers(of_system, session) for name, of_system in urls.items()}
            queues = {"diffusers": DiffusersQueue(rival, 1), "diffusers-batch": DiffusersQueue(rival, DIFFUSERS_BATCH)}
            yield {**servers, **queues}


def table(measured: Mapping[str, Measured]) -> list[tuple[Any, ...]]:
    base = measured[BASE]
    return [
        (
            name,
            m.rate,
            m.rate / base.rate,
            m.summary.guided_p50,
            m.summary.guided_p50 / base.summary.guided_p50,
            m.summary.guided_p95,
            m.summary.guided_p99,
            m.summary.p50,
            m.summary.p95,
            m.summary.p99,
            m.summary.slo_share,
        )
        for name, m in measured.items()
    ]


def save(folder: Path, measured: Mapping[str, Measured]) -> None:
    """Every latency, and a plot: images per second, and how guided latencies are distributed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    raw = {name: dataclasses.asdict(m) for name, m in measured.items()}
    (folder / "serving_latencies.json").write_text(json.dumps(raw))
    figure, (rates, latencies) = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    rates.bar(list(measured), [m.rate for m in measured.values()])
    rates.set_ylabel("images/s, closed loop")
    shares = range(101)
    for name, m in measured.items():
        guided = [latency.seconds for latency in m.latencies if latency.job.guided]
        latencies.plot([percentile(guided, share) for share in shares], shares, label=name)
    latencies.set(xscale="log", xlabel="latency of guided requests, s", ylabel="% of them within it")
    latencies.legend()
    figure.savefig(folder / "serving.png", dpi=130)
    pyplot.close(figure)


async def run(args: Any) -> dict[str, Measured]:
    requests = args.requests or (12 if args.quick else 40)
    rounds = args.rounds or (1 if args.quick else 3)
    with model_folder(args.model) as model:
        async with open_systems(model) as systems:
            chosen = {name: systems[name] for name in SYSTEMS if name == BASE or name in (args.system or SYSTEMS)}
            return await measure(chosen, requests, rounds, args.load, args.clients, args.slo)


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--model", default="mid", help="emoji, light or mid (default mid)")
    parser.add_argument("--requests", type=int, help="of a block; the default depends on --quick")
    parser.add_argument("--load", type=float, default=0.7, help=f"arrivals, as a share of {BASE}'s images/s (0.7)")
    parser.add_argument("--clients", type=int, default=12, help="of the closed loop (default 12)")
    parser.add_argument("--slo", type=float, default=4.0, help="objective, in times of being alone (default 4)")
    parser.add_argument("--system", action="append", choices=SYSTEMS, help=f"beside {BASE}; repeatable (default all)")
    args = parser.parse_args()
    on = machine()
    measured = asyncio.run(run(args))
    report("serving", args.out, on, COLUMNS, table(measured))
    if args.out:
        save(args.out, measured)


if __name__ == "__main__":
    main()
