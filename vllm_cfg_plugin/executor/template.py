"""A process that holds the loaded pipeline and forks the ranks, again and again: ranks on a CPU share its weights.

A fork copies the one thread that forks, with whatever locks the others hold. So ranks are forked by a process that
does nothing else, and not by the engine's, which has more threads once it runs. The engine talks to it over a pipe: a
`Meeting` starts ranks, a number of seconds ends them, and each is answered when that is done. Unasked come the words
in which a rank has ended. The engine watches the ranks itself as well: the process may hang, and then says nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from vllm_cfg_plugin.compat.forks import let_have_children, release_inherited_listeners, unshare_progress_lock
from vllm_cfg_plugin.errors import ConfigurationError, RankDiedError, one_line
from vllm_cfg_plugin.executor.lifeline import die_with_parent
from vllm_cfg_plugin.executor.rank_processes import Meeting, OwnProcesses, RankProcesses, end_processes
from vllm_cfg_plugin.worker.loading import pipeline_for_forks

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_DONE, _FAILED, _ENDED = "done", "failed", "ended"
LEAST_ANSWER_SECONDS = 10.0
_WORDS_SECONDS = 1.0  # until the process says how a rank has ended, of which it is told at once


class Template:
    """The engine's end: the process is made when it is first needed, and again when it has died.

    Args:
        answer_seconds: for forks, beside the time that ranks are given to end; after that it hangs.
    """

    def __init__(self, vllm_config: VllmConfig, answer_seconds: float) -> None:
        self._vllm_config = vllm_config
        self.answer_seconds = answer_seconds
        self._process: Any = None
        self._ended_rank = ""

    def start_ranks(self, meeting: Meeting) -> RankProcesses:
        """Fork ranks; those of an earlier start have ended.

        Raises:
            ConfigurationError: the pipeline can't be loaded.
            RankDiedError: the process ended meanwhile.
        """
        if self._process is None or not self._process.is_alive():
            self._make_process()
        self._ended_rank = ""
        return ForkedRanks(self, meeting.names, self.ask(meeting, self.answer_seconds))

    def _make_process(self) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=run_template,
            args=(self._vllm_config, theirs, self._connection),
            name="cfg-template",
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self._wait_for_answer(None)

    @property
    def sentinels(self) -> list[Any]:
        return [self._process.sentinel, self._connection.fileno()]

    def why_ended(self, wait_seconds: float = 0.0) -> str:
        """Which process has ended and how, in words; "" while all live.

        Args:
            wait_seconds: for the words, where something has ended.
        """
        if not self._ended_rank:
            try:
                if self._connection.poll(wait_seconds):
                    _, self._ended_rank = self._connection.recv()
            except (EOFError, OSError):
                self._ended_rank = self._how_it_ended()
        if not self._ended_rank and self._process.exitcode is not None:
            self._ended_rank = self._how_it_ended()
        return self._ended_rank

    def ask(self, what: Meeting | float, timeout: float) -> Any:
        """Have ranks started or ended; returns the process ids of those that were started.

        Raises:
            RankDiedError: the process has ended, or does not answer.
        """
        if not self._process.is_alive():  # its ranks may still hold its pipes
            raise RankDiedError(self._how_it_ended())
        try:
            self._connection.send(what)
        except OSError:
            raise RankDiedError(self._how_it_ended()) from None
        return self._wait_for_answer(timeout)

    def _wait_for_answer(self, timeout: float | None) -> Any:
        while True:
            try:
                if not self._connection.poll(timeout):
                    end_processes([self._process], grace=0)
                    raise RankDiedError(f"the process that forks the ranks does not answer within {timeout} s")
                kind, answer = self._connection.recv()
            except (EOFError, OSError):
                raise RankDiedError(self._how_it_ended()) from None
            if kind == _FAILED:
                raise ConfigurationError(answer)
            if kind == _DONE:
                return answer
            self._ended_rank = answer

    def _how_it_ended(self) -> str:
        self._process.join(1)  # its exit code comes a moment after the end of its pipe
        return f"the process that forks the ranks (pid {self._process.pid}) ended with code {self._process.exitcode}"

    def close(self) -> None:
        if self._process is not None:
            self._connection.close()
            end_processes([self._process], grace=0)


class ForkedRanks(RankProcesses):
    """Children of the template process.

    Args:
        names, pids: of the ranks, in their order.
    """

    def __init__(self, template: Template, names: Sequence[str], pids: list[int]) -> None:
        self._template = template
        self._descriptors: dict[int, str] = {}  # ready when a rank has ended -> which one
        for name, pid in zip(names, pids, strict=True):
            # No such process: it has ended, and the template process says so.
            with suppress(ProcessLookupError):
                if sys.platform == "linux":
                    self._descriptors[os.pidfd_open(pid)] = f"cfg rank {name} (pid {pid})"

    @property
    def sentinels(self) -> list[Any]:
        return [*self._template.sentinels, *self._descriptors]

    def why_ended(self) -> str:
        ready = wait(self._descriptors, 0)
        ended = [who for descriptor, who in self._descriptors.items() if descriptor in ready]
        if why := self._template.why_ended(_WORDS_SECONDS if ended else 0.0):
            return why
        return f"the process of {ended[0]} ended, and its parent says nothing" if ended else ""

    def end(self, grace: float) -> None:
        with suppress(RankDiedError):  # they end with their parent
            self._template.ask(grace, grace + self._template.answer_seconds)
        while self._descriptors:
            os.close(self._descriptors.popitem()[0])


def run_template(vllm_config: VllmConfig, connection: Connection, engines_end: Connection) -> None:
    """Entry point of the process; it ends when the engine closes its end of the pipe, or has ended."""
    from vllm.utils.system_utils import set_process_title

    engines_end.close()
    die_with_parent()
    set_process_title("CfgTemplate")
    # Ctrl-C reaches the whole process group; the engine decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    release_inherited_listeners()
    unshare_progress_lock()
    let_have_children()
    try:
        with pipeline_for_forks(vllm_config):
            connection.send((_DONE, []))
            _serve(vllm_config, connection)
    except Exception as error:
        if not isinstance(error, ConfigurationError):
            traceback.print_exc()
        connection.send((_FAILED, one_line(error)))


def _serve(vllm_config: VllmConfig, connection: Connection) -> None:
    context = multiprocessing.get_context("fork")
    ranks: OwnProcesses | None = None
    ended = ""  # what has been said of them
    while True:
        watched = [] if ranks is None or ended else ranks.sentinels
        if connection not in wait([connection, *watched]):
            # Its exit code comes a moment after its sentinel.
            if ranks is not None and (ended := ranks.why_ended()):
                connection.send((_ENDED, ended))
            continue
        try:
            asked = connection.recv()
        except EOFError:
            return
        if isinstance(asked, Meeting):
            ranks = OwnProcesses(vllm_config, context, asked, is_template=True)
        elif ranks is not None:
            ranks.end(asked)
            ranks = None
        ended = ""
        connection.send((_DONE, ranks.pids if ranks else []))
