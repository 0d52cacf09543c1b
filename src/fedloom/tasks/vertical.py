"""Vertical data: the clients are parties with different columns of the same samples, and the server has the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedloom import nets
from fedloom.data.files import Files
from fedloom.data.load import load
from fedloom.data.partition import federate
from fedloom.errors import UsageError
from fedloom.nets.net import Net
from fedloom.random import seeded, stream
from fedloom.task import NONE, Batch, Data, Scores, Task
from fedloom.tasks.classification import measures

if TYPE_CHECKING:
    from fedloom.data.source import Source
    from fedloom.runs.spec import Spec

NOT_READ = ("partition", "public", "shared_data")  # settings that deal rows


@dataclass(frozen=True)
class Vertical(Task):
    """Party k has `parts[k]` [N, ...], its columns of all samples, and no label; the server has labels only.

    All name samples by their place in lists that were agreed upon beforehand (private set intersection). A party's
    splits are `train`, the samples that all parties have; `alone`, those that only this party has; and `judged`, those
    that the server validates and tests on. Its labels are -1, and it has no `validation` or `test` of its own.

    To the server a sample is its place: `labels` [N_o] are those of `train`, and `global_validation` and `global_test`
    have places among `judged`, so that a function from places [B] to scores [B, C] is judged.

    The server's network is `top`, on the features [B, sum of d_k] of all parties side by side. `party:K` is that of
    party K: its body makes the features [B, d_k], its head a score for each class, or `party:K,COUNT` of them.
    """

    parts: tuple[Tensor, ...]
    truth: Tensor  # [N]
    aligned: Tensor  # rows, int64 [N_o]
    alone: tuple[Tensor, ...]  # rows of each party
    validation: Tensor  # rows
    test: Tensor  # rows
    classes: int
    model: str
    top: str
    held: tuple[str, ...]  # what each party's columns are, in words
    told: Mapping[str, Any] | None = None  # what data given in Python were
    test_share: float | None = None  # of all samples, where one was asked for

    @property
    def population(self) -> int:  # type: ignore[override]
        return len(self.parts)

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"vertical"})

    @property
    def demands(self) -> frozenset[str]:
        return frozenset({"vertical"})

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """d_k: how many features each party's body makes."""
        with seeded(0, "vertical", "widths"):  # drawing these weights must not move the stream of others
            return tuple(self._party(k, self.classes).head.weight.shape[1] for k in range(self.population))

    def network(self) -> nn.Module:
        return nets.build(self.top, (sum(self.widths),), self.classes)

    def build(self, model: str) -> nn.Module:
        kind, _, options = model.partition(":")
        party, _, count = options.partition(",")
        if kind == "party":
            return self._party(int(party), int(count or self.classes))
        raise UsageError(f"a vertical problem builds party:K and party:K,COUNT, not {model!r}")

    def _party(self, k: int, count: int) -> Net:
        return nets.reference(self.model, tuple(self.parts[k].shape[1:]), count)

    def data(self, client: int, split: str) -> Data:
        rows = {
            "train": self.aligned,
            "alone": self.alone[client],
            "judged": torch.cat([self.validation, self.test]),
        }
        nobody = self.truth.new_full((1,), NONE).expand(len(self.truth))
        return Data(self.parts[client], nobody, rows.get(split, self.aligned[:0]))

    @property
    def labels(self) -> Tensor:
        """The server's labels [N_o] of the samples that all parties have, in the parties' order."""
        return self.truth[self.aligned]

    def global_validation(self) -> Data:
        return self._judged(0, len(self.validation))

    def global_test(self) -> Data:
        return self._judged(len(self.validation), len(self.validation) + len(self.test))

    def _judged(self, start: int, stop: int) -> Data:
        rows = torch.cat([self.validation, self.test])
        places = torch.arange(len(rows), device=rows.device)
        return Data(places, self.truth[rows], places[start:stop])

    def joined(self, features: Mapping[int, Tensor], count: int | None = None) -> Tensor:
        """The parties' features [count, d_k] side by side, [count, sum of d_k]; zeros for who sent none.

        `count` may be left out where anybody sent some.
        """
        if count is None:
            count = len(next(iter(features.values())))
        nothing = torch.zeros((), device=self.truth.device)
        return torch.cat([features.get(k, nothing.expand(count, d)) for k, d in enumerate(self.widths)], 1)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.y)

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        return measures(scores, data) if len(data) else {"n": 0}

    def to(self, device: torch.device) -> Vertical:
        if self.truth.device == device:
            return self
        moved: dict[str, Any] = {
            name: getattr(self, name).to(device) for name in ("truth", "aligned", "validation", "test")
        }
        moved |= {name: tuple(t.to(device) for t in getattr(self, name)) for name in ("parts", "alone")}
        return replace(self, **moved)

    def describe(self) -> dict[str, Any]:
        clients = [
            {"id": k, "name": held, "train": len(self.aligned), "alone": len(rows)}
            | {"validation": len(self.validation), "test": len(self.test)}
            for k, (held, rows) in enumerate(zip(self.held, self.alone, strict=True))
        ]
        told = {"partition": "vertical", "classes": [], "population": self.population, "clients": clients}
        return told | ({"data": dict(self.told)} if self.told else {})


