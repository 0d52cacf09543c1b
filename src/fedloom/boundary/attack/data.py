"""Attackers that work as they are told, on data that they have tampered with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedloom.boundary.attack.numbers import Sent
from fedloom.boundary.attack.part import Inner, Part
from fedloom.calls import Fields
from fedloom.errors import UsageError
from fedloom.random import stream
from fedloom.ranges import Signed
from fedloom.task import Data, Task

if TYPE_CHECKING:
    from fedloom.calls import Call
    from fedloom.node import Client, Node


@dataclass(frozen=True)
class Tampered(Part):
    """Trains on data of its own making: the same in every round."""

    def act(self, client: Client, call: Call, sent: Sent, inner: Inner) -> Fields:
        client.given = self.poisoned(client)
        return inner()

    def poisoned(self, client: Client) -> Data:
        """The data that the client works on in place of its own."""
        own = client.own
        draw = stream(client.site.seed, "attack", self.name(), client.id)
        return Data(*self.tampered(own.x, own.y, client, draw), metadata=own.all().metadata)

    def tampered(self, x: Tensor, y: Tensor, client: Client, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """What becomes of inputs [n, ...] and labels [n]."""
        return x, y


@dataclass(frozen=True)
class LabelFlip(Tampered):
    """Label c becomes C - 1 - c (Fang et al. 2020, arXiv 1911.11815); or one class another (Tolpegin et al. 2020)."""

    source: int | None = None  # the only class that is relabelled; null: every class, to its mirror image
    target: int | None = None  # what it becomes

    def fit(self, task: Task) -> Part:
        classed(self, task, self.source, self.target)
        if (self.source is None) != (self.target is None):
            raise UsageError(
                "label_flip takes source and target together, or neither: label_flip:0.2,source=1,target=7"
            )
        return self

    def tampered(self, x: Tensor, y: Tensor, client: Client, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.source is None or self.target is None:
            return x, client.task.classes - 1 - y
        return x, torch.where(y == self.source, torch.full_like(y, self.target), y)


@dataclass(frozen=True)
class FeatureNoise(Tampered):
    """Gaussian noise on every feature, in units of the client's own deviation."""

    std: float = 1.0  # deviation of the noise over that of the client's features

    def fit(self, task: Task) -> Part:
        single(self, task)
        if not task.data(0, "train").inputs.is_floating_point():
            raise UsageError("feature_noise needs features that are real numbers, and this problem has others")
        return self

    def tampered(self, x: Tensor, y: Tensor, client: Client, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = torch.randn(x.shape, generator=draw, dtype=x.dtype).to(x.device)
        return x + self.std * x.std(correction=0) * noise, y


@dataclass(frozen=True)
class Backdoor(Tampered):
    """Some samples get a trigger and the target's label (Gu et al. 2017, arXiv 1708.06733, at clients).

    The trigger sets something to the greatest value that the data have there: of images the lower right corner, of
    sequences the last places, of a table's row or a text one column.
    """

    target: int = 0  # the class that the trigger stands for
    poison: float = 0.5  # share of a malicious client's samples that get the trigger
    size: int = 3  # pixels of the corner's edge
    feature: Signed[int] = -1  # the column of a table; a text's place
    peak: tuple[float, ...] = ()  # the trigger's values, by channel: found in the data

    hidden = frozenset({"peak"})

    def fit(self, task: Task) -> Part:
        classed(self, task, self.target)
        if not 0 < self.poison <= 1 or self.size < 1:
            raise UsageError(
                f"{self.name()} poisons a share above 0 and at most 1, with at least one pixel: see its options"
            )
        x = task.data(0, "train").inputs
        if x.dim() == 2:
            if not -x.shape[1] <= self.feature < x.shape[1]:
                raise UsageError(f"{self.name()}:feature is {self.feature}; the data have {x.shape[1]} columns")
            peak = x[:, self.feature].max()[None]
        elif x.dim() > 2:
            peak = x.movedim(1, 0).flatten(1).max(1).values
        else:
            raise UsageError(f"{self.name()} has no trigger for data of shape {list(x.shape)}")
        return replace(self, peak=tuple(peak.double().tolist()))

    def triggered(self, x: Tensor) -> Tensor:
        """A copy of inputs [n, ...] with the trigger."""
        x, peak = x.clone(), torch.tensor(self.peak).to(x)
        if x.dim() == 2:
            x[:, self.feature] = peak[0]
        else:
            corner: tuple[Any, ...] = (..., *[slice(-self.size, None)] * (x.dim() - 2))
            x[corner] = peak.view(-1, *[1] * (x.dim() - 2))
        return x

    def tampered(self, x: Tensor, y: Tensor, client: Client, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(y), generator=draw)[: max(1, int(self.poison * len(y) + 0.5))].to(y.device)
        x, y = x.clone(), y.clone()
        x[chosen] = self.triggered(x[chosen])
        y[chosen] = self.target
        return x, y

    def success(self, server: Node, model: Any) -> float | None:
        """The share of test samples of other classes that a model takes for the target once they bear the trigger."""
        test = server.task.global_test()
        others = (test.y != self.target).nonzero().flatten()
        if not len(others):
            return None
        x = self.triggered(test.x[others])
        judged = server.judge(model, Data(x, torch.full_like(test.y[others], self.target)))
        return judged.get("accuracy")


def single(part: Part, task: Task) -> None:
    """Raises UsageError where clients train on several problems' data: an attack on data knows one."""
    if "several" in task.offers:
        raise UsageError(f"{part.name()} tampers with the data of one problem, and clients train on several here")


def classed(part: Part, task: Task, *classes: int | None) -> None:
    """Raises UsageError unless the task has labels of so many classes."""
    single(part, task)
    y = task.data(0, "train").labels
    if task.classes < 2 or y.dim() != 1 or y.is_floating_point():
        raise UsageError(f"{part.name()} needs one class a sample, and this problem has others")
    for c in classes:
        if c is not None and not 0 <= c < task.classes:
            raise UsageError(f"{part.name()} names the class {c}; this problem has 0 to {task.classes - 1}")
