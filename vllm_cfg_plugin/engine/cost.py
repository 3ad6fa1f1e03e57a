"""What work costs on one rank: the model that the planner and the simulator predict with, and how it is fitted.

The figures are measured at start-up by `worker/calibration.py`, never set by hand. Must not import torch or vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Annotated

import msgspec
import numpy as np

# Doubling a pack must lower the time per token by this share to be worth everybody's waiting.
WORTHWHILE_GAIN = 0.025
# Measurements lie on a line if none is off by a larger share.
LINE_TOLERANCE = 0.15


Cost = Annotated[float, msgspec.Meta(ge=0)]  # microseconds


class CostModel(msgspec.Struct, frozen=True, kw_only=True):
    """Coefficients in microseconds on one rank.

    A packed forward of sequences of n tokens takes `step_us` plus the sum of their `forward(n)`.

    Attributes:
        step_us: once per rank and step that forwards anything.
        token_us, square_us: per token (image and text) of a sequence, and per token squared (attention).
        encode_us, encode_token_us: per text, and per token of it.
        decode_us, decode_token_us: per image, and per token of it.
    """

    step_us: Cost
    token_us: Cost
    square_us: Cost
    encode_us: Cost
    encode_token_us: Cost
    decode_us: Cost
    decode_token_us: Cost

    def forward(self, tokens: int) -> int:
        """Microseconds that one sequence adds to a packed forward; at least 1."""
        return max(1, int(tokens * (self.token_us + self.square_us * tokens) + 0.5))

    def encode(self, text_tokens: int) -> int:
        """Microseconds to encode one text; at least 1."""
        return max(1, int(self.encode_us + self.encode_token_us * text_tokens + 0.5))

    def decode(self, image_tokens: int) -> int:
        """Microseconds to decode one image; at least 1."""
        return max(1, int(self.decode_us + self.decode_token_us * image_tokens + 0.5))


# Every token costs 1: what holds where nothing was measured.
UNCALIBRATED = CostModel(
    step_us=0, token_us=1, square_us=0, encode_us=0, encode_token_us=1, decode_us=0, decode_token_us=1
)


class PackSample(msgspec.Struct, frozen=True):
    """One measured packed forward.

    Attributes:
        lengths: tokens (image and text) of each sequence.
        us: microseconds it took.
    """

    lengths: tuple[int, ...]
    us: float

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def fit_forward(samples: Sequence[PackSample]) -> tuple[float, float, float]:
    """(step_us, token_us, square_us) of measured packs."""
    rows = [(sample.tokens, 1, sum(n * n for n in sample.lengths)) for sample in samples]
    token_us, step_us, square_us = fit_non_negative(rows, [sample.us for sample in samples])
    return step_us, token_us, square_us


def fit_line(samples: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(fixed, per token) of measured (tokens, microseconds)."""
    per_token, fixed = fit_non_negative([(tokens, 1) for tokens, _ in samples], [us for _, us in samples])
    return fixed, per_token


def fit_non_negative(rows: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """Least squares of relative errors with coefficients from 0 up: the best of all subsets of the columns.

    Relative, so that a short forward counts as much as a long one. Where there are too few measurements to tell
    subsets apart, the one with the fewest and then the first columns wins.

    Args:
        rows: one row of factors per measurement.
        times: what was measured; above 0, at least one.
    """
    measured = np.asarray(times, dtype=float)
    matrix = np.asarray(rows, dtype=float) / measured[:, None]
    count = matrix.shape[1]
    best, least = [0.0] * count, math.inf
    for size in range(1, min(count, len(times)) + 1):
        for columns in combinations(range(count), size):
            scale = np.abs(matrix[:, columns]).max(axis=0)
            solution, _, rank, _ = np.linalg.lstsq(matrix[:, columns] / scale, np.ones(len(measured)), rcond=None)
            error = float(np.square(matrix[:, columns] / scale @ solution - 1).sum())
            if rank == size and (solution >= 0).all() and error < least - 1e-9:
                best, least = [0.0] * count, error
                for column, value in zip(columns, solution / scale, strict=True):
                    best[column] = float(value)
    return best


def find_token_budget(samples: Sequence[PackSample]) -> int:
    """Where time per token stops falling: the smallest pack from which doubling it lowers that by less than 2.5 %.

    Measurements that lie on one line are judged by that line, which evens out their noise. Others (an accelerator takes
    the same time for every small pack) are judged as they are. The result is at most twice the largest pack measured.

    Args:
        samples: packs of different numbers of sequences of one length; at least one.
    """
    ordered = sorted(samples, key=lambda sample: sample.tokens)
    step_us, token_us = fit_line([(sample.tokens, sample.us) for sample in ordered])
    if any(abs(step_us + token_us * sample.tokens - sample.us) > LINE_TOLERANCE * sample.us for sample in ordered):
        return _measured_budget(ordered)
    # Doubling n tokens gains g where (step / 2 + token * n) = (1 - g) * (step + token * n).
    gain = WORTHWHILE_GAIN
    smallest, largest = ordered[0].tokens, 2 * ordered[-1].tokens
    tokens = step_us * (1 - 2 * gain) / (2 * gain * token_us) if token_us else largest
    return round(min(max(tokens, smallest), largest))


def _measured_budget(ordered: Sequence[PackSample]) -> int:
    """A doubling is judged by all larger packs, so that one disturbed measurement does not end the search early."""
    for sample in ordered[:-1]:
        if not any(_gains(sample, larger) for larger in ordered if larger.tokens > sample.tokens):
            return sample.tokens
    return 2 * ordered[-1].tokens


def _gains(small: PackSample, large: PackSample) -> bool:
    """Whether going from one pack to a larger one lowers time per token by 2.5 % or more for every doubling."""
    doublings = math.log2(large.tokens / small.tokens)
    return large.us / large.tokens <= small.us / small.tokens * math.pow(1 - WORTHWHILE_GAIN, doublings)
