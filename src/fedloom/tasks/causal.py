"""Which variables cause which: clients with rows of the same variables, whose mechanisms differ."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedloom.errors import UsageError
from fedloom.nets.net import Net
from fedloom.quality import DIRECTION_F1, SHD, SKELETON_F1
from fedloom.random import stream
from fedloom.task import Batch, Data, Task

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec

QUALITIES = (SHD, SKELETON_F1, DIRECTION_F1)
KINDS = ("linear", "general")
CURVES = (torch.sin, torch.tanh, lambda x: x.square() / (1 + x.abs()))


class Causal(Task):
    """Rows of variables that are drawn along a random acyclic graph, in double precision.

    A variable is the sum of what its causes contribute, and noise; in half of the variables, the weights, the mean and
    the size of the noise are a client's own. `linear`: contributions are proportional; `general`: through a curve.

    `offers`, and `demands`, "causal". What is judged is a graph, bool [d, d] with `graph[i, j]` for i -> j, both ways
    if an edge has no direction. Measures: the structural Hamming distance `shd` (edges missing, too many, or not in
    the right direction), `skeleton_f1` and `direction_f1`.
    """

    classes = 0
    qualities = QUALITIES
    judges_values = True
    goal = ("skeleton_f1", 0.8)

    def __init__(
        self, kind: str = "linear", variables: int = 6, sizes: Sequence[int] = (100,) * 10, seed: int = 0
    ) -> None:
        if kind not in KINDS:
            raise UsageError(f"a causal problem of the kind {kind!r}; expected {' or '.join(KINDS)}")
        if variables < 2:
            raise UsageError(f"a causal problem of {variables} variables; it has at least 2")
        self.kind, self.variables, self.population = kind, variables, len(sizes)
        self.spans = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        draw = stream(seed, "causal", kind, variables)
        order = torch.randperm(variables, generator=draw)
        pairs = torch.combinations(torch.arange(variables))
        chosen = pairs[torch.randperm(len(pairs), generator=draw)[:variables]]  # as many edges as variables, if they go
        self.graph = torch.zeros(variables, variables, dtype=torch.bool)
        self.graph[order[chosen[:, 0]], order[chosen[:, 1]]] = True
        self.y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(*shape, generator=draw, dtype=torch.float64)

        signs = 1 - 2 * torch.randint(2, (variables, variables), generator=draw)
        weights = uniform(0.8, 1.6, len(sizes), variables, variables) * signs
        means, scales = uniform(-2, 2, len(sizes), variables), uniform(0.5, 1.5, len(sizes), variables)
        changing = torch.rand(variables, generator=draw) < 0.5
        weights = torch.where(changing, weights, weights[:1])
        means, scales = means * changing, torch.where(changing, scales, 1.0)
        noise = torch.randn(self.spans[-1], variables, generator=draw, dtype=torch.float64)
        self.x = means[self.y] + scales[self.y] * noise
        for j in order.tolist():
            for i in self.graph[:, j].nonzero().flatten().tolist():
                cause = self.x[:, i] if kind == "linear" else 2 * CURVES[(i + j) % len(CURVES)](self.x[:, i])
                self.x[:, j] += weights[self.y, i, j] * cause

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"causal"})

    @property
    def demands(self) -> frozenset[str]:
        return frozenset({"causal"})

    def network(self) -> nn.Module:
        """Every variable as a linear function of all."""
        return Net(nn.Identity(), nn.Linear(self.variables, self.variables, dtype=torch.float64))

    def data(self, client: int, split: str) -> Data:
        start, stop = self.spans[client : client + 2]
        held = stop if split in ("train", "test") else start  # the graph is judged, not what it says of further rows
        return Data(self.x, self.y, torch.arange(start, held, device=self.x.device))

    def global_test(self) -> Data:
        return Data(self.x, self.y)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs - batch.x).square().mean()

    def judge(self, scores: Tensor, data: Data) -> dict[str, float]:
        found, true = scores.cpu(), self.graph.cpu()
        if found.shape != true.shape or found.dtype is not torch.bool:
            raise UsageError(
                f"a causal problem judges a graph, bool {list(true.shape)}; got {found.dtype} {list(found.shape)}"
            )
        edges, right = (graph | graph.T for graph in (found, true))
        wrong = (found != true) | (found != true).T
        return {
            "n": len(data),
            "loss": float(wrong.sum()) / 2,
            "shd": float(wrong.sum()) / 2,
            "skeleton_f1": f1(edges, right),
            "direction_f1": f1(found, true),
        }

    def to(self, device: torch.device) -> Causal:
        moved = copy.copy(self)
        moved.x, moved.y = self.x.to(device), self.y.to(device)
        return moved


def f1(found: Tensor, true: Tensor) -> float:
    """The harmonic mean of precision and recall; 1 if there is nothing to be found, and nothing was."""
    total = float(found.sum() + true.sum())
    return 2 * float((found & true).sum()) / total if total else 1.0


def build(spec: Spec, kind: str = "linear", variables: int = 6, samples: int = 100) -> Causal:
    """The problem of a run's settings: `causal:general,variables=8`, with so many samples of each client."""
    return Causal(kind, variables, (samples,) * (spec.clients or 10), spec.seed)


def toy(sizes: Sequence[int] = (30, 20, 25, 35), norm: bool = False) -> Causal:
    """A small one, for the contract of methods."""
    return Causal(variables=4, sizes=sizes)