def build(spec: Spec, aligned: float = 0.1, top: str = "linear") -> Vertical:
    """The problem of a run's settings: `vertical:0.05` aligns a share of the training samples, `vertical:500` so many.

    Images are cut into upright strips, one a client; a table's columns are dealt at random. The training samples that
    are not aligned are dealt, each to one party. `top` is the server's network. Without `clients` there are two, and
    without `model` every party has an `mlp:64`.
    """
    plain = type(spec)()
    for name in NOT_READ:
        if getattr(spec, name) != getattr(plain, name):
            raise UsageError(f"problem {spec.problem!r} deals columns and does not read {name}={getattr(spec, name)}")
    if aligned <= 0:
        raise UsageError(f"problem {spec.problem!r}: expected a share of the training samples, or how many are aligned")
    source = load(
        *(spec.data, spec.label, spec.seed, spec.test_share),
        exclude=spec.exclude,
        keep=spec.keep,
        missing=spec.missing,
        files=Files.of(spec),
    )
    columns = cuts(source, spec.clients or 2, spec.seed)
    whole = federate(source, "iid", 1, spec.validation, spec.seed)
    rows = whole.train[0]
    rows = rows[torch.randperm(len(rows), generator=stream(spec.seed, "data", "vertical", "aligned"))]
    count = max(1, round(aligned * len(rows))) if aligned <= 1 else int(aligned)
    if count > len(rows):
        raise UsageError(f"problem {spec.problem!r} aligns {count} samples; {spec.data} has {len(rows)} to train on")
    task = Vertical(
        parts=tuple(whole.x.index_select(-1, places) for places in columns),
        truth=whole.y,
        aligned=rows[:count],
        alone=rows[count:].tensor_split(len(columns)),
        validation=whole.validation[0],
        test=whole.global_test,
        classes=len(whole.classes),
        model=spec.model or "mlp:64",
        top=top,
        held=tuple(f"{len(places)} columns of {source.kind} data" for places in columns),
        told=source.told,
        test_share=source.test_share,
    )
    task.network()  # a network that does not fit is told now
    return task


def cuts(source: Source, parties: int, seed: int) -> list[Tensor]:
    """Which places of the last axis each party has: strips of images, columns of a table, each with all it became."""
    if source.kind == "image":
        columns = list(torch.arange(source.train.x.shape[-1])[:, None])
    elif source.kind == "tabular":
        columns = list(torch.arange(sum(source.widths)).split(list(source.widths)))
        order = torch.randperm(len(columns), generator=stream(seed, "data", "vertical", "columns"))
        columns = [columns[place] for place in order.tolist()]
    else:
        raise UsageError(f"{source.name} is {source.kind}, which has no columns to deal; take images or a table")
    if parties > len(columns):
        raise UsageError(f"{source.name} has {len(columns)} columns, fewer than {parties} parties; set clients")
    dealt = torch.arange(len(columns)).tensor_split(parties)
    return [torch.cat([columns[place] for place in places.tolist()]).sort().values for places in dealt]


@dataclass(frozen=True)
class VerticalToy(Vertical):
    """A small one, whose parties' networks may have BatchNorm."""

    norm: bool = False

    def _party(self, k: int, count: int) -> Net:
        net = super()._party(k, count)
        if self.norm:
            net.body.add_module("norm", nn.BatchNorm1d(net.head.weight.shape[1]))
        return net


def toy(sizes: Sequence[int] = (30, 20, 25, 35), norm: bool = False) -> VerticalToy:
    """Three clouds, for the contract of methods: two coordinates a party, 36 samples aligned, `sizes` are alone."""
    draw = stream(0, "toy", "vertical")
    starts = torch.tensor([36, 12, 36, *sizes])
    total = int(starts.sum())
    truth = torch.arange(total) % 3
    centres = 2.0 * torch.randn(3, 2 * len(sizes), generator=draw)
    x = centres[truth] + 0.7 * torch.randn(total, 2 * len(sizes), generator=draw)
    aligned, validation, test, *alone = torch.arange(total).split(starts.tolist())
    return VerticalToy(
        x.split(2, 1),
        truth,
        aligned,
        tuple(alone),
        validation,
        test,
        3,
        "mlp:8",
        "linear",
        ("",) * len(sizes),
        norm=norm,
    )
