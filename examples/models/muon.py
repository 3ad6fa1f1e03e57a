"""Muon: momentum whose step is made orthogonal, for weight matrices. Matrices of one shape are stepped together."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return, for a stack of wide matrices, ones with the same singular vectors and singular values near one."""
    a, b, c = NEWTON_SCHULZ
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()  # rounding here does no harm
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; a step's size is set to what AdamW would take (0.2 an entry)."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor, bool]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:  # the last block's text output, which nothing reads
                    continue
                average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"])
                tall = update.shape[0] > update.shape[1]
                update = update.T if tall else update
                by_shape[tuple(update.shape)].append((parameter, update, tall))
            for shape, entries in by_shape.items():
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                for (parameter, _, tall), update in zip(
                    entries, orthogonalize(torch.stack([e[1] for e in entries])), strict=True
                ):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.T if tall else update, alpha=-size)
