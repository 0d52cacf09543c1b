"""Partly labelled data: every client has a few labelled samples and many without a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from fedloom.errors import UsageError
from fedloom.random import stream
from fedloom.task import Data
from fedloom.tasks import classification
from fedloom.tasks.classification import Classification
from fedloom.tasks.toy import Toy

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec


@dataclass(frozen=True)
class Partial(Classification):
    """Classification where a share of each client's training samples keeps its label, and the others lose it.

    `train` are the labelled samples of a client, at least one; `unlabelled` are the others, whose labels are -1.
    """

    share: float = 0.1
    seed: int = 0

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
    """The labelled (`train`) or the other (`unlabelled`) samples of a client."""
    rows = data.taken(None)
    count = max(1, round(share * len(rows)))
    order = torch.randperm(len(rows), generator=stream(seed, "data", "labelled", client)).to(rows.device)
    if split == "train":
        return Data(data.inputs, data.labels, rows[order[:count]].sort().values)
    return Data(data.inputs, data.labels, rows[order[count:]].sort().values).without_labels()


def build(spec: Spec, share: float = 0.1) -> Partial:
    """The data of a run's settings, of which a share keeps its labels: `partial:0.05`."""
    if not 0 < share <= 1:
        raise UsageError(
            f"problem {spec.problem!r}: a share of {share} keeps its labels; expected one above 0, up to 1"
        )
    whole = classification.build(spec)
    return Partial(**{f.name: getattr(whole, f.name) for f in fields(whole)}, share=share, seed=spec.seed)


class PartialToy(Toy):
    """Toy's clouds of points, half of which have a label."""

    offers = frozenset({"public", "shared_data", "partial"})

    def data(self, client: int, split: str) -> Data:
        if split not in ("train", "unlabelled"):
            return super().data(client, split)
        return parted(super().data(client, "train"), split, 0.5, 0, client)

    def info(self, client: int) -> Mapping[str, Any]:
        return {"n": self.sizes[client]}  # as in Partial: with or without a label


def toy(sizes: Sequence[int] = (30, 20, 25, 35), norm: bool = False) -> PartialToy:
    """A small one, for the contract of methods."""
    return PartialToy(sizes, norm)
