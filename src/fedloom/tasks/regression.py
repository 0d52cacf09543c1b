"""A number a sample: least squares on a federation of data whose target is an amount."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedloom.data.partition import Federation
from fedloom.data.shift import moments
from fedloom.quality import MAE, R2, RMSE
from fedloom.random import stream
from fedloom.task import Batch, Data, Scores
from fedloom.tasks.classification import JUDGED_AT_ONCE, Classification, loaded
from fedloom.tasks.toy import Toy, cloud_net

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec

QUALITIES = (RMSE, MAE, R2)


@dataclass(frozen=True)
class Regression(Classification):
    """Mean squared error of one number a sample, with a network of one output.

    The target is learned in units of its deviation over the training rows, about their mean: y is (amount - `mean`) /
    `deviation`. RMSE and MAE are in the unit of the amounts; the loss is that which is minimised.

    Examples:
        >>> from fedloom import tasks
        >>> task = tasks.build(fedloom.Spec(problem="regression", data="diabetes", clients=5, partition="iid"))
        >>> task.classes, task.shape, task.data(0, "train").y.dtype
        (0, (10,), torch.float32)
        >>> [quality.words for quality in task.qualities]
        ['RMSE', 'MAE', 'R²']
    """

    mean: float = 0.0
    deviation: float = 1.0

    target = answer = "amount"
    qualities = QUALITIES

    @classmethod
    def of(cls, federation: Federation, model: str) -> Self:
        y, population = federation.y[:, None], federation.population
        mean, deviation = moments(y, federation.train.rows[: federation.train.offsets[population]])
        scaled = replace(federation, y=((y - mean) / deviation).squeeze(1))
        return cls(scaled, model, mean.item(), deviation.item())

    @property
    def classes(self) -> int:  # type: ignore[override]
        return 0

    @property
    def width(self) -> int:
        return 1

    def outputs(self) -> Mapping[str, Any]:
        return {"kind": "amount", "mean": self.mean, "deviation": self.deviation}

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(outputs.squeeze(1), batch.y)

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        return errors(scores, data, self.deviation)

    def answers(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean + self.deviation * outputs.squeeze(1).double(), self.mean + self.deviation * y.double()

    def describe(self) -> dict[str, Any]:
        if not len(self.global_test()):
            return super().describe()
        always = errors(lambda x: torch.zeros(len(x), 1, device=x.device), self.global_test(), self.deviation)
        baseline = {"of": "The mean of the training targets", "rmse": always["rmse"], "mae": always["mae"]}
        return super().describe() | {"target": {"mean": self.mean, "deviation": self.deviation}, "baseline": baseline}


def errors(scores: Scores, data: Data, unit: float) -> dict[str, float]:
    """What outputs [B, 1] are off by on data, over its `n` samples: the loss in squared units, the rest in amounts.

    R2 is 1 - squared errors / squared distances from the mean of these data: 0 for who predicts that mean, less for who
    does worse, and missing where these data are all alike.
    """
    y = data.y.double()
    out = torch.cat([scores(batch.x).squeeze(1) for batch in data.pieces(JUDGED_AT_ONCE)])
    error = out.double() - y
    squared = error.square().mean().item()
    found = {"n": len(data), "loss": squared, "rmse": unit * squared**0.5, "mae": unit * error.abs().mean().item()}
    spread = (y - y.mean()).square().mean().item()
    return found | ({"r2": 1 - squared / spread} if spread > 0 else {})


def build(spec: Spec) -> Regression:
    """The task of a run's data settings, whose label is an amount."""
    return loaded(Regression, spec)


class RegressionToy(Toy):
    """Toy's clouds of points with a number to predict: a plane above them, bent, with a little noise."""

    classes = 0
    answer = "amount"
    qualities = QUALITIES
    goal = ("r2", 0.7)

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        draw = stream(0, "toy", "regression")
        slope = torch.randn(6, generator=draw) / 5
        self.x = self.x / 2
        self.common = replace(self.common, inputs=self.common.inputs / 2)
        self.y = torch.tanh(self.x @ slope) + 0.05 * torch.randn(len(self.x), generator=draw)

    def network(self) -> nn.Module:
        return cloud_net(self.norm, blocks=self.blocks, outputs=1)

    def build(self, model: str) -> nn.Module:
        return cloud_net(self.norm, tuple(map(int, model.removeprefix("mlp:").split(","))), outputs=1)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(outputs.squeeze(1), batch.y)

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        return errors(scores, data, 1.0)

    def answers(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return outputs.squeeze(1).double(), y.double()


def toy(
    sizes: Sequence[int] = (30, 20, 25, 35), norm: bool = False, newcomers: Sequence[int] = (), blocks: int = 0
) -> RegressionToy:
    """A small one, for the contract of methods."""
    return RegressionToy(sizes, norm, newcomers, blocks)
