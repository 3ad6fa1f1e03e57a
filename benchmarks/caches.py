"""Caches of steps: images per second against what they cost in quality, on the bundled model.

    python -m benchmarks.caches [--quick] [--count 200] [--steps 20 --steps 50] [--rounds 3] [--out DIR]

Quality is the bundled model's own: the share of prompts whose emoji is, of all, nearest to the picture (top-1, see
examples/models/evaluate_emoji.py; the emoji are fetched with npm the first time), and how near a picture is to the
one without a cache (PSNR; SSIM after Wang et al. 2004, doi:10.1109/TIP.2003.819861). Guided requests on two ranks,
many at once; the modes take turns within a round. Then traffic of which half has the recommended cache, against none.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks.common import EMOJI, NEGATIVE, SCALE, engine, interleave, machine, report, start
from vllm_cfg_plugin import DiffusionLLM, DiffusionParams

SIDE = 64
OFF = "off"
MODES: dict[str, dict[str, Any]] = {
    OFF: {},
    "every 2nd, reused": {"cache_interval": 2},
    "every 2nd, line": {"cache_interval": 2, "cache_order": 1},
    "every 2nd, parabola": {"cache_interval": 2, "cache_order": 2},
    "every 2nd, line, from 1/5 on": {"cache_interval": 2, "cache_order": 1, "cache_range": (0.2, 1.0)},
    "every 3rd, line": {"cache_interval": 3, "cache_order": 1},
    "every 3rd, line, from 1/5 on": {"cache_interval": 3, "cache_order": 1, "cache_range": (0.2, 1.0)},
    "every 3rd, parabola, from 1/5 on": {"cache_interval": 3, "cache_order": 2, "cache_range": (0.2, 1.0)},
    "every 4th, line, from 1/5 on": {"cache_interval": 4, "cache_order": 1, "cache_range": (0.2, 1.0)},
    "every 2nd, negative branch": {"cache_interval": 2, "cache_branches": "negative"},
    "every 4th, negative branch, line": {"cache_interval": 4, "cache_order": 1, "cache_branches": "negative"},
}
# The least gain in images per second and the most loss of top-1 of what is recommended.
LEAST_GAIN, MOST_LOSS = 1.5, 0.01
COLUMNS = ("steps", "cache", "images/s", "gain", "top-1", "PSNR, dB", "SSIM")
MIXED_COLUMNS = ("steps", "cache of half of them", "images/s, none cached", "half cached", "all cached", "half / none")


@dataclass(frozen=True)
class Quality:
    """Of all pictures of a mode; `psnr` and `ssim` are means, to the pictures without a cache."""

    top1: float
    psnr: float
    ssim: float


class Emoji:
    """The emoji that pictures are held against, and the prompts that ask for some."""

    def __init__(self, count: int) -> None:
        sys.path.insert(0, str(EMOJI.parent))
        import emoji_data
        import evaluate_emoji

        self._rank_of = evaluate_emoji.rank_of
        emoji = emoji_data.load_emoji(emoji_data.DEFAULT_CACHE)
        self._drawings = emoji_data.compose_all(emoji, emoji_data.DEFAULT_CACHE)
        self._rows = random.Random(0).sample(range(len(emoji)), min(count, len(emoji)))
        self._colors = [emoji_data.COLORS.index(emoji[row].held_out) for row in self._rows]
        self.prompts = [
            f"{emoji_data.with_article(emoji[row].name)} on a {emoji[row].held_out} background" for row in self._rows
        ]

    def quality(self, pictures: np.ndarray, uncached: np.ndarray) -> Quality:
        """Of pictures [prompts, height, width, 3], uint8."""
        named = zip(pictures, self._rows, self._colors, strict=True)
        top1 = np.mean([self._rank_of(picture, row, self._drawings[:, color]) < 1 for picture, row, color in named])
        pairs = list(zip(pictures, uncached, strict=True))
        return Quality(
            float(top1), statistics.mean(psnr(*pair) for pair in pairs), statistics.mean(ssim(*pair) for pair in pairs)
        )


def psnr(picture: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures; 99 of equal ones."""
    error = np.square(picture.astype(np.float64) - other).mean()
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(picture: np.ndarray, other: np.ndarray) -> float:
    """Mean structural similarity of two uint8 pictures: Gaussian window of 11 pixels and deviation 1.5, per channel."""
    one, two = (torch.from_numpy(each).permute(2, 0, 1)[:, None].double() for each in (picture, other))
    line = torch.exp(-torch.arange(-5, 6).double().square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(values, window)

    mean_one, mean_two = mean(one), mean(two)
    variance = mean(one * one) - mean_one**2 + mean(two * two) - mean_two**2
    covariance = mean(one * two) - mean_one * mean_two
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_one * mean_two + c1) * (2 * covariance + c2)
    return float((similarity / ((mean_one**2 + mean_two**2 + c1) * (variance + c2))).mean())


