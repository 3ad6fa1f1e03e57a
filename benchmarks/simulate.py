"""Many ranks under load, in virtual time: our scheduler and planner against other ways to use the same ranks.

    python -m benchmarks.simulate --out simulated [--quick] [--ranks 2 8 64] [--arrivals poisson bursty huge]
    python -m benchmarks.simulate --validate [--rounds 3]

Scheduler, planner, placement and admission are the engine's own code; only the ranks' work is not done but takes what
a cost model says: --cost, a calibration as JSON, or else one measured now on the bundled model. What such a model
leaves out are --exchange-us and its neighbours; their defaults were measured on one core of a 2-core x86 machine:
`benchmarks/exchange.py` at 64 px; a `StepRunner` whose forwards do nothing, per request that runs and per request that
joins; the engine's cost per step with such forwards.

Contestants; all batch steps with the same code, encode and decode beside the steps and have equal limits per rank:
  ours: one engine of all ranks; "replicas of 2" and so on: engines of so many; "first come first": the shortest request
    that waits does not go first.
  DP replicas: one-rank engines.
  fixed pairs: two-rank engines; rank 0 forwards positive, rank 1 negative branches, and a request without guidance is
    forwarded by both.
  equal shapes: one-rank engines; only requests of one size, steps and scale run together, first come first served.
  whole requests: one-rank engines; requests join only where nobody runs.
Where there are several engines, a request goes to the one with the fewest unanswered ones. Half of the requests are
guided, of 64 to 256 px and 4 to 30 steps; "bursty": --burst per rank at once; "huge": every 50th is of 512 px. At load
1 the forwards, encodes and decodes would fill all ranks if no forward shared a step: batching can serve more.
`--validate` instead plays a short trace on a real two-rank engine and in virtual time, see simulator_check.py.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib
import msgspec

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.common import markdown_table, percentile, start
from benchmarks.contestants import (
    Contestant,
    Machine,
    arrivals,
    contestants,
    mixed_requests,
    serve,
    work_us,
)
from benchmarks.virtual_engine import Served
from benchmarks.virtual_ranks import Overheads
from vllm_cfg_plugin.engine.calibration import Calibration

KINDS = ("poisson", "bursty", "huge")
HUGE_EVERY = 50


@dataclass(frozen=True)
class Result:
    """One contestant under one load; latencies in seconds, from arrival to image.

    Attributes:
        images_s: images per second until the last arrival, of `offered_s` that came.
    """

    arrivals: str
    ranks: int
    load: float
    contestant: str
    offered_s: float
    images_s: float
    mean: float
    p50: float
    p95: float
    p99: float
    guided_mean: float


def run(contestant: Contestant, machine: Machine, kind: str, load: float, args: argparse.Namespace) -> Result:
    """Play one trace; the same one for every contestant."""
    count = max(args.least_requests, args.requests_per_rank * machine.ranks)
    specs = mixed_requests(count, args.seed, HUGE_EVERY if kind == "huge" else 0)
    mean_us = statistics.fmean(work_us(spec, machine.cost) for spec in specs)
    rate = load * machine.ranks * 1e6 / mean_us
    burst = args.burst * machine.ranks if kind == "bursty" else 1
    trace = arrivals(specs, rate, burst, args.seed)
    served = serve(contestant, machine, trace)
    if len(served) != count:
        raise RuntimeError(f"{contestant.name}: {len(served)} of {count} requests were served")
    end = trace[-1].at / 1e6
    latencies = [one.latency for one in served]
    return Result(
        arrivals=kind,
        ranks=machine.ranks,
        load=load,
        contestant=contestant.name,
        offered_s=count / end,
        images_s=sum(one.finished <= end for one in served) / end,
        mean=statistics.fmean(latencies),
        p50=percentile(latencies, 50),
        p95=percentile(latencies, 95),
        p99=percentile(latencies, 99),
        guided_mean=statistics.fmean(one.latency for one in served if _was_guided(one)),
    )


def _was_guided(served: Served) -> bool:
    return served.spec.guidance.scale > 1


def as_table(results: Sequence[Result]) -> str:
    return markdown_table([field.name for field in fields(Result)], [[*asdict(result).values()] for result in results])


def plot(results: Sequence[Result], path: Path, title: str) -> None:
    """Latency percentiles and images per second against load, a line per contestant."""
    by_name = defaultdict(list)
    for result in results:
        by_name[result.contestant].append(result)
    shown = (("p50", "p50, s"), ("p95", "p95, s"), ("p99", "p99, s"), ("images_s", "images/s"))
    figure, axes = pyplot.subplots(1, len(shown), figsize=(18, 4.5), layout="constrained")
    for axis, (name, label) in zip(axes, shown, strict=True):
        for contestant, line in by_name.items():
            style = "-" if contestant.startswith("ours") else "--"
            axis.plot([r.load for r in line], [getattr(r, name) for r in line], style, marker=".", label=contestant)
        axis.set(xlabel="load", title=label, yscale="linear" if name == "images_s" else "log")
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def read_calibration(path: Path | None) -> Calibration:
    if path is not None:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    from benchmarks.simulator_check import calibrate_bundled_model

    return calibrate_bundled_model()


def simulate(calibration: Calibration, args: argparse.Namespace) -> None:
    """All contestants under all loads: tables on the screen, and tables and plots in the folder."""
    overheads = Overheads(args.exchange_us, args.request_us, args.admit_us, args.engine_us)
    every: list[Result] = []
    began = time.monotonic()
    for kind, ranks in itertools.product(args.arrivals, args.ranks):
        budget = args.max_tokens or calibration.token_budget
        machine = Machine(ranks, calibration.cost, overheads, args.max_requests, budget)
        grid = itertools.product(args.loads, contestants(ranks))
        results = [run(contestant, machine, kind, load, args) for load, contestant in grid]
        print(f"{as_table(results)}\n", flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            plot(results, args.out / f"simulate_{kind}_{ranks}_ranks.png", f"{ranks} ranks, {kind} arrivals")
        every += results
    settings = f"{msgspec.json.encode(calibration).decode()}, {overheads}, {args.max_requests} requests per rank"
    if args.out:
        (args.out / "simulate.md").write_text(f"{settings}\n\n{as_table(every)}\n")
    print(f"{len(every)} simulations took {time.monotonic() - began:.0f} s; {settings}")


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--cost", type=Path, help="calibration, JSON")
    parser.add_argument("--validate", action="store_true", help="against a real two-rank engine")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64], help="even numbers")
    parser.add_argument("--arrivals", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.6, 0.9, 1.2])
    parser.add_argument("--requests-per-rank", type=int, default=20)
    parser.add_argument("--least-requests", type=int, default=400)
    parser.add_argument("--burst", type=int, default=3, help="requests per rank in a burst")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-requests", type=int, default=32, help="per rank")
    parser.add_argument("--max-tokens", type=int, help="per rank and step; default: the calibration's budget")
    parser.add_argument("--exchange-us", type=float, default=25.0, help="per step and other rank")
    parser.add_argument("--request-us", type=float, default=80.0, help="per step and running request, on every rank")
    parser.add_argument("--admit-us", type=float, default=300.0, help="per request that joins, on every rank")
    parser.add_argument("--engine-us", type=float, default=200.0, help="from reports to the next plan")
    args = parser.parse_args()
    if args.quick:
        args.ranks, args.loads, args.least_requests, args.requests_per_rank = [2, 8], [0.4, 1.0], 200, 20
    if any(ranks < 2 or ranks % 2 for ranks in args.ranks):
        parser.error(f"--ranks {args.ranks}: give even numbers from 2 up, because fixed pairs need two ranks each")
    if args.validate:
        from benchmarks.simulator_check import validate

        validate(args)
    else:
        simulate(read_calibration(args.cost), args)


if __name__ == "__main__":
    main()
