"""How a step is made of a direction: local optimizers and rates, as values that a method or a setting names.

An optimizer is frozen, and moves many clients at once: its tensors have the clients as first axis, [K, ...]. What it
remembers from step to step is a list of such tensors, which begins anew with every descent, as is usual where clients
hold nothing between rounds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom.errors import UsageError
from fedloom.members import Registry
from fedloom.parsing import Term, bound
from fedloom.ranges import Positive, settle

Tensors = list[Tensor] | tuple[Tensor, ...]
Again = Callable[[Sequence[Tensor]], Tensors]  # the direction on the same batch at other points
Rate = float | Tensor  # of all clients, or one each, [K]


@dataclass(frozen=True)
class Linear:
    """A rate that falls (or rises) evenly within a descent: step k of K at `start + k / K (end - start)`.

    It begins anew with every descent and never quite arrives. `mean(K)` is the mean of its K rates.

    Examples:
        >>> rate = Linear(0.2, 0.1)
        >>> [rate.at(k, 4) for k in range(4)], rate.mean(4)
        ([0.2, 0.175, 0.15, 0.125], 0.1625)
    """

    start: float
    end: float

    def at(self, step: int, steps: int) -> float:
        """The rate of a step, numbered from 0, of so many."""
        return self.start + step / steps * (self.end - self.start)

    def mean(self, steps: int) -> float:
        """The mean rate of so many steps."""
        return self.start + (steps - 1) / (2 * steps) * (self.end - self.start)


@dataclass(frozen=True)
class Optimizer(ABC):
    """A rule by which directions become steps. Fields are its options, as in `adam:beta1=0.9`."""

    clients_apart: ClassVar[bool] = True  # tensors are [K, ...], and [1, ...] of one client; False: of any shape
    looks_back: ClassVar[bool] = False  # it asks for the direction at earlier points

    def __post_init__(self) -> None:
        settle(self, type(self).__name__)
        for name in ("momentum", "beta1", "beta2"):  # weights of what was before
            if not getattr(self, name, 0.0) < 1:
                raise UsageError(f"{type(self).__name__}:{name} is {getattr(self, name)}; it must be below 1")

    def start(self, at: Tensors) -> list[Tensor]:
        """What it remembers before the first step of parameters like these."""
        return []

    @abstractmethod
    def step(self, at: Tensors, d: Tensors, rate: Rate, memory: list[Tensor], again: Again | None) -> None:
        """Moves the parameters `at`, and what it remembers, in place. `again` is None before anybody's second step."""


@dataclass(frozen=True)
class SGD(Optimizer):
    """`at -= rate * d`, through a heavy ball `m = momentum * m + d` if there is momentum (as `torch.optim.SGD`)."""

    momentum: float = 0.0

    clients_apart = False

    def start(self, at: Tensors) -> list[Tensor]:
        return [torch.zeros_like(tensor) for tensor in at] if self.momentum else []

    def step(self, at: Tensors, d: Tensors, rate: Rate, memory: list[Tensor], again: Again | None) -> None:
        if self.momentum:
            torch._foreach_mul_(memory, self.momentum)
            torch._foreach_add_(memory, d)
            d = memory
        _descend(at, d, rate)


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam [Kingma, Ba 2015, arXiv 1412.6980], step for step as `torch.optim.Adam`; `weight_decay` is AdamW's.

    That decay is decoupled from the gradient [Loshchilov, Hutter 2019, arXiv 1711.05101]: `at -= rate * decay * at`.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: Positive[float] = 1e-8
    weight_decay: float = 0.0

    def start(self, at: Tensors) -> list[Tensor]:
        return [at[0].new_zeros(len(at[0])), *map(torch.zeros_like, at), *map(torch.zeros_like, at)]

    def step(self, at: Tensors, d: Tensors, rate: Rate, memory: list[Tensor], again: Again | None) -> None:
        count, first, second = memory[0], memory[1 : 1 + len(at)], memory[1 + len(at) :]
        count += 1
        torch._foreach_lerp_(first, d, 1 - self.beta1)
        torch._foreach_mul_(second, self.beta2)
        torch._foreach_addcmul_(second, d, d, 1 - self.beta2)
        if self.weight_decay:
            _descend(at, torch._foreach_mul(at, self.weight_decay), rate)
        scale = (1 - self.beta2**count).sqrt()
        change = [m / (v.sqrt() / _over(scale, v) + self.eps) for m, v in zip(first, second, strict=True)]
        _descend(at, change, rate / (1 - self.beta1**count))


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """Adagrad [Duchi, Hazan, Singer 2011]: `at -= rate * d / (sqrt(sum of d^2) + eps)` (as `torch.optim.Adagrad`)."""

    eps: Positive[float] = 1e-10

    clients_apart = False

    def start(self, at: Tensors) -> list[Tensor]:
        return list(map(torch.zeros_like, at))

    def step(self, at: Tensors, d: Tensors, rate: Rate, memory: list[Tensor], again: Again | None) -> None:
        torch._foreach_addcmul_(memory, d, d)
        _descend(at, [g / (v.sqrt() + self.eps) for g, v in zip(d, memory, strict=True)], rate)


