"""Programs that end while the thread that receives the engine's answers frees the last image's message.

    python exit_race.py MODEL OUT [OUT ...]

One for each OUT, which it prints to; the one whose name is `close` closes its engine. They are forked, so that the
imports are done once, and each ends as an interpreter does. The delays make certain what is otherwise a race of
microseconds; see `vllm_cfg_plugin.compat.engines.end_output_thread`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from typing import Any

from vllm.v1.serial_utils import MsgpackDecoder

from vllm_cfg_plugin import DiffusionLLM, DiffusionParams

HOLD_S = 2.0

decode = MsgpackDecoder.decode
messages: list[weakref.ref] = []
held: list[float] = []


def hold(_: weakref.ref) -> None:
    """Be without the GIL for a while, within the destructor of the tensor that lies in the message."""
    if threading.current_thread().name == "EngineCoreOutputQueueThread":
        held.append(time.monotonic())
        os.write(1, b"<freed>\n")
        time.sleep(HOLD_S)


def watching_decode(self: MsgpackDecoder, frames: Any) -> Any:
    if isinstance(frames, list):
        messages.extend(weakref.ref(frame, hold) for frame in frames[1:])  # tensors come after the first frame
    return decode(self, frames)


class SlowEnd:
    """Keeps the interpreter from ending before the receiver wakes up, with the GIL and without any global."""

    def __del__(self, clock=time.monotonic, held=held, hold_s=HOLD_S) -> None:
        while held and clock() < held[-1] + hold_s + 0.5:
            pass


def run(model: str, out: str) -> None:
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.slow_end = SlowEnd()
    MsgpackDecoder.decode = watching_decode
    llm = DiffusionLLM(model, cfg_parallel_size=1)
    params = DiffusionParams(num_inference_steps=2, height=64, width=64)
    print("error:", llm.generate("a", params, use_tqdm=False)[0].error)
    print("<done>", flush=True)
    if os.path.basename(out) == "close":
        llm.close()


if __name__ == "__main__":
    pids = []
    for out in sys.argv[2:]:
        pids.append(os.fork())
        if not pids[-1]:
            run(sys.argv[1], out)
            sys.exit()
    for pid in pids:
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
