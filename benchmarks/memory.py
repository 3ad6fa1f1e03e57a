"""Memory of every rank beside one process of diffusers' own pipeline that generated the same image.

    python -m benchmarks.memory [--model FOLDER] [--side 64] [--steps 6]

Without --model: the bundled model, and one of random weights that is large enough for the weights to dominate. Both are
bfloat16 on disk and served as float32, so no contestant gets its weights as pages of the file, which would be shared
anyway. All figures are megabytes. Peak: the most that was resident. PSS: what is resident, a page that n processes map
counted as 1/n. Private: what nobody else maps. "The second rank adds" compares sums of PSS over all of a server's
processes, without pages of files, which processes of other programs map too. Linux only.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import requests

from examples.vllm_server import VllmServer

EMOJI = "examples/models/emoji"
PROMPT, NEGATIVE, SCALE, SEED = "a rocket on a black background", " ", 4.0, 1
TIMEOUT_S = 300
MEGABYTE = 2**20


class Memory(msgspec.Struct):
    """Of one process after it has generated the image."""

    peak: float
    pss: float
    pss_not_of_files: float
    private: float

    @classmethod
    def of(cls, process: psutil.Process) -> Memory:
        proc = Path(f"/proc/{process.pid}")
        peak = _megabytes(proc / "status", "VmHWM")
        not_of_files = sum(_megabytes(proc / "smaps_rollup", name) for name in ("Pss_Anon", "Pss_Shmem"))
        info = process.memory_full_info()
        return cls(peak, info.pss / MEGABYTE, not_of_files, info.uss / MEGABYTE)


def _megabytes(file: Path, name: str) -> float:
    return int(re.findall(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)[0]) * 1024 / MEGABYTE


class Diffusers(msgspec.Struct):
    """The process to compare with, and the bytes of the weights in it."""

    memory: Memory
    weights: float


@dataclass(frozen=True)
class Job:
    """The image that every contestant generates."""

    model: str
    side: int
    steps: int


def run_diffusers(job: Job) -> Diffusers:
    """Generate in this process; called in one that has imported nothing else."""
    import torch
    from diffusers import QwenImagePipeline

    torch.set_num_threads(1)  # as a rank has
    pipeline = QwenImagePipeline.from_pretrained(job.model, torch_dtype=torch.float32)
    pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        true_cfg_scale=SCALE,
        height=job.side,
        width=job.side,
        num_inference_steps=job.steps,
        generator=torch.Generator().manual_seed(SEED),
    )
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    weights = sum(weight.nbytes for module in modules for weight in module.parameters())
    return Diffusers(Memory.of(psutil.Process()), weights / MEGABYTE)


def diffusers_in_a_process(job: Job) -> Diffusers:
    code = f"import benchmarks.memory as m; print(m.msgspec.json.encode(m.run_diffusers(m.{job!r})).decode())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Diffusers)


def serve(job: Job, *flags: str) -> dict[str, Memory]:
    """Title of each of the server's processes -> its memory."""
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "true_cfg_scale": SCALE,
        "seed": SEED,
        "size": f"{job.side}x{job.side}",
        "num_inference_steps": job.steps,
    }
    with tempfile.TemporaryDirectory() as folder, VllmServer(job.model, list(flags), Path(folder) / "log") as server:
        server.wait_ready(TIMEOUT_S)
        for _ in range(2):  # ranks take turns at decoding
            requests.post(f"{server.url}/v1/images/generations", json=body, timeout=TIMEOUT_S).raise_for_status()
        processes = psutil.Process(server.process.pid).children(recursive=True)
        titles = {process: " ".join(process.cmdline()).strip().removeprefix("VLLM::") for process in processes}
        ours = {title: Memory.of(process) for process, title in titles.items() if re.fullmatch(r"\w+", title)}
        return {"APIServer": Memory.of(psutil.Process(server.process.pid)), **ours}


@contextmanager
def heavy_model() -> Iterator[str]:
    """A random Qwen-Image of 440 MB as float32, nearly all of it in the transformer."""
    import torch

    from tests.model_builders.qwen_image import ModelSize, build_qwen_image, transformer

    with tempfile.TemporaryDirectory() as folder:
        model = build_qwen_image(Path(folder) / "heavy")
        weights = transformer(ModelSize(heads=8, head_dim=64, rope_axes=(16, 24, 24), layers=12))
        weights.to(torch.bfloat16).save_pretrained(model / "transformer")
        yield str(model)


def compare(job: Job) -> None:
    diffusers = diffusers_in_a_process(job)
    servers = {
        (ranks, weights): serve(job, "--cfg-parallel-size", str(ranks), flag)
        for weights, flag in (("a copy each", "--no-cfg-shared-weights"), ("shared weights", "--cfg-shared-weights"))
        for ranks in (1, 2)
    }
    print(f"\n{job.model}, {diffusers.weights:.0f} MB of weights; one guided image of {job.side} px\n")
    print("| contestant | process | peak | PSS | private | peak / diffusers' |\n|---|---|---|---|---|---|")
    _print_row("diffusers", "pipeline", diffusers.memory, diffusers)
    for (ranks, weights), processes in servers.items():
        for title, memory in sorted(processes.items()):
            _print_row(f"{ranks} rank(s), {weights}", title, memory, diffusers)
    totals = {key: sum(memory.pss_not_of_files for memory in server.values()) for key, server in servers.items()}
    print()
    for weights in ("a copy each", "shared weights"):
        added = totals[2, weights] - totals[1, weights]
        print(f"{weights}: the second rank adds {added:.0f} MB, {100 * added / diffusers.weights:.0f} % of the weights")


def _print_row(contestant: str, title: str, memory: Memory, diffusers: Diffusers) -> None:
    ratio = f"{memory.peak / diffusers.memory.peak:.2f}"
    print(f"| {contestant} | {title} | {memory.peak:.0f} | {memory.pss:.0f} | {memory.private:.0f} | {ratio} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a Qwen-Image diffusers folder; repeatable")
    parser.add_argument("--side", type=int, default=64, help="pixels of a side (default 64)")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps (default 6)")
    args = parser.parse_args()
    for model in args.model or [EMOJI]:
        compare(Job(model, args.side, args.steps))
    if not args.model:
        with heavy_model() as model:
            compare(Job(model, args.side, args.steps))


if __name__ == "__main__":
    main()
