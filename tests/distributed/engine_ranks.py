"""Engine steps on real gloo ranks without a server: every rank drives its own copy of the deterministic scheduler."""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist
from vllm.distributed import init_distributed_environment
from vllm.utils.network_utils import get_open_port

from tests.families import load
from tests.toy_pipeline import InlineSideWork, toy_vllm_config
from tests.unit.test_scheduler import vllm_request
from vllm_cfg_plugin.distributed import parallel_state
from vllm_cfg_plugin.engine.plan import SideReport, StepReport
from vllm_cfg_plugin.engine.scheduler import StepScheduler
from vllm_cfg_plugin.engine.step_result import merge_reports
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline
from vllm_cfg_plugin.worker.runner import StepRunner
from vllm_cfg_plugin.worker.worker import make_all_gather

Scripts = dict[str, list[tuple[int, DiffusionRequest]]]  # name -> (engine step at which it joins, request)
Traces = dict[str, dict[int, list[torch.Tensor]]]  # name -> seed -> latents after each step


# Called with (rank, the branches of a forward) before every forward; raises to make that rank's forward fail.
Fault = Callable[[int, list[BranchInput]], None]


def no_fault(rank: int, branches: list[BranchInput]) -> None:
    """All forwards succeed."""


class RecordingRunner(StepRunner):
    """Keeps every request's latents after every step."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.trace: dict[int, list[torch.Tensor]] = defaultdict(list)

    def _advance(self, state, predictions):
        super()._advance(state, predictions)
        self.trace[state.request.seed].append(state.latents.clone())


def run_ranks(
    model: Path,
    ranks: int,
    scripts: Scripts,
    folder: Path,
    fault: Fault = no_fault,
    load: Callable[[Path], EnginePipeline] = load,
) -> list[Traces]:
    """Run all scripts on `ranks` forked processes; returns every rank's traces."""
    outs = [folder / f"traces-{rank}.pt" for rank in range(ranks)]
    port = get_open_port()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_run_rank, args=(model, ranks, rank, port, scripts, out, fault, load))
        for rank, out in enumerate(outs)
    ]
    for process in processes:
        process.start()
    _join(processes)
    return [torch.load(out) for out in outs]


def _join(processes: list[multiprocessing.Process]) -> None:
    """Wait for all ranks; where one fails, the others may wait for it for ever."""
    running = {process.sentinel: process for process in processes}
    try:
        while running:
            ended = wait(running, timeout=300)
            assert ended, f"{len(running)} ranks did not end in 300 s"
            for sentinel in ended:
                process = running.pop(sentinel)
                process.join()
                assert process.exitcode == 0
    finally:
        for process in running.values():
            process.kill()


def _run_rank(
    model: Path,
    ranks: int,
    rank: int,
    port: int,
    scripts: Scripts,
    out: Path,
    fault: Fault,
    load: Callable[[Path], EnginePipeline],
) -> None:
    torch.set_num_threads(1)
    init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
    parallel_state.initialize_model_parallel(ranks)
    pipeline = load(model)
    pack_branches = pipeline.pack_branches

    def pack_or_fail(branches):
        fault(rank, branches)
        return pack_branches(branches)

    pipeline.pack_branches = pack_or_fail
    all_gather = make_all_gather(torch.device("cpu"))
    traces: Traces = {}
    for name, joins in scripts.items():
        runner = RecordingRunner(pipeline, rank, ranks, all_gather, InlineSideWork(rank))
        _drive(runner, ranks, joins)
        assert not runner.states, "every request must be forgotten after its last step, or when it failed"
        traces[name] = dict(runner.trace)
    torch.save(traces, out)
    parallel_state.destroy_model_parallel()


def _drive(runner: StepRunner, ranks: int, joins: list[tuple[int, DiffusionRequest]]) -> None:
    scheduler = StepScheduler(toy_vllm_config(ranks, max_num_seqs=8, max_num_batched_tokens=1_000_000))
    step = 0
    while joins or scheduler.has_requests():
        for _, request in [join for join in joins if join[0] <= step]:
            scheduler.add_request(vllm_request(f"request-{request.seed}", request))
        joins = [join for join in joins if join[0] > step]
        output = scheduler.schedule()
        plan = output.planned.plan
        # Every rank's scheduler is told what all ranks report, so all make the same plans.
        answers: list[tuple[StepReport, list[SideReport]]] = [None] * ranks
        dist.all_gather_object(answers, (runner.run(plan), runner.side.take()))
        side = [(report, memoryview(b"")) for _, reports in answers for report in reports]
        scheduler.update_from_output(output, merge_reports([report for report, _ in answers], side))
        step += 1
