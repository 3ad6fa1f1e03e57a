"""Every family against diffusers' own pipeline: the same weights, seed and steps, on one cfg rank and on two.

    python -m benchmarks.parity            # or `make parity`

Tiny random-weight checkpoints of each class run through the engine's steps (scheduler, planner, packed forwards,
exchange) in float32 on gloo ranks. One row per request: the largest difference of its final latents from diffusers',
and whether they are the same bits on one rank and on two, alone and in a batch with the family's other requests. Of
pipelines that run as diffusers' own the difference is a share of the latents' deviation, as their scale is any.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.common import machine, report, start
from tests.any_pipelines import ANY_PIPELINES, MASKED
from tests.distributed.engine_ranks import run_ranks
from tests.families import FAMILIES, STEPS, Family, call, load

COLUMNS = ("model", "mode", f"max abs diff to diffusers, {STEPS} steps", "cfg 1 = cfg 2", "alone = batched")


def compare(family: Family, folder: Path) -> Iterator[tuple[str, str, float, str, str]]:
    """The rows of one family."""
    model = family.build(folder / "model")
    requests = family.requests(model)
    scripts = {f"alone-{request.seed}": [(0, request)] for request in requests}
    scripts["batched"] = [(i, request) for i, request in enumerate(requests)]
    one, two = (run_ranks(model, ranks, scripts, folder)[0] for ranks in (1, 2))
    reference, ours = family.reference(model), load(model)
    for case, request in zip(family.cases, requests, strict=True):
        alone = [traces[f"alone-{request.seed}"][request.seed] for traces in (one, two)]
        batched = [traces["batched"][request.seed] for traces in (one, two)]
        expected = call(reference, case, request.seed)
        difference = family.difference(family.to_reference(ours, batched[1][-1], request), expected)
        across = _same(alone[0], alone[1]) and _same(batched[0], batched[1])
        together = _same(alone[0], batched[0]) and _same(alone[1], batched[1])
        yield family.label, case.mode, difference, _bits(across), _bits(together)


def _same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    """Whether the latents after every step are equal."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _bits(same: bool) -> str:
    return "bitwise" if same else "DIFFERENT"


def main() -> int:
    parser = start(__doc__)
    parser.add_argument("--model", action="append", help="class name of a family; may be repeated (default: all)")
    args = parser.parse_args()
    compared = [*FAMILIES, *(family for family in ANY_PIPELINES if family.class_name not in MASKED)]
    chosen = [family for family in compared if not args.model or family.class_name in args.model]
    on = machine()
    rows, broken = [], 0
    for family in chosen:
        with tempfile.TemporaryDirectory(prefix="parity-") as folder:
            for row in compare(family, Path(folder)):
                rows.append(row)
                broken += row[2] > family.tolerance or "DIFFERENT" in row[3:]
    report("parity", args.out, on, COLUMNS, rows)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
