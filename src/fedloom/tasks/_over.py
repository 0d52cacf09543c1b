"""A problem made of another: what it does not change is the other's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedloom.data.preprocessing import Preprocessing
from fedloom.quality import Quality
from fedloom.task import Batch, Data, Task


@dataclass(frozen=True, eq=False)
class Over(Task):
    """A problem that lies upon another, `inner`, which may lie upon one itself.

    Whatever else the inner one has (`number` of a stream, `federation`) is found here too.
    """

    inner: Task

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def population(self) -> int:  # type: ignore[override]
        return self.inner.population

    @property
    def newcomers(self) -> int:  # type: ignore[override]
        return self.inner.newcomers

    @property
    def classes(self) -> int:  # type: ignore[override]
        return self.inner.classes

    @property
    def judges_values(self) -> bool:  # type: ignore[override]
        return self.inner.judges_values

    @property
    def encoder(self) -> Callable[[Tensor], Tensor] | None:  # type: ignore[override]
        return self.inner.encoder

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def blank(self) -> Tensor:
        return self.inner.blank()

    @property
    def offers(self) -> frozenset[str]:
        return self.inner.offers

    @property
    def demands(self) -> frozenset[str]:
        return self.inner.demands

    @property
    def qualities(self) -> tuple[Quality, ...]:  # type: ignore[override]
        return self.inner.qualities

    @property
    def answer(self) -> str:
        return self.inner.answer

    def answers(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.answers(outputs, y)

    def network(self) -> nn.Module:
        return self.inner.network()

    def build(self, model: str) -> nn.Module:
        return self.inner.build(model)

    @property
    def headed(self) -> bool:
        return self.inner.headed

    def recipe(self) -> Mapping[str, Any] | None:
        return self.inner.recipe()

    def preprocessing(self) -> Preprocessing | None:
        return self.inner.preprocessing()

    def outputs(self) -> Mapping[str, Any]:
        return self.inner.outputs()

    def data(self, client: int, split: str) -> Data:
        return self.inner.data(client, split)

    def global_test(self) -> Data:
        return self.inner.global_test()

    def global_tests(self) -> Mapping[str, Data]:
        return self.inner.global_tests()

    def global_validation(self) -> Data | None:
        return self.inner.global_validation()

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.inner.criterion(outputs, batch)

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        return self.inner.loss(net, batch)

    def head_loss(self, net: nn.Module, batch: Batch) -> Tensor:
        return self.inner.head_loss(net, batch)

    def judge(self, scores: Any, data: Data) -> dict[str, float]:
        return self.inner.judge(scores, data)

    def to(self, device: torch.device) -> Self:
        return self._with(self.inner.to(device))

    def at(self, round: int) -> Self:
        return self._with(self.inner.at(round))

    def _with(self, inner: Task) -> Self:
        return self if inner is self.inner else replace(self, inner=inner)

    def stage(self, round: int) -> int | None:
        return self.inner.stage(round)

    def present(self, client: int) -> bool:
        return self.inner.present(client)

    def public(self) -> Data | None:
        return self.inner.public()

    def shared_data(self) -> Data | None:
        return self.inner.shared_data()

    def pool(self, client: int) -> Data | None:
        return self.inner.pool(client)

    def allowance(self, client: int) -> int:
        return self.inner.allowance(client)

    def info(self, client: int) -> Mapping[str, Any]:
        return self.inner.info(client)

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()
