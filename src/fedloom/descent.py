"""What `Node.grad` and `Node.descend` are asked for, and the step that the latter repeats, of one client or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedloom.task import Batch, Data
    from fedloom.vector import Vector

Tensors = list[Tensor] | tuple[Tensor, ...]
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
