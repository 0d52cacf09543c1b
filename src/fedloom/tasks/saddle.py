"""Saddle points: a minimising and a maximising block of numbers, with known solutions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedloom.errors import UsageError
from fedloom.random import stream
from fedloom.task import Batch, Data, Task

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec
    from fedloom.vector import Vector

KINDS = ("bilinear", "regression")


class Saddle(Task):
    """min over u, max over v of the mean over all clients' samples of f(u, v; sample), in double precision.

    `bilinear`:   f = u' A v + b' u - c' v + reg / 2 (|u|^2 - |v|^2); a sample is A with scattered entries, b and c.
    `regression`: f = 1 / 2 (u' (a + v) - t)^2 + reg / 2 |u|^2 - 4 / 2 |v|^2: least squares of t on a, all of whose rows
    an adversary shifts by v [robust linear regression, as in arXiv 2103.10901].

    `offers` "saddle": `maximised` names the block whose gradient a method has to turn round. A sample's row is what f
    needs of it, flattened. The measure `solved` is the share of the operator's norm at the start that is gone.
    """

    classes = 0
    maximised = "head.*"
    goal = ("solved", 0.5)
    judges_values = True  # the point itself

    def __init__(
        self,
        kind: str = "bilinear",
        width: int = 10,
        sizes: Sequence[int] = (4,) * 8,
        reg: float = 0.1,
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise UsageError(f"a saddle problem of the kind {kind!r}; expected {' or '.join(KINDS)}")
        self.kind, self.width, self.reg = kind, width, reg
        self.population = len(sizes)
        self.spans = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        draw = stream(seed, "saddle", kind)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        n = self.spans[-1]
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        if kind == "bilinear":
            coupling = normal(width, width) / width**0.5
            per_client = coupling + 0.5 * normal(len(sizes), width, width) / width**0.5
            a = per_client[owner] + 0.2 * normal(n, width, width) / width**0.5
            ends = normal(len(sizes), 2 * width)[owner] + 0.2 * normal(n, 2 * width)
            self.x = torch.cat([a.flatten(1), ends], 1)
        else:
            a = normal(n, width) + 0.5 * normal(len(sizes), width)[owner]
            t = a @ normal(width) + 0.3 * normal(n)
            self.x = torch.cat([a, t[:, None]], 1)
        self.y = torch.zeros(n, dtype=torch.int64)

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"saddle"})

    def network(self) -> nn.Module:
        return Point(self.kind, self.width, self.reg)

    def data(self, client: int, split: str) -> Data:
        start, stop = self.spans[client : client + 2]
        # There is nothing to generalise to: the sum over the samples is the problem.
        held = stop if split in ("train", "test") else start
        return Data(self.x, self.y, torch.arange(start, held, device=self.x.device))

    def global_test(self) -> Data:
        return Data(self.x, self.y)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.mean()

    def judge(self, scores: Vector, data: Data) -> dict[str, float]:
        point = Point(self.kind, self.width, self.reg).to(self.x.device)
        start = operator_norm(point, data)
        nn.utils.vector_to_parameters(scores.flat, point.parameters())
        left = operator_norm(point, data)
        return {"n": len(data), "loss": float(point(data.x).mean()), "solved": 1 - left / start}

    def to(self, device: torch.device) -> Saddle:
        moved = copy.copy(self)
        moved.x, moved.y = self.x.to(device), self.y.to(device)
        return moved

    def solution(self) -> Tensor:
        """The saddle point (u, v), [2 * width], to rounding: Newton's method on the operator."""
        z = torch.zeros(2 * self.width, dtype=torch.float64)
        z[: self.width] = 0.1

        def operator(z: Tensor) -> Tensor:
            u, v = z.split(self.width)
            value = values(self.kind, self.reg, u, v, self.x.cpu()).mean()
            gu, gv = torch.autograd.grad(value, (u, v), create_graph=True)
            return torch.cat([gu, -gv])

        for _ in range(50):
            z = z.detach().requires_grad_()
            slope = torch.autograd.functional.jacobian(operator, z)
            step = torch.linalg.solve(slope, operator(z).detach())
            z = (z - step).detach()
            if step.norm() < 1e-14 * (1 + z.norm()):
                break
        return z


class Point(nn.Module):
    """The two blocks: `body.w` is minimised, `head.w` maximised; the output is f for every sample, [B]."""

    def __init__(self, kind: str, width: int, reg: float) -> None:
        super().__init__()
        self.kind, self.reg = kind, reg
        self.body, self.head = Block(width), Block(width)

    def forward(self, x: Tensor) -> Tensor:
        return values(self.kind, self.reg, self.body.w, self.head.w, x)


class Block(nn.Module):
    """One block of numbers, from zero (and 0.1, where zero would be a resting point)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((width,), 0.1, dtype=torch.float64))


def values(kind: str, reg: float, u: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """f(u, v) for every sample, [B]."""
    if kind == "bilinear":
        width = len(u)
        a, b, c = x.split([width * width, width, width], 1)
        coupled = torch.einsum("i,bij,j->b", u, a.unflatten(1, (width, width)), v)
        return coupled + b @ u - c @ v + reg / 2 * (u @ u - v @ v)
    a, t = x[:, :-1], x[:, -1]
    return 0.5 * ((a + v) @ u - t).square() + reg / 2 * (u @ u) - 2.0 * (v @ v)


def operator_norm(point: Point, data: Data) -> float:
    """|F(z)| with F = (grad_u f, -grad_v f) of the mean over some data."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(point(data.x).mean(), list(point.parameters()))
    return float(torch.cat(gradients).norm())


def build(spec: Spec, kind: str = "bilinear", width: int = 10, samples: int = 4) -> Saddle:
    """The problem of a run's settings: `saddle:regression,width=20`."""
    return Saddle(kind, width, (samples,) * (spec.clients or 8), seed=spec.seed)


def toy(sizes: Sequence[int] = (4,) * 4, norm: bool = False) -> Saddle:
    """A small one, for the contract of methods."""
    return Saddle(width=4, sizes=sizes, reg=2.0)
