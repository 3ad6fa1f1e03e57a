"""What chaos.py and soak.py share: a server under steady traffic, its answers and its memory.

Each client of a closed loop sends the next of a list of jobs as soon as its last one is answered. Of jobs that were
drawn before anything was done to the server, it compares the image.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from benchmarks.common import EMOJI, Job, percentile
from benchmarks.systems import START_TIMEOUT_S, request_body
from examples.vllm_server import VllmServer

CLIENTS = 16
MEGABYTE = 2**20
# Process titles, and what stands for processes that are replaced.
_TITLE = re.compile(r"CfgRank[\d.]+|CfgTemplate|EngineCore(?:_DP\d+)?|ApiServer_\d+|vllm serve")
_ENGINE = re.compile(r"EngineCore(_DP\d+)")


@dataclass
class Record:
    """What became of the requests.

    Attributes:
        failures: answers that were no image, and how often they came.
        seconds: of every answer.
    """

    wrong: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    @property
    def row(self) -> tuple[int, int, int, float, float]:
        """Requests, failed, wrong bytes, p50 and p99 in seconds."""
        failed = sum(self.failures.values())
        return len(self.seconds), failed, self.wrong, percentile(self.seconds, 50), percentile(self.seconds, 99)


@contextmanager
def serving(flags: list[str]) -> Iterator[VllmServer]:
    """A server of the bundled model that is ready."""
    with (
        tempfile.TemporaryDirectory(prefix="endurance-") as folder,
        VllmServer(EMOJI, flags, Path(folder) / "server.log") as server,
    ):
        server.wait_ready(START_TIMEOUT_S)
        yield server


ROW = ("requests", "failed", "wrong bytes", "p50 s", "p99 s")


class Traffic:
    """Sends jobs to one server.

    Args:
        url: of the server.
        jobs: to be sent in turn, again and again.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, jobs: Sequence[Job]) -> None:
        self._url = f"{url}/v1/images/generations"
        self._session = session
        self._jobs = jobs
        self._known: dict[Job, str] = {}

    async def learn(self) -> None:
        """Draw every image once, one after the other."""
        for job in self._jobs:
            status, digest = await self._ask(job)
            if status != 200:
                raise RuntimeError(f"the server answered {status} before anything was done to it")
            self._known[job] = digest

    async def run(self, seconds: float, clients: int = CLIENTS) -> Record:
        """A closed loop for so long; ends when the last request is answered."""
        record, end = Record(), time.monotonic() + seconds
        jobs = itertools.cycle(self._jobs)

        async def client() -> None:
            while time.monotonic() < end:
                await self._check(next(jobs), record)

        await asyncio.gather(*(client() for _ in range(clients)))
        return record

    async def _check(self, job: Job, record: Record) -> None:
        began = time.monotonic()
        try:
            status, digest = await self._ask(job)
        except (aiohttp.ClientError, TimeoutError) as error:
            record.failures[f"{type(error).__name__} after {time.monotonic() - began:.0f} s"] += 1
        else:
            if status != 200:
                record.failures[f"HTTP {status}: {digest}"] += 1
            record.wrong += status == 200 and digest != self._known.get(job, digest)
        record.seconds.append(time.monotonic() - began)

    async def _ask(self, job: Job) -> tuple[int, str]:
        """The status, and the image's digest or why there is none."""
        async with self._session.post(self._url, json=request_body(job)) as response:
            answer = await response.json()
            if response.status != 200:
                return response.status, answer["error"]["message"]
            return response.status, hashlib.sha256(answer["data"][0]["b64_json"].encode()).hexdigest()

    async def abandon(self, job: Job, after: float) -> None:
        """A client that leaves after so many seconds, whether it has its image or not."""
        try:
            await asyncio.wait_for(self._ask(job), after)
        except TimeoutError:
            return


def processes(server: VllmServer) -> dict[str, psutil.Process]:
    """The server's processes by title; with several engines, that of a rank ends as that of its engine does."""
    found = {}
    parent = psutil.Process(server.process.pid)
    for process in [parent, *parent.children(recursive=True)]:
        try:
            title = _TITLE.search(" ".join(process.cmdline()))
            ancestors = " ".join(" ".join(ancestor.cmdline()) for ancestor in process.parents())
        except psutil.Error:
            continue
        if title:
            engine = _ENGINE.search(ancestors)
            found[title[0] + (engine[1] if engine else "")] = process
    return found


def resident_megabytes(server: VllmServer) -> dict[str, float]:
    return {title: process.memory_info().rss / MEGABYTE for title, process in sorted(processes(server).items())}


def memory_rows(before: dict[str, float], after: dict[str, float]) -> Sequence[tuple[str, float, float]]:
    """(process, megabytes before, megabytes after)."""
    return [(title, before.get(title, float("nan")), after.get(title, float("nan"))) for title in before | after]


MEMORY_ROW = ("process", "RSS at start, MB", "RSS at end, MB")