@dataclass(frozen=True)
class DeltaSGD(Optimizer):
    """A step size of each client's own, from the smoothness that it measures as it goes [Delta-SGD, arXiv 2306.11201].

    The rate given is eta_0, that of the first step. From the second on, with the change of the point y and that of the
    direction g on the same batch, lengths being those of all parameters together:

        eta <- min(gamma |y_k - y_{k-1}| / (2 |g(y_k) - g(y_{k-1})|), sqrt(1 + delta theta) eta) + eps
        theta <- eta / (eta before), 1 at first

    Where one of the two has not changed, only the second candidate counts, without eps.
    """

    gamma: Positive[float] = 2.0  # the paper's; the code's damping is 2 / gamma
    delta: float = 0.1  # the paper's; the code's default is 0.02
    eps: float = 1e-8  # the code's

    looks_back = True

    def start(self, at: Tensors) -> list[Tensor]:
        zeros, ones = at[0].new_zeros(len(at[0])), at[0].new_ones(len(at[0]))
        return [zeros, ones, *(tensor.clone() for tensor in at)]  # eta, theta, the point before

    def step(self, at: Tensors, d: Tensors, rate: Rate, memory: list[Tensor], again: Again | None) -> None:
        eta, theta, before = memory[0], memory[1], memory[2:]
        now = torch.zeros_like(eta) + rate
        if again is not None:
            moved = _lengths(torch._foreach_sub(at, before))
            turned = _lengths(torch._foreach_sub(d, again(before)))
            grown = torch.sqrt(1 + self.delta * theta) * eta
            smooth = torch.minimum(self.gamma * moved / (2 * turned), grown) + self.eps
            later = torch.where((moved > 0) & (turned > 0), smooth, grown)
            now = torch.where(eta > 0, later, now)  # clients in their first step have no rate behind them
            theta.copy_(torch.where(eta > 0, now / eta, theta))
        eta.copy_(now)
        for tensor, here in zip(before, at, strict=True):
            tensor.copy_(here)
        _descend(at, d, eta)


def _descend(at: Tensors, d: Tensors, rate: Rate) -> None:
    """`at -= rate * d`, in place."""
    if not isinstance(rate, Tensor):
        torch._foreach_add_(at, d, alpha=-rate)
        return
    for tensor, change in zip(at, d, strict=True):
        tensor.sub_(_over(rate, tensor) * change)


def _over(numbers: Tensor, tensor: Tensor) -> Tensor:
    """One number a client, [K], in a shape that goes with a tensor [K, ...]."""
    return numbers.view(-1, *[1] * (tensor.dim() - 1))


def _lengths(tensors: Tensors) -> Tensor:
    """The Euclidean length of all tensors together, of each client: [K]."""
    return torch.stack([tensor.flatten(1).square().sum(1) for tensor in tensors]).sum(0).sqrt()


OPTIMIZERS: Registry[type[Optimizer]] = Registry(
    "optimizer",
    "fedloom.optimizers",
    {"sgd": SGD, "adam": Adam, "adagrad": Adagrad, "delta_sgd": DeltaSGD},
    Optimizer,
)


def optimizer(text: str) -> Optimizer:
    """An optimizer from its text, `NAME` or `NAME:OPTION=VALUE,...`; raises UsageError with what is wrong in it."""
    term = Term(text)
    cls = OPTIMIZERS[term.name]
    return cls(**bound(term, cls))