def params(mode: str, steps: int, seed: int) -> DiffusionParams:
    """Of one guided picture."""
    plain = DiffusionParams(
        height=SIDE, width=SIDE, num_inference_steps=steps, true_cfg_scale=SCALE, negative_prompt=NEGATIVE, seed=seed
    )
    return msgspec.structs.replace(plain, cache="static", **MODES[mode]) if MODES[mode] else plain


def paint(llm: DiffusionLLM, prompts: Sequence[str], modes: Sequence[str], steps: int) -> tuple[np.ndarray, float]:
    """One picture a prompt, its place being its seed and `modes` repeated along them; and pictures per second.

    Raises:
        RuntimeError: one of them failed.
    """
    asked = [params(modes[seed % len(modes)], steps, seed) for seed in range(len(prompts))]
    began = time.perf_counter()
    outputs = llm.generate(list(prompts), asked, use_tqdm=False)
    seconds = time.perf_counter() - began
    if errors := [output.error for output in outputs if output.error]:
        raise RuntimeError(errors[0])
    return np.stack([np.asarray(output.images[0]) for output in outputs]), len(prompts) / seconds


def rates(
    llm: DiffusionLLM, prompts: Sequence[str], kinds: Mapping[str, Sequence[str]], steps: int, rounds: int
) -> Any:
    """Median pictures per second of each kind of traffic, which take turns."""
    contestants = {
        name: lambda number, modes=modes: paint(llm, prompts, modes, steps)[1] for name, modes in kinds.items()
    }
    return {name: statistics.median(taken) for name, taken in interleave(contestants, rounds).items()}


def recommended(rate: Mapping[str, float], quality: Mapping[str, Quality]) -> str:
    """The fastest mode of those that gain enough and lose little; "" where there is none."""
    good = [
        mode
        for mode in rate
        if rate[mode] >= LEAST_GAIN * rate[OFF] and quality[mode].top1 >= quality[OFF].top1 - MOST_LOSS - 1e-9
    ]
    return max(good, key=rate.__getitem__, default="")


def draw(rows: Sequence[tuple[Any, ...]], path: Path) -> None:
    """Top-1 against the gain, a point a mode and a colour a number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    for steps in dict.fromkeys(row[0] for row in rows):
        points = [row for row in rows if row[0] == steps]
        axes.scatter([row[3] for row in points], [100 * row[4] for row in points], label=f"{steps} steps")
        for _, mode, _, gain, top1, *_ in points:
            axes.annotate(mode, (gain, 100 * top1), (4, 3), textcoords="offset points", fontsize=7)
        axes.axhline(100 * (points[0][4] - MOST_LOSS), color=f"C{len(axes.lines)}", linewidth=0.8, linestyle=":")
    axes.axvline(LEAST_GAIN, color="grey", linewidth=0.8)
    axes.set(xlabel="images/s against those without a cache", ylabel="top-1, %")
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--count", type=int, help="prompts whose pictures are held against the emoji (default 200)")
    parser.add_argument("--at-once", type=int, default=32, help="requests at once where speed is measured")
    parser.add_argument("--steps", type=int, action="append", help="denoising steps; repeatable (default 20 and 50)")
    args = parser.parse_args()
    emoji = Emoji(args.count or (8 if args.quick else 200))
    rounds, at_once = args.rounds or (1 if args.quick else 3), emoji.prompts[: args.at_once]
    on, rows, mixed = machine(), [], []
    with engine(str(EMOJI), 2) as llm:
        for steps in args.steps or ([6] if args.quick else [20, 50]):
            rate = rates(llm, at_once, {mode: [mode] for mode in MODES}, steps, rounds)
            pictures = {mode: paint(llm, emoji.prompts, [mode], steps)[0] for mode in MODES}
            quality = {mode: emoji.quality(pictures[mode], pictures[OFF]) for mode in MODES}
            for mode, of_mode in quality.items():
                gain = rate[mode] / rate[OFF]
                rows.append((steps, mode, rate[mode], gain, of_mode.top1, of_mode.psnr, of_mode.ssim))
            best = recommended(rate, quality)
            print(f"{steps} steps: recommended is {best or 'none'}", flush=True)
            mode = best or max((name for name in MODES if name != OFF), key=lambda name: quality[name].top1)
            kinds = {"none": [OFF], "half": [OFF, mode], "all": [mode]}
            of_kind = rates(llm, at_once, kinds, steps, rounds)
            mixed.append((steps, mode, *(of_kind[kind] for kind in kinds), of_kind["half"] / of_kind["none"]))
    report("caches", args.out, on, COLUMNS, rows)
    report("caches_mixed", args.out, on, MIXED_COLUMNS, mixed)
    if args.out:
        draw(rows, args.out / "caches.png")


if __name__ == "__main__":
    main()
