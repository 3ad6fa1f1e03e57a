"""Engine steps on real gloo ranks without a server: every rank drives its own copy of the deterministic scheduler."""

from __future__ import annotations

import multiprocessing
import queue
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed import init_distributed_environment
from vllm.utils.network_utils import get_open_port
from vllm.v1.request import RequestStatus

from tests.distributed.nccl_rules import nccl_rules
from tests.families import load
from tests.toy_pipeline import InlineSideWork, toy_vllm_config
from tests.unit.test_run_ahead import DevicePace
from tests.unit.test_scheduler import vllm_request
from vllm_cfg_plugin.distributed import parallel_state
from vllm_cfg_plugin.distributed.sequence_exchange import CollectiveGroup, Coordinators
from vllm_cfg_plugin.distributed.sequence_group import SequenceGroups, current_group, use_group
from vllm_cfg_plugin.engine.plan import DECODED, SideReport, StepReport
from vllm_cfg_plugin.engine.scheduler import StepScheduler
from vllm_cfg_plugin.engine.step_result import merge_reports
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline
from vllm_cfg_plugin.worker.pace import HostPace
from vllm_cfg_plugin.worker.runner import StepRunner
from vllm_cfg_plugin.worker.side_work import SideWork
from vllm_cfg_plugin.worker.worker import make_all_gather

# name -> (engine step, request that joins then, or the seed of a long one that is aborted once it is forwarded)
Scripts = dict[str, list[tuple[int, DiffusionRequest | int]]]
Traces = dict[str, dict[int, list[torch.Tensor]]]  # name -> seed -> latents after each step


# Called with (process, the branches of a forward) before every forward; raises to make that process's forward fail.
Fault = Callable[[int, list[BranchInput]], None]


def no_fault(rank: int, branches: list[BranchInput]) -> None:
    """All forwards succeed."""


class RecordingRunner(StepRunner):
    """Keeps every request's latents after every step."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.trace: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._really_advance = self._step._advance
        self._step._advance = self._advance_and_record

    def _advance_and_record(self, moves, previews):
        self._really_advance(moves, previews)
        for move in moves:
            if move.error is None:
                self.trace[move.state.request.seed].append(move.state.latents.clone())


class ThreadedSideWork(SideWork):
    """The side work of a rank, on its threads; its reports are kept."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, torch.device("cpu"))
        self._reports: queue.SimpleQueue[SideReport] = queue.SimpleQueue()
        self.shared: dict[tuple[int, int], bytes] = {}

    def deliver(self, report: SideReport, frame: torch.Tensor | None) -> None:
        if frame is not None and report.branch >= 0:
            self.shared[report.id, report.branch] = frame.numpy().tobytes()
        self._reports.put(report)

    def take(self) -> list[SideReport]:
        return [self._reports.get() for _ in range(self._reports.qsize())]


def run_ranks(
    model: Path,
    ranks: int,
    scripts: Scripts,
    folder: Path,
    fault: Fault = no_fault,
    load: Callable[[Path], EnginePipeline] = load,
    max_tokens: int = 1_000_000,
    as_on_gpus: bool = False,
    sharers: int = 1,
    text_encoder: str = "all",
    tensor: int = 1,
) -> list[Traces]:
    """Run all scripts on forked processes; returns every process's traces.

    Args:
        sharers: processes that share the rows of each rank's forwards. tensor: those that share the weights.
        max_tokens: of a rank and step. Where there is such a limit, side work runs on threads, as in a server.
        as_on_gpus: exchange over the process group, by NCCL's rules, and run a step ahead.
        text_encoder: as `cfg_text_encoder`; ranks without text encoders have none.
    """
    options = {"fault": fault, "load": load, "max_tokens": max_tokens, "as_on_gpus": as_on_gpus, "sharers": sharers}
    options |= {"text_encoder": text_encoder, "tensor": tensor}
    return [traces[model] for traces in run_models({model: scripts}, ranks, folder, **options)]


