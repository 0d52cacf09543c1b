"""Partly labelled data: every client has a few labelled samples and many without a label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fedloom.errors import UsageError
from fedloom.random import stream
from fedloom.task import Data, Task
from fedloom.tasks import layer
from fedloom.tasks._over import Over
from fedloom.tasks.toy import Toy

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec


@dataclass(frozen=True, eq=False)
class Partial(Over):
    """A problem where a share of each client's training samples keeps its label, and the others lose it.

    `train` are the labelled samples of a client, at least one; `unlabelled` are the others, whose labels are -1. In a
    stream that is so of what comes with every task.

    Raises UsageError for a share that is none.
    """

    share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        sharing(self.share, "partial labels")

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | {"partial"}

    def data(self, client: int, split: str) -> Data:
        if split not in ("train", "unlabelled"):
            return super().data(client, split)
        return parted(super().data(client, "train"), split, self.share, self.seed, client)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"labelled": self.share}


def parted(data: Data, split: str, share: float, seed: int, client: int) -> Data:
    """The labelled (`train`) or the other samples of a client, without labels (`unlabelled`) or with them (`pool`)."""
    rows = data.taken(None)
    count = max(1, round(share * len(rows)))
    order = torch.randperm(len(rows), generator=stream(seed, "data", "labelled", client)).to(rows.device)
    if split == "train":
        return replace(data, rows=rows[order[:count]].sort().values)
    others = replace(data, rows=rows[order[count:]].sort().values)
    return others if split == "pool" else others.without_labels()


def sharing(share: float, where: str) -> None:
    """Raises UsageError for a share of labels that is none."""
    if not 0 < share <= 1:
        raise UsageError(f"{where}: a share of {share} keeps its labels; expected one above 0, up to 1")


@layer(rank=1)
def build(spec: Spec, inner: Callable[[], Task], share: float = 0.1) -> Partial:
    """A problem of which a share keeps its labels: `partial:0.05`."""
    sharing(share, f"problem {spec.problem!r}")
    return Partial(inner(), share, spec.seed)


def toy(inner: Toy | None = None, **shape: Any) -> Partial:
    """A small one, for the contract of methods, half of whose samples have a label."""
    return Partial(inner or Toy(**shape), 0.5)
