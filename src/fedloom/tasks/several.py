"""Several unrelated problems over one pool of clients: each of them has data of every problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedloom.errors import UsageError
from fedloom.task import Batch, Data, Scores, Task
from fedloom.tasks import classification
from fedloom.tasks.toy import Toy

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec


class Several(Task):
    """Problems of one population. To methods that do not ask for `parts` it is the first of them.

    `build("part:1")` is the network of the second.
    """

    def __init__(self, parts: Sequence[Task]) -> None:
        populations = {part.population for part in parts}
        if len(populations) != 1:
            raise UsageError(f"several problems need one pool of clients, got {sorted(populations)} clients")
        self.parts = tuple(parts)
        self.population, self.classes = parts[0].population, parts[0].classes
        self.model = getattr(parts[0], "model", None)
        self.test_share = getattr(parts[0], "test_share", None)

    def network(self) -> nn.Module:
        return self.parts[0].network()

    def build(self, model: str) -> nn.Module:
        name, _, number = model.partition(":")
        return self.parts[int(number)].network() if name == "part" else self.parts[0].build(model)

    @property
    def encoder(self) -> Callable[[Tensor], Tensor] | None:  # type: ignore[override]
        return self.parts[0].encoder

    def data(self, client: int, split: str) -> Data:
        return self.parts[0].data(client, split)

    def global_test(self) -> Data:
        return self.parts[0].global_test()

    def public(self) -> Data | None:
        return self.parts[0].public()

    def shared_data(self) -> Data | None:
        return self.parts[0].shared_data()

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.parts[0].criterion(outputs, batch)

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        return self.parts[0].judge(scores, data)

    def info(self, client: int) -> Mapping[str, Any]:
        return self.parts[0].info(client)

    @property
    def offers(self) -> frozenset[str]:
        return self.parts[0].offers | {"several"}

    def to(self, device: torch.device) -> Several:
        return Several([part.to(device) for part in self.parts])

    def describe(self) -> dict[str, Any]:
        return self.parts[0].describe() | {"parts": [part.describe() for part in self.parts[1:]]}


def build(spec: Spec, *others: str) -> Several:
    """A run's own data and others by name (`several:digits,adult`), each dealt in the run's way."""
    if not others:
        raise UsageError("the problem several needs the names of the data beside the first: several:digits")
    if spec.newcomers:
        raise UsageError(f"newcomers={spec.newcomers} does not go with several problems; leave it out")
    first = classification.build(spec)
    like = replace(spec, label=None, model=None, head=None, metadata=(), clients=first.population)
    return Several([first, *(classification.build(replace(like, data=name)) for name in others)])


def toy(sizes: Sequence[int] = (30, 20, 25, 35), norm: bool = False) -> Several:
    """Two clouds' problems, for the contract: in the second, coordinates and classes have changed their places."""
    first, second = Toy(sizes, norm), Toy(sizes, norm)
    second.x, second.y = first.x.flip(1), (first.y + 1) % 3
    return Several([first, second])