def run_models(
    models: dict[Path, Scripts], ranks: int, folder: Path, sharers: int = 1, tensor: int = 1, **options
) -> list[dict[Path, Traces]]:
    """The same for several models, one after the other on the same processes."""
    outs = [folder / f"traces-{process}.pt" for process in range(ranks * sharers * tensor)]
    port = get_open_port()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_run_rank, args=(models, ranks, sharers, tensor, number, port, out), kwargs=options)
        for number, out in enumerate(outs)
    ]
    for process in processes:
        process.start()
    _join(processes)
    return [torch.load(out, weights_only=False) for out in outs]


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
    models: dict[Path, Scripts],
    ranks: int,
    sharers: int,
    tensor: int,
    number: int,
    port: int,
    out: Path,
    fault: Fault = no_fault,
    load: Callable[[Path], EnginePipeline] = load,
    max_tokens: int = 1_000_000,
    as_on_gpus: bool = False,
    text_encoder: str = "all",
) -> None:
    torch.set_num_threads(1)
    processes = sharers * tensor
    init_distributed_environment(ranks * processes, number, f"tcp://127.0.0.1:{port}", number, "gloo")
    parallel_state.initialize_model_parallel(ranks, tensor, sequence_parallel_size=sharers)
    groups = SequenceGroups(current_group(), parallel_state.make_sequence_group())
    if as_on_gpus and (everybody := parallel_state.get_forward_coordinator()):
        shared = {"sequence": everybody} if sharers > 1 else {"tensor": everybody}
        groups = SequenceGroups(CollectiveGroup(Coordinators(everybody, **shared)))
        use_group(groups.steps)
    rank = parallel_state.get_classifier_free_guidance_rank()
    all_gather = make_all_gather(torch.device("cuda" if as_on_gpus else "cpu"))
    traces: dict[Path, Traces] = {}
    for model, scripts in models.items():
        pipeline = load(model)
        if text_encoder == "one" and number >= processes:
            for name in [name for name in pipeline.components if name.startswith("text_encoder")]:
                setattr(pipeline, name, None)
        pipeline.pack_branches = _failing(pipeline.pack_branches, fault, number)
        traces[model] = {}
        for name, script in scripts.items():
            side = ThreadedSideWork(rank) if max_tokens < 1_000_000 else InlineSideWork(rank)
            pace = DevicePace() if as_on_gpus else HostPace()
            runner = RecordingRunner(pipeline, rank, ranks, all_gather, side, pace, groups)
            with nccl_rules():
                settings = {"sequence_parallel_size": sharers, "tensor_parallel_size": tensor}
                settings["cfg_text_encoder"] = text_encoder
                _drive(runner, toy_vllm_config(ranks, 8, max_tokens, **settings), list(script))
            assert runner.trace, "no step of any request was recorded"
            assert not runner.states, "every request must be forgotten after its last step, or when it failed"
            traces[model][name] = dict(runner.trace)
    torch.save(traces, out)
    parallel_state.destroy_model_parallel()


def _failing(pack_branches, fault: Fault, number: int):
    def pack_or_fail(branches):
        fault(number, branches)
        return pack_branches(branches)

    return pack_or_fail


def _drive(runner: StepRunner, vllm_config: Any, script: list[tuple[int, DiffusionRequest | int]]) -> None:
    scheduler = StepScheduler(vllm_config)
    step = 0
    while script or scheduler.has_requests():
        for entry in [entry for entry in script if entry[0] <= step]:
            if not isinstance(entry[1], int):
                scheduler.add_request(vllm_request(f"request-{entry[1].seed}", entry[1]))
            elif scheduler.batch.named(f"request-{entry[1]}").id in scheduler.batch.stepping.beside:
                scheduler.finish_requests(f"request-{entry[1]}", RequestStatus.FINISHED_ABORTED)
            else:
                continue
            script.remove(entry)
        output = scheduler.schedule()
        plan = output.planned.plan
        # Every rank's scheduler is told what all ranks report, so all make the same plans.
        answers: list[tuple[StepReport, list[SideReport], dict[tuple[int, int], bytes]]] = [
            None
        ] * dist.get_world_size()
        dist.all_gather_object(answers, (runner.run(plan), runner.side.take(), runner.side.shared))
        side = [(report, _frame_of(report, shared)) for _, reports, shared in answers for report in reports]
        scheduler.update_from_output(output, merge_reports([report for report, *_ in answers], 0, side))
        step += 1


def _frame_of(report: SideReport, shared: dict[tuple[int, int], bytes]) -> memoryview | None:
    if report.branch == DECODED:
        return memoryview(b"")
    frame = shared.get((report.id, report.branch))
    return None if frame is None else memoryview(frame)
