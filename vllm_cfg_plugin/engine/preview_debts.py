"""Who asks for previews pays for them: its request sits steps out until the others have their time back. Pure.

A preview is a decode beside the steps, on a core or GPU that the steps want too, and the other ranks wait for the rank
that makes it. So it costs everybody who steps as long as it takes; and a step that one request sits out is shorter for
the others by that request's share. Who steps alone, or beside others that stream, sits nothing out: nobody would gain.
Must not import vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Collection

from vllm_cfg_plugin.engine.request import ScheduledRequest


def note_preview(request: ScheduledRequest) -> None:
    """A rank is told to make a preview of a request that runs."""
    request.owed_us += request.cost.decode(request.spec.image_tokens)


def sit_out(running: Collection[ScheduledRequest], tick: int, ranks: int) -> list[ScheduledRequest]:
    """Those of the running requests that take no step now; what each owes falls by what that spares the others."""
    owing = [request for request in running if request.owed_us > 0]
    if all(request.spec.previews for request in running):
        for request in owing:
            request.owed_us = 0
        return []
    resting = []
    for request in owing:
        branches = request.branches_at(tick)
        spared_us = max(1, sum(request.costs[:branches]) // ranks)
        if branches and 2 * request.owed_us >= spared_us:  # to the nearest step
            request.owed_us -= spared_us
            request.first_tick += 1
            resting.append(request)
    return resting
