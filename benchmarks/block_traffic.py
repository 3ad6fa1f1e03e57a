"""What a block of Qwen-Image does between its products: bytes that kernels move, as torch runs them and as compiled.

    python -m benchmarks.block_traffic

Counted on the meta device, at the real width: nothing is computed, no GPU is needed, and no time is measured.
Beside it what is left when nothing is moved twice: each product's and attention's inputs are written once and their
outputs read once, which is the least that compiling whole blocks could come to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from diffusers import QwenImageTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import markdown_table
from vllm_cfg_plugin.memory.tracking import FusedAttention
from vllm_cfg_plugin.pipelines.common import fused
from vllm_cfg_plugin.pipelines.qwen_image.transformer import PackedQwenImageTransformer

META = torch.device("meta")
TEXT = 128  # tokens
DIM, HIDDEN = 3072, 4 * 3072
PRODUCTS = {"mm", "addmm"}


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, beside products and attention.

    Attributes:
        moved: bytes by operation.
        kernels: their number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self._is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, returns = func._schema.name.removeprefix("aten::"), func._schema.returns
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
        is_free = is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "detach"))
        if not self._is_paused and not is_free and name not in PRODUCTS:
            self._count(name, (args, kwargs), out)
        return out

    def _count(self, name: str, read: Any, written: Any) -> None:
        self.moved[name] += _bytes(read) + _bytes(written)
        self.kernels[name] += 1

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function as one kernel."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._is_paused = True
            out = function(*args, **kwargs)
            self._is_paused = False
            self._count(function.__name__, (args, kwargs), args[0] if out is None else out)
            return out

        return run


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


@contextmanager
def _counting(traffic: Traffic, is_compiled: bool) -> Iterator[None]:
    """As a GPU runs it: attention and norms of queries and keys are one kernel each in any case."""
    rms_norm = patch.object(torch.nn.functional, "rms_norm", traffic.compiled(torch.nn.functional.rms_norm))
    is_enabled = patch.object(fused, "is_enabled", lambda device: is_compiled)
    with rms_norm, is_enabled, patch.object(fused, "compiled", traffic.compiled), FusedAttention(), traffic:
        yield


def block_traffic(side: int, requests: int, is_compiled: bool) -> Traffic:
    """Of one block in a pack of requests of side x side pixels."""
    counted = []
    for layers in (2, 3):  # what is outside of blocks is in both
        with META:
            model = QwenImageTransformer2DModel(num_layers=layers)
        model = PackedQwenImageTransformer.adopt(torch.nn.Module.to(model, torch.bfloat16).eval())
        grid, traffic = side // 16, Traffic()
        with torch.no_grad(), _counting(traffic, is_compiled):
            model(
                torch.empty(1, requests * grid**2, 64, device=META, dtype=torch.bfloat16),
                torch.empty(1, requests * TEXT, 3584, device=META, dtype=torch.bfloat16),
                timestep=torch.linspace(0.9, 0.1, requests, dtype=torch.bfloat16),
                img_shapes=[(1, grid, grid)] * requests,
                txt_seq_lens=[TEXT] * requests,
            )
        counted.append(traffic)
    fewer, more = counted
    more.moved.subtract(fewer.moved)
    more.kernels.subtract(fewer.kernels)
    return more


def least_bytes(side: int, requests: int) -> int:
    """Where each input of a product or of attention is written once, and each output read once."""
    rows = requests * ((side // 16) ** 2 + TEXT)
    inputs = DIM + 3 * DIM + DIM + DIM + HIDDEN  # of the products to q, k, v; attention; its output; the MLP's two
    outputs = 3 * DIM + DIM + DIM + HIDDEN + DIM
    streams = 4 * DIM  # read and written, twice
    return 2 * rows * (inputs + outputs + streams)


def product_flops(side: int, requests: int) -> float:
    rows, image = requests * ((side // 16) ** 2 + TEXT), (side // 16) ** 2 + TEXT
    return 2 * rows * DIM * (4 * DIM + 2 * HIDDEN) + 4 * requests * image**2 * DIM


def main() -> None:
    rows = []
    for side, requests in ((1024, 2), (512, 8), (256, 8)):
        plain, compiled = (block_traffic(side, requests, is_compiled) for is_compiled in (False, True))
        rows.append(
            (
                f"{requests} of {side}x{side}",
                f"{product_flops(side, requests) / 1e12:.2f}",
                *(f"{own.moved.total() / 1e6:.0f} in {own.kernels.total()}" for own in (plain, compiled)),
                f"{least_bytes(side, requests) / 1e6:.0f}",
            )
        )
    print(
        markdown_table(
            ("requests", "products, TFLOP", "as it is, MB in kernels", "-O1, MB in kernels", "least, MB"), rows
        )
    )


if __name__ == "__main__":
    main()
