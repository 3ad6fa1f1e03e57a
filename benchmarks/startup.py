"""Time from typing `vllm serve MODEL --cfg-parallel-size 2` until GET /health answers 200, and where it goes.

    python -m benchmarks.startup [--model examples/models/emoji] [--starts 5] [-- further flags of vllm serve]

Phases end where the server's log or its processes' start times say so; all but the load are polled five times a second.
"CPU" is the processor time of all its processes together: on a busy machine it says more than the wall clock.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from examples.vllm_server import VllmServer

TIMEOUT_S = 300

Phases = dict[str, float]  # seconds, in the order of the table's columns


def measure_start(model: str, options: list[str], log_path: Path) -> Phases:
    """Start a server, wait until it is ready, stop it."""
    marks = {
        "command line read": r"version \d",
        "pipeline loaded": r"Loaded \S+ in",
        "engine ready": r"Serving ",
    }
    seen: dict[str, float] = {}

    def look() -> None:
        log = log_path.read_text(errors="replace")
        for name, pattern in marks.items():
            if name not in seen and re.search(pattern, log):
                seen[name] = time.time() - typed

    typed = time.time()
    with VllmServer(model, options, log_path) as server:
        server.wait_ready(TIMEOUT_S, on_wait=look)
        ready = time.time() - typed
        look()
        processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
        engine_starts = _first_start(processes, "EngineCore") - processes[0].create_time()
        cpu = sum(_cpu_seconds(process) for process in processes)
    loading = float(re.findall(r"Loaded \S+ in ([\d.]+) s", log_path.read_text(errors="replace"))[0])
    return {
        "ready": ready,
        "CPU": cpu,
        "imports, command line": seen["command line read"],
        "engine config": engine_starts - seen["command line read"],
        "engine's imports": seen["pipeline loaded"] - loading - engine_starts,
        "model load": loading,
        "ranks start": seen["engine ready"] - seen["pipeline loaded"],
        "API server": ready - seen["engine ready"],
    }


def _first_start(processes: list[psutil.Process], title: str) -> float:
    """When the first process of this title was started, in seconds since the epoch."""
    return min(process.create_time() for process in processes if title in " ".join(process.cmdline()))


def _cpu_seconds(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return times.user + times.system
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/models/emoji", help="a diffusers folder")
    parser.add_argument("--starts", type=int, default=5, help="measured starts (default 5), after one that warms up")
    parser.add_argument("flags", nargs="*", help="flags of vllm serve (default --cfg-parallel-size 2)")
    args = parser.parse_args()
    starts = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.starts + 1):
            phases = measure_start(args.model, args.flags or ["--cfg-parallel-size", "2"], Path(folder) / "server.log")
            if number == 0:
                print(f"| start | {' | '.join(phases)} |\n|{'---|' * (len(phases) + 1)}", flush=True)
            else:
                starts.append(phases)
                _print_row(str(number), phases)
    _print_row("median", {name: statistics.median(phases[name] for phases in starts) for name in starts[0]})
    _print_row("least", {name: min(phases[name] for phases in starts) for name in starts[0]})


def _print_row(name: str, phases: Phases) -> None:
    print(f"| {name} | {' | '.join(f'{seconds:.1f}' for seconds in phases.values())} |", flush=True)


if __name__ == "__main__":
    main()
