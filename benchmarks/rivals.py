"""What a user would run instead, each in a process of its own: diffusers' pipeline, and a hand-made two-process loop.

The processes are forked, so they must be started before an engine starts its threads in this process. The rivals are
diffusers and torch alone: nothing here uses the engine.
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import torch
import torch.distributed as dist
from diffusers import QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps

from benchmarks.common import CORES, NEGATIVE, SCALE, Job, Timing, pin_process

Runner = Callable[[Sequence[Job]], Timing]


class Rival:
    """A forked process, bound to cores, that runs jobs with what `make_runner` returns there."""

    def __init__(self, make_runner: Callable[[], Runner], cores: Sequence[int], threads: int) -> None:
        self._pipe, child = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        ends = (child, self._pipe)
        self._process = context.Process(target=_serve, args=(ends, make_runner, cores, threads), daemon=True)
        self._process.start()
        child.close()

    def start(self, jobs: Sequence[Job]) -> None:
        self._pipe.send(list(jobs))

    def finish(self) -> Timing:
        """What became of the jobs that were started.

        Raises:
            RuntimeError: they failed, or the process ended.
        """
        try:
            outcome = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the rival's process ended with code {self._process.exitcode}") from None
        if isinstance(outcome, Timing):
            return outcome
        raise RuntimeError(f"the rival failed: {outcome}")

    def run(self, jobs: Sequence[Job]) -> Timing:
        self.start(jobs)
        return self.finish()

    def close(self) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()


def _serve(
    ends: tuple[Connection, Connection], make_runner: Callable[[], Runner], cores: Sequence[int], threads: int
) -> None:
    pipe, parents_end = ends
    parents_end.close()  # the fork copied it; while it is open here, the parent's death goes unnoticed
    pin_process(cores)
    torch.set_num_threads(threads)
    runner = make_runner()
    while True:
        try:
            jobs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(runner(jobs))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")


@contextmanager
def diffusers_process(model: str, threads: int) -> Iterator[Rival]:
    """diffusers' own pipeline, unchanged, on the first `threads` cores; several jobs are one list of prompts."""
    rival = Rival(partial(_PipelineRunner, model), CORES[:threads], threads)
    try:
        yield rival
    finally:
        rival.close()


@contextmanager
def hand_made_pair(model: str) -> Iterator[Callable[[Job], Timing]]:
    """Two processes of one thread and one core each that share the branches of one guided job."""
    port = _free_port()
    ranks = [Rival(partial(_HandMadeRank, model, rank, port), [CORES[rank % len(CORES)]], 1) for rank in range(2)]

    def run(job: Job) -> Timing:
        for rank in ranks:
            rank.start([job])
        first, _ = [rank.finish() for rank in ranks]
        return first  # rank 0, which also decodes

    try:
        yield run
    finally:
        for rank in ranks:
            rank.close()


def _load(model: str) -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _PipelineRunner:
    """diffusers' `__call__`; its loop is timed from the first forward's start to the last step's end."""

    def __init__(self, model: str) -> None:
        self._pipeline = _load(model)
        self._first_forward = self._last_step = 0.0
        self._pipeline.transformer.register_forward_pre_hook(self._note_forward)

    def _note_forward(self, *_: object) -> None:
        self._first_forward = self._first_forward or time.perf_counter()

    def _note_step(self, pipeline: object, index: int, timestep: object, kwargs: dict) -> dict:
        self._last_step = time.perf_counter()
        return kwargs

    def __call__(self, jobs: Sequence[Job]) -> Timing:
        self._first_forward = 0.0
        first = jobs[0]
        began = time.perf_counter()
        self._pipeline(
            prompt=[job.prompt for job in jobs],
            negative_prompt=[NEGATIVE] * len(jobs) if first.guided else None,
            true_cfg_scale=SCALE if first.guided else 1.0,
            height=first.side,
            width=first.side,
            num_inference_steps=first.steps,
            generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
            callback_on_step_end=self._note_step,
        )
        return Timing(time.perf_counter() - began, 1e3 * (self._last_step - self._first_forward))


class _HandMadeRank:
    """The textbook loop: rank 0 forwards the positive branch and rank 1 the negative one, one all_gather a step."""

    def __init__(self, model: str, rank: int, port: int) -> None:
        self._pipeline = _load(model)
        self._rank = rank
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)

    @torch.inference_mode()
    def __call__(self, jobs: Sequence[Job]) -> Timing:
        (job,) = jobs
        pipeline = self._pipeline
        began = time.perf_counter()
        embeds, mask = pipeline.encode_prompt(prompt=[NEGATIVE if self._rank else job.prompt])
        channels = pipeline.transformer.config.in_channels // 4
        generator = torch.Generator().manual_seed(job.seed)
        latents = pipeline.prepare_latents(1, channels, job.side, job.side, embeds.dtype, "cpu", generator)
        timesteps = self._timesteps(job, latents.shape[1])
        grid = job.side // pipeline.vae_scale_factor // 2
        looped = time.perf_counter()
        for t in timesteps:
            prediction = pipeline.transformer(
                hidden_states=latents,
                timestep=t.expand(1).to(latents.dtype) / 1000,
                encoder_hidden_states=embeds,
                encoder_hidden_states_mask=mask,
                img_shapes=[[(1, grid, grid)]],
                return_dict=False,
            )[0]
            latents = pipeline.scheduler.step(self._combined(prediction), t, latents, return_dict=False)[0]
        denoise_ms = 1e3 * (time.perf_counter() - looped)
        if self._rank == 0:
            self._decode(job, latents)
        return Timing(time.perf_counter() - began, denoise_ms)

    def _timesteps(self, job: Job, image_tokens: int) -> torch.Tensor:
        scheduler = self._pipeline.scheduler
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(image_tokens, *(scheduler.config[name] for name in names))
        sigmas = np.linspace(1.0, 1 / job.steps, job.steps)
        timesteps, _ = retrieve_timesteps(scheduler, job.steps, "cpu", sigmas=sigmas, mu=mu)
        scheduler.set_begin_index(0)
        return timesteps

    def _combined(self, prediction: torch.Tensor) -> torch.Tensor:
        positive, negative = torch.empty_like(prediction), torch.empty_like(prediction)
        dist.all_gather([positive, negative], prediction)
        combined = negative + SCALE * (positive - negative)
        return combined * (torch.norm(positive, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True))

    def _decode(self, job: Job, latents: torch.Tensor) -> None:
        pipeline, vae = self._pipeline, self._pipeline.vae
        latents = pipeline._unpack_latents(latents, job.side, job.side, pipeline.vae_scale_factor)
        shape = (1, vae.config.z_dim, 1, 1, 1)
        latents = latents * torch.tensor(vae.config.latents_std).view(shape)
        latents = latents + torch.tensor(vae.config.latents_mean).view(shape)
        pipeline.image_processor.postprocess(vae.decode(latents, return_dict=False)[0][:, :, 0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
