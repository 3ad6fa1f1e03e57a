"""`make demo`: serve the bundled model with CFG-Parallel and send it a dozen different requests at once.

Everything is the real thing: the stock `vllm serve`, and the official `openai` client. Writes to demo_output/.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contact_sheet import Tile, draw_contact_sheet
from openai import AsyncOpenAI
from PIL import Image
from tqdm import tqdm
from vllm_server import ServerError, VllmServer

HERE = Path(__file__).resolve().parent
MODEL = HERE / "models" / "emoji"
DEFAULT_OUTPUT = HERE.parent / "demo_output"
CFG_PARALLEL_SIZE = 2
START_TIMEOUT_S = 180


@dataclass(frozen=True)
class Job:
    """One request; `scale` 1 is without guidance."""

    prompt: str
    seed: int
    scale: float
    size: str = "64x64"
    steps: int = 20

    @property
    def guided(self) -> bool:
        return self.scale > 1


@dataclass(frozen=True)
class Done:
    """A finished request: the picture and the server's own measurements."""

    job: Job
    picture: Image.Image
    metrics: dict[str, Any]


def pair(prompt: str, seed: int, scale: float, size: str = "64x64", steps: int = 20) -> list[Job]:
    """The same picture without and with guidance."""
    return [Job(prompt, seed, 1.0, size, steps), Job(prompt, seed, scale, size, steps)]


JOBS = [
    *pair("a red apple on a blue background", seed=0, scale=4.0),
    *pair("a fish on a black background", seed=4, scale=4.0),
    *pair("a sunflower on a black background", seed=13, scale=4.0, steps=28),
    *pair("a rocket on a black background", seed=7, scale=6.0),
    *pair("a panda on a blue background", seed=8, scale=3.0, steps=16),
    *pair("a grinning face on a white background", seed=12, scale=3.5, size="64x72", steps=24),
]


async def run_all(url: str) -> list[Done]:
    """Send every job at once; results in the order of JOBS."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=300) as client:
        with tqdm(total=len(JOBS), desc="Images", unit="image") as bar:

            async def run(job: Job) -> Done:
                done = await generate(client, job)
                bar.update()
                return done

            return await asyncio.gather(*(run(job) for job in JOBS))


async def generate(client: AsyncOpenAI, job: Job) -> Done:
    """One request through the official client; what OpenAI's API lacks goes into `extra_body`."""
    response = await client.images.generate(
        prompt=job.prompt,
        size=job.size,
        extra_body={
            "seed": job.seed,
            "num_inference_steps": job.steps,
            "true_cfg_scale": job.scale,
            "negative_prompt": " " if job.guided else None,
        },
    )
    image = response.data[0]
    picture = Image.open(io.BytesIO(base64.b64decode(image.b64_json)))
    return Done(job, picture, image.metrics)


def write_pictures(results: list[Done], folder: Path) -> None:
    """The PNGs and the contact sheet."""
    for number, done in enumerate(results, 1):
        done.picture.save(folder / f"{number:02d}.png")
    tiles = [
        Tile(done.picture, [done.job.prompt, f"seed {done.job.seed}, scale {done.job.scale:g}, {done.job.size}"])
        for done in results
    ]
    draw_contact_sheet(tiles, columns=4).save(folder / "contact_sheet.png")


def print_table(results: list[Done], total_ms: float) -> None:
    print(
        f"{'#':>2}  {'prompt':<38} {'size':>7} {'steps':>5} {'scale':>5} {'guided':>6} {'queue':>7} {'e2e_time_ms':>11}"
    )
    for number, done in enumerate(results, 1):
        job, metrics = done.job, done.metrics
        print(
            f"{number:>2}  {job.prompt:<38} {job.size:>7} {job.steps:>5} {job.scale:>5g} "
            f"{'yes' if metrics['guided'] else 'no':>6} {metrics['queue_ms']:>7.0f} {metrics['e2e_time_ms']:>11.0f}"
        )
    print(f"total: {len(results)} images in {total_ms:.0f} ms, {1000 * len(results) / total_ms:.1f} images/s")


def start(server: VllmServer) -> None:
    """Wait for the server, showing that something happens."""
    hidden = None if sys.stderr.isatty() else True  # a log file needs no clock
    with tqdm(desc="Starting", bar_format="{desc}: {elapsed}", disable=hidden) as clock:
        server.wait_ready(START_TIMEOUT_S, on_wait=clock.refresh)


def serve_and_run(log: Path) -> tuple[list[Done], float]:
    """The results of all jobs, and how long they took together in ms."""
    options = ["--cfg-parallel-size", str(CFG_PARALLEL_SIZE), "--served-model-name", MODEL.name]
    print(f"Starting vllm serve {MODEL.name} {' '.join(options)} (log: {log})")
    with VllmServer(MODEL, options, log) as server:
        start(server)
        started = time.perf_counter()
        try:
            results = asyncio.run(run_all(server.url))
        except Exception:
            print(f"A request failed. The end of the server's log:\n{server.log_tail()}", file=sys.stderr)
            raise
        return results, 1000 * (time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write to")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    try:
        results, total_ms = serve_and_run(folder / "server.log")
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the server has been stopped.", file=sys.stderr)
        return 130
    write_pictures(results, folder)
    print_table(results, total_ms)
    print(f"Pictures and contact sheet: {folder}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
