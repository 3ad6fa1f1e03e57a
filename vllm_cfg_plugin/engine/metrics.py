"""What happened to one request, as the user is told; must not import torch or vLLM."""

from __future__ import annotations

import msgspec


class RequestMetrics(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What happened to one request; times in milliseconds.

    Attributes:
        queue_ms: from arrival in the engine until its first step was planned.
        encode_ms, decode_ms: text encoding (slowest rank) and latents to pixels.
        denoise_ms: from the start of its first step to the end of its last, shared with whatever ran beside it.
        e2e_time_ms: from the call in the front end to the image; filled in there.
        steps: denoising steps done.
        computed_steps: of each branch those in which it was forwarded, and reused_steps: those in which the request's
            cache stood in for that.
        seed: the seed used.
        guided: whether classifier-free guidance was on, and `guidance_off`: why not, if it was asked for.
    """

    queue_ms: float = 0.0
    encode_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    e2e_time_ms: float = 0.0
    steps: int = 0
    computed_steps: list[int] = []
    reused_steps: list[int] = []
    seed: int = 0
    guided: bool = False
    guidance_off: str = ""
