"""What `Node.grad` and `Node.descend` are asked for, and the step that the latter repeats, of one client or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedloom.task import Batch, Data
    from fedloom.vector import Vector

Tensors = list[Tensor] | tuple[Tensor, ...]
Loss = Callable[[nn.Module, "Batch"], Tensor]
Only = str | tuple[str, ...] | None  # shell patterns of the parameters that move; None: all


@dataclass(frozen=True, eq=False)
class Slope:
    """The arguments of `Node.grad`."""

    w: Vector
    batch: Batch
    loss: Loss
    only: Only
    statistics: bool


@dataclass(frozen=True, eq=False)
class Descent:
    """The arguments of `Node.descend`."""

    w: Vector
    lr: float
    epochs: int | None
    steps: int | None
    batch: int | None
    loss: Loss
    correct: Vector | Callable[[Vector], Vector] | None
    momentum: float
    weight_decay: float
    clip: float | None
    only: Only
    data: Data | None

    def step(self, at: list[Tensor], gradient: Tensors, terms: Sequence[Tensors], velocity: list[Tensor]) -> None:
        """Moves the parameters `at` in place: `at -= lr * (gradient + terms + weight_decay * at)`, with momentum.

        `velocity` is the heavy ball, empty before the first step, and is moved in place too.
        """
        d: Tensors = gradient
        for term in terms:
            d = torch._foreach_add(d, term)
        if self.weight_decay:
            d = torch._foreach_add(d, at, alpha=self.weight_decay)
        if self.momentum:
            if not velocity:
                velocity += [torch.zeros_like(tensor) for tensor in at]
            torch._foreach_mul_(velocity, self.momentum)
            torch._foreach_add_(velocity, d)
            d = velocity
        torch._foreach_add_(at, d, alpha=-self.lr)
