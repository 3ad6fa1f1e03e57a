"""What the end-to-end tests need to know of a server's processes and of what it leaves behind."""

import contextlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

from examples.vllm_server import VllmServer

SETTLE_S = 10  # orphans notice their parent's death, and the kernel closes their sockets, within this time


def session_processes(session_id: int) -> list[psutil.Process]:
    """Live processes of the session that a server was started in, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError, ProcessLookupError):
            stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            if int(stat[3]) == session_id and stat[0] != "Z":
                found.append(process)
    return found


def unix_sockets() -> dict[str, str]:
    """Inode -> name of every bound unix socket of this machine; abstract names start with '@'."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    rows = (line.split() for line in lines)
    return {row[6]: row[7] for row in rows if len(row) > 7}


@dataclass
class Footprint:
    """Everything of a server that must be gone once it has ended: its processes, sockets and shared memory files."""

    session_id: int
    sockets: set[str] = field(default_factory=set)
    shared_memory: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, server: VllmServer) -> "Footprint":
        footprint = cls(session_id=server.process.pid)
        names = unix_sockets()
        for process in session_processes(footprint.session_id):
            with contextlib.suppress(OSError):
                for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        target = str(descriptor.readlink())
                        if inode := re.fullmatch(r"socket:\[(\d+)\]", target):
                            footprint.sockets |= {names[inode[1]]} if inode[1] in names else set()
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                footprint.shared_memory |= set(re.findall(r"/dev/shm/\S+", maps))
        return footprint

    def leftovers(self) -> list[str]:
        """What is still there after a while for settling."""
        deadline = time.monotonic() + SETTLE_S
        while (left := self._leftovers()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def _leftovers(self) -> list[str]:
        bound = set(unix_sockets().values())
        return [
            *(f"process {process.pid}: {process.name()}" for process in session_processes(self.session_id)),
            *(f"socket {name}" for name in sorted(self.sockets & bound)),
            *(f"shared memory {name}" for name in sorted(self.shared_memory) if Path(name).exists()),
        ]


def engine_core(server: VllmServer) -> psutil.Process:
    """The EngineCore process of a server, by the title that vLLM gives it."""
    for process in session_processes(server.process.pid):
        if "EngineCore" in " ".join(process.cmdline()):
            return process
    raise LookupError("the server has no EngineCore process")


def gauge(server: VllmServer, name: str) -> float:
    """The sum of a gauge or counter in /metrics over its labels, or its value where the name has them."""
    text = requests.get(f"{server.url}/metrics", timeout=10).text
    values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    if not values:
        raise LookupError(f"/metrics has no {name}")
    return sum(map(float, values))


def wait_for_running(server: VllmServer, count: int, timeout_s: float) -> None:
    """Return when exactly `count` requests are in the batch."""
    deadline = time.monotonic() + timeout_s
    while (running := gauge(server, "vllm:num_requests_running")) != count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{running:.0f} requests are running after {timeout_s} s, not {count}")
        time.sleep(0.05)
