"""How long the planner takes and how near its plans come to the lower bound: a markdown table.

    python benchmarks/planner.py --ranks 2 4 8 --items 8 32 256

Every figure is a median over plans of different random costs (two in three forwards are of three common sizes). "worst"
is the heaviest rank's load over the larger of the mean load and the largest item, the worst of all plans.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

from vllm_cfg_plugin.engine.planner import Item, level, rank_loads

Start = Callable[[random.Random, int, int], list[Item]]  # (random, items, ranks)


def forward_cost(rng: random.Random) -> int:
    return rng.choice((5_000, 14_000, 60_000)) if rng.random() < 2 / 3 else rng.randrange(4_000, 80_000)


def anywhere(ranks: int) -> frozenset[int]:
    return frozenset(range(ranks))


def balanced(rng: random.Random, items: int, ranks: int) -> list[Item]:
    costs = [forward_cost(rng) for _ in range(-(-items // ranks))]
    return [Item(costs[i // ranks], i % ranks, anywhere(ranks)) for i in range(items)]


def all_on_one(rng: random.Random, items: int, ranks: int) -> list[Item]:
    return [Item(forward_cost(rng), 0, anywhere(ranks)) for _ in range(items)]


def random_owners(rng: random.Random, items: int, ranks: int) -> list[Item]:
    return [Item(forward_cost(rng), rng.randrange(ranks), anywhere(ranks)) for _ in range(items)]


def two_ranks_each(rng: random.Random, items: int, ranks: int) -> list[Item]:
    held = [rng.sample(range(ranks), 2) for _ in range(items)]
    return [Item(forward_cost(rng), pair[0], frozenset(pair)) for pair in held]


STARTS: dict[str, Start] = {
    "balanced": balanced,
    "all on rank 0": all_on_one,
    "random owners": random_owners,
    "random, text on 2 ranks each": two_ranks_each,
}


def measure(start: Start, items: int, ranks: int, plans: int) -> tuple[float, float, float]:
    """Median microseconds of one plan, and the median and the worst ratio of its makespan to the lower bound."""
    rng = random.Random(0)
    microseconds, ratios = [], []
    for _ in range(plans):
        problem = start(rng, items, ranks)
        began = time.perf_counter()
        owners = level(problem, ranks)
        microseconds.append(1e6 * (time.perf_counter() - began))
        costs = [item.cost for item in problem]
        ratios.append(max(rank_loads(costs, owners, ranks)) / max(sum(costs) / ranks, *costs))
    return statistics.median(microseconds), statistics.median(ratios), max(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[8, 32, 256])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--plans", type=int, default=300, help="plans of each row")
    args = parser.parse_args()
    print("| items | ranks | start | us, median | load / bound, median | worst |\n|---|---|---|---|---|---|")
    for items in args.items:
        for ranks in args.ranks:
            for name, start in STARTS.items():
                took, ratio, worst = measure(start, items, ranks, args.plans)
                print(f"| {items} | {ranks} | {name} | {took:.0f} | {ratio:.3f} | {worst:.3f} |")


if __name__ == "__main__":
    main()
