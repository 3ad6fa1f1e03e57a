"""What a client that streams, with previews, costs the neighbours that do not.

    python -m benchmarks.streaming [--model emoji] [--sides 64 128] [--neighbours 3] [--rounds 30] [--out DIR]

One server with two ranks. A companion asks for image after image; so do the neighbours, who never stream. In one half
of each round the companion streams and asks for three previews, in the other it does not, and all else is the same;
rounds take the halves in turns first. Steps are drawn from 10 to 30, so that requests don't begin and end together for
ever. The ratio is that of the neighbours' mean seconds a step, round by round: with as many requests under way in both,
that of their images a second is its inverse. `tests/unit/test_streaming_cost.py` has the same in virtual time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter

import aiohttp

from benchmarks.common import CORES, Job, machine, model_folder, percentile, report, start
from benchmarks.systems import START_TIMEOUT_S, Servers, pin_ranks, request_body
from examples.vllm_server import VllmServer

STEPS = (10, 30)
PREVIEWS = 3
PARTIAL, COMPLETED = b"event: image_generation.partial_image", b"event: image_generation.completed"
COLUMNS = (
    "side",
    "neighbours",
    "images each",
    "ms a step, nobody streams",
    "ms a step, beside a stream",
    "ratio (median of rounds)",
    "ratio (quartiles)",
    "companion's own ratio",
)


@dataclass(frozen=True)
class Half:
    """Mean milliseconds a step of the neighbours, and of the companion."""

    neighbours: float
    companion: float


class Scene:
    """A companion and its neighbours at one server.

    Args:
        images: that each neighbour asks for in half a round.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, side: int, neighbours: int, images: int) -> None:
        self._url = url
        self._session = session
        self._server = Servers([url], session)
        self._side = side
        self._neighbours = neighbours
        self._images = images
        self._numbers = count()  # no prompt repeats: its embedding would be cached

    async def half(self, number: int, streams: bool) -> Half:
        """The neighbours ask for their images while the companion is there; of one number all ask for the same."""
        draws = [random.Random(f"{number}-{client}") for client in range(self._neighbours + 1)]
        companion = asyncio.create_task(self._companion(draws[0], streams))
        taken = await asyncio.gather(*(self._neighbour(draw) for draw in draws[1:]))
        companion.cancel()
        own = await companion
        return Half(statistics.mean(ms for each in taken for ms in each), statistics.mean(own))

    async def _neighbour(self, draw: random.Random) -> list[float]:
        return [await self._ask(draw, streams=False) for _ in range(self._images)]

    async def _companion(self, draw: random.Random, streams: bool) -> list[float]:
        """Milliseconds a step of each of its images, until it is cancelled."""
        taken = []
        try:
            while True:
                taken.append(await self._ask(draw, streams))
        except asyncio.CancelledError:
            return taken

    async def _ask(self, draw: random.Random, streams: bool) -> float:
        """Milliseconds a step of one image."""
        number = next(self._numbers)
        job = Job(f"a red apple, number {number}", self._side, draw.randint(*STEPS), guided=True, seed=number)
        began = perf_counter()
        await (self._stream(job) if streams else self._server.run(job))
        return 1e3 * (perf_counter() - began) / job.steps

    async def _stream(self, job: Job) -> None:
        body = {**request_body(job), "stream": True, "partial_images": PREVIEWS}
        async with self._session.post(f"{self._url}/v1/images/generations", json=body) as response:
            text = await response.read()
        if PARTIAL not in text or COMPLETED not in text:
            raise RuntimeError(f"this stream has no previews, or no image: {text[-300:]!r}")


async def measure(scene: Scene, rounds: int) -> list[tuple[Half, Half]]:
    """(nobody streams, the companion does) of each round; the first one warms up and is dropped."""
    taken = []
    for number in range(rounds + 1):
        order = (False, True) if number % 2 else (True, False)
        halves = {streams: await scene.half(number, streams) for streams in order}
        taken.append((halves[False], halves[True]))
    return taken[1:]


def row(side: int, neighbours: int, images: int, rounds: list[tuple[Half, Half]]) -> list[object]:
    ratios = [streamed.neighbours / plain.neighbours for plain, streamed in rounds]
    return [
        side,
        neighbours,
        images,
        statistics.median(plain.neighbours for plain, _ in rounds),
        statistics.median(streamed.neighbours for _, streamed in rounds),
        f"{statistics.median(ratios):.3f}",
        f"{percentile(ratios, 25):.3f} to {percentile(ratios, 75):.3f}",
        f"{statistics.median(streamed.companion / plain.companion for plain, streamed in rounds):.3f}",
    ]


async def run(args: argparse.Namespace) -> list[list[object]]:
    rounds = args.rounds or (1 if args.quick else 30)
    images = 2 if args.quick else args.images
    rows = []
    with ExitStack() as stack:
        model, logs = stack.enter_context(model_folder(args.model)), stack.enter_context(tempfile.TemporaryDirectory())
        flags = ["--cfg-parallel-size", "2"]
        server = stack.enter_context(VllmServer(model, flags, Path(logs) / "server.log"))
        server.wait_ready(START_TIMEOUT_S)
        pin_ranks(server, CORES)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
            for side in args.sides:
                scene = Scene(server.url, session, side, args.neighbours, images)
                rows.append(row(side, args.neighbours, images, await measure(scene, rounds)))
    return rows


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--model", default="emoji", help="emoji, light or mid (default emoji)")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128], help="of the images (default 64 128)")
    parser.add_argument("--neighbours", type=int, default=3, help="clients that never stream (default 3)")
    parser.add_argument("--images", type=int, default=6, help="of each neighbour in half a round (default 6)")
    args = parser.parse_args()
    on = machine()
    report("streaming", args.out, on, COLUMNS, asyncio.run(run(args)))


if __name__ == "__main__":
    main()
