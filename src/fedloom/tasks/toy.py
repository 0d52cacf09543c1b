"""Three clouds of points: the problem on which the contract of methods is checked, in milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedloom.nets.net import Net
from fedloom.parsing import Term
from fedloom.random import stream
from fedloom.task import Batch, Data, Scores, Task
from fedloom.tasks import stacked


class Toy(Task):
    """Three clouds of points in six dimensions, dealt to a few clients; client k lacks class k modulo 4.

    `sizes` are the training samples of the clients; each has 6 samples for validation and 12 for its test. The server
    has 12 public samples of every class, and everybody 12 more of every class without labels. `newcomers` are the
    training samples of clients beyond these, on which nothing of theirs depends. Beside x and y every sample has a
    `sex`, 0 or 1 in turn. The network has so many residual `blocks`.
    """

    classes = 3

    def __init__(
        self,
        sizes: Sequence[int] = (30, 20, 25, 35),
        norm: bool = False,
        newcomers: Sequence[int] = (),
        blocks: int = 0,
    ) -> None:
        self.sizes = (*sizes, *newcomers)
        self.population, self.newcomers = len(sizes), len(newcomers)
        self.norm, self.blocks = norm, blocks
        draw = stream(0, "toy", "data")
        centres = 2.0 * torch.randn(3, 6, generator=draw)
        labels, self.spans, start = [], [], 0
        for k, n in enumerate(sizes):
            labels.append(_labels(k, n))
            self.spans.append(start)
            start += n + 18
        self.y = torch.cat(labels)
        self.x = centres[self.y] + 0.7 * torch.randn(len(self.y), 6, generator=draw)
        self.spans.append(start)
        self.y = torch.cat([self.y, torch.arange(3).repeat(12)])
        public = stream(0, "toy", "public")
        self.x = torch.cat([self.x, centres[self.y[start:]] + 0.7 * torch.randn(36, 6, generator=public)])
        common = stream(0, "toy", "shared_data")
        y = torch.arange(3).repeat(12)
        self.common = Data(centres[y] + 0.7 * torch.randn(36, 6, generator=common), y).without_labels()
        for k, n in enumerate(newcomers, len(sizes)):
            self.spans.append(len(self.y))
            y, late = _labels(k, n), stream(0, "toy", "newcomer", k)
            self.x = torch.cat([self.x, centres[y] + 0.7 * torch.randn(n + 18, 6, generator=late)])
            self.y = torch.cat([self.y, y])
        self.beside = {"sex": torch.arange(len(self.y)) % 2}
        self._rows: dict[tuple[int, str, torch.device], Tensor] = {}  # made once: they are asked for many times a round

    def network(self) -> nn.Module:
        return cloud_net(self.norm, blocks=self.blocks)

    def build(self, model: str) -> nn.Module:
        """`mlp:WIDTH,...`: hidden layers; the task's own network is `mlp:8`."""
        return cloud_net(self.norm, tuple(map(int, model.removeprefix("mlp:").split(","))))

    def data(self, client: int, split: str) -> Data:
        key = client, split, self.x.device
        if key not in self._rows:
            n, start = self.sizes[client], self.spans[client + (client >= self.population)]
            first, last = {"train": (0, n), "validation": (n, n + 6), "test": (n + 6, n + 18)}[split]
            self._rows[key] = torch.arange(start + first, start + last, device=self.x.device)
        return Data(self.x, self.y, self._rows[key], self.beside)

    def public(self) -> Data:
        start = self.spans[self.population]
        return Data(self.x, self.y, torch.arange(start, start + 36, device=self.x.device), self.beside)

    def shared_data(self) -> Data:
        return self.common

    def global_test(self) -> Data:
        rows = [self.data(k, "test").taken(None) for k in range(self.population)]
        return Data(self.x, self.y, torch.cat(rows), self.beside)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.y)

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        out = scores(data.x)
        accuracy = (out.argmax(1) == data.y).double().mean().item()
        return {"n": len(data), "loss": F.cross_entropy(out, data.y).item(), "accuracy": accuracy}

    def to(self, device: torch.device) -> Toy:
        moved = copy.copy(self)
        moved.x, moved.y = self.x.to(device), self.y.to(device)
        moved.beside = {name: column.to(device) for name, column in self.beside.items()}
        moved.common = Data(self.common.inputs.to(device), self.common.labels.to(device))
        return moved


def _labels(client: int, n: int) -> Tensor:
    """Those of the `n + 18` samples of a client."""
    present = torch.tensor([c for c in range(3) if c != client % 4])
    return present[torch.arange(n + 18) % len(present)]


def cloud_net(norm: bool, widths: tuple[int, ...] = (8,), blocks: int = 0, outputs: int = 3) -> Net:
    """A network for points in six dimensions: hidden layers of `widths`, with BatchNorm if `norm`."""
    body = nn.Sequential()
    for before, after in zip((6, *widths), widths, strict=False):
        body.extend([nn.Linear(before, after), *[nn.BatchNorm1d(after)] * norm, nn.ReLU()])
    body.extend(_Block(widths[-1], norm) for _ in range(blocks))
    return Net(body, nn.Linear(widths[-1], outputs))


class _Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), *[nn.BatchNorm1d(width)] * norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


MET = ("public", "shared_data", "blocks", "encoder")  # needs of methods that a Toy meets


class EncodedToy(Toy):
    """Toy's clouds as features: a frozen encoder, which turns the six dimensions, made them of raw points."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.turn = torch.linalg.qr(torch.randn(6, 6, generator=stream(0, "toy", "encoder")))[0]
        self.x = self.encoder(self.x)
        self.common = replace(self.common, inputs=self.encoder(self.common.inputs))

    def encoder(self, x: Tensor) -> Tensor:
        """Features [B, 6] of raw points [B, 6]."""
        return x @ self.turn.to(x)


class HeadlessToy(Toy):
    """Toy's clouds with a network of layers in a row, of which none is said to be its body or its head."""

    def network(self) -> nn.Module:
        return _in_a_row(super().network())

    def build(self, model: str) -> nn.Module:
        return _in_a_row(super().build(model))


def _in_a_row(net: nn.Module) -> nn.Sequential:
    return nn.Sequential(*net.get_submodule("body").children(), net.get_submodule("head"))


def toy_for(needs: Iterable[str], **shape: Any) -> Task:
    """A small problem of the kinds that a method needs, for clients of `sizes` training samples.

    Of a kind it is what the function `toy` gives, which stands beside its `build`; that of a kind that lies upon others
    takes the toy of those, and the options of the need: `stream:by=classes`.
    """
    asked = list(needs)
    (lowest, build), *layers = stacked([Term(need) for need in asked if need not in MET], "a toy problem")
    made: Task
    if lowest.name == "classification":
        kind = EncodedToy if "encoder" in asked else Toy
        made = kind(**shape, blocks=blocks_for(asked))
    else:
        made = _beside(build).toy(**shape)
    for term, upper in layers:
        made = _beside(upper).toy(made, **term.options)
    return made


def blocks_for(needs: Iterable[str]) -> int:
    """How many residual blocks the network of a toy has, for a method of these needs."""
    return 3 if "blocks" in needs else 0


def _beside(build: Callable[..., Task]) -> Any:
    """The file that a kind's `build` is in."""
    return import_module(build.__module__)
