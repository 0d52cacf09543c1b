"""What `Node.grad` and `Node.descend` are asked for, and the direction of a step, of one client or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from fedloom.optimizers import Linear, Optimizer, Tensors

if TYPE_CHECKING:
    from fedloom.task import Batch, Data
    from fedloom.vector import Vector

Loss = Callable[[nn.Module, "Batch"], Tensor]
Wrap = Callable[[Loss, nn.Module, "Batch"], Tensor]
Only = str | tuple[str, ...] | None  # shell patterns of the parameters that move; None: all


@dataclass(frozen=True)
class Wrapped:
    """A loss in place of another: `wrap(loss, net, batch)`. Two of the same parts are one loss."""

    wrap: Wrap
    loss: Loss

    def __call__(self, net: nn.Module, batch: Batch) -> Tensor:
        return self.wrap(self.loss, net, batch)


class Guard(Protocol):
    """Who draws a node's batches and takes its gradients in its stead, so that they are private."""

    def read(self, what: str) -> NoReturn:
        """A method looks at data beside the batches: raises an error."""

    def batches(
        self, node: Any, batch: int | None, epochs: int | None, steps: int | None, given: Data | None
    ) -> Iterator[Any]:
        """The batches that the arguments of `Node.batches` ask for."""

    def gradient(
        self, node: Any, net: nn.Module, params: Sequence[Tensor], loss: Loss, batch: Any
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """A batch's mean loss, and its gradient by each of the parameters."""


class Meeting(Protocol):
    """Where nodes wait for each other, so that their work is done together."""

    def descend(self, node: Any, job: Descent) -> tuple[Vector, int]:
        """What `Node.descend` gives, once it is done."""

    def grad(self, node: Any, job: Slope) -> Vector:
        """What `Node.grad` gives, once it is done."""


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
    lr: float | Linear
    epochs: int | None
    steps: int | None
    batch: int | None
    loss: Loss
    correct: Vector | Callable[[Vector], Vector] | None
    optimizer: Optimizer
    weight_decay: float
    clip: float | None
    only: Only
    data: Data | None

    def direction(self, at: Tensors, gradient: Tensors, terms: Sequence[Tensors]) -> Tensors:
        """Where a step leads from the parameters `at`: gradient + terms + weight_decay * at."""
        for term in terms:
            gradient = torch._foreach_add(gradient, term)
        return torch._foreach_add(gradient, at, alpha=self.weight_decay) if self.weight_decay else gradient

    def clipped(self, gradient: Tensors) -> Tensors:
        """A gradient of the loss, no longer than `clip`."""
        if self.clip is None:
            return gradient
        return torch._foreach_mul(gradient, torch.clamp(self.clip / torch.nn.utils.get_total_norm(gradient), max=1.0))

    def rate(self, step: int, steps: int) -> float:
        """The rate of a step, numbered from 0, of so many."""
        return self.lr.at(step, steps) if isinstance(self.lr, Linear) else self.lr
