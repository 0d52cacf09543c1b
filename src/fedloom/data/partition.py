"""A data set dealt to clients: which rows are whose, shifted and normalised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fedloom.data.files import Windows
from fedloom.data.gaps import fill
from fedloom.data.holdout import untested
from fedloom.data.newcomers import held_out
from fedloom.data.preprocessing import Preprocessing
from fedloom.data.rules import Natural, Part, deal, parse
from fedloom.data.shards import PerClient, Shards, ranks
from fedloom.data.shift import flip_labels, moments, note, shift
from fedloom.data.source import Column, Source, Table
from fedloom.data.windows import Series, cut, from_channels, from_the_end, told
from fedloom.encoders.features import Features, digest, encoded
from fedloom.errors import UsageError
from fedloom.random import stream
from fedloom.task import Data


def natural_column(partition: str) -> str | None:
    """The column that names the clients and is no feature: "client" for `column:client`, else None."""
    rule, _ = parse(partition)
    return rule.column if isinstance(rule, Natural) else None


MOVED = ("x", "y", "train", "validation", "test", "public", "shared")


@dataclass(frozen=True)
class Federation:
    """Data dealt to K clients. Rows of `train`, `validation`, `test`, `public` and `shared` are disjoint, of x and y.

    `x` `[N, ...]` and `y` `[N]` hold all rows, those of the training split first, then those of the test split; x is
    as in `Table`, then shifted, then normalised (per channel or column, by mean and deviation of the training rows as
    they were before the shift: what was shifted stays shifted). With an `encoder`, x has its features `[N, D]` of the
    shifted rows, normalised by their own mean and deviation. `public` are the server's rows, int64 `[P]`, and
    `shared` those that everybody has without their labels, int64 `[S]`. `names` and `notes` are, per client, its
    natural name (else its number) and what was done to it; `roles` say what each column of the data is used as, and
    what its gaps were filled in with. `groups` are the clients' known groups, where there are any. `metadata` are the
    columns beside x and y, `[N]` each, and `levels` the names of their values. Where y is an amount, `classes` are the
    names of its `strata`, int64 `[N]`, by which it was dealt.
    """

    source: str
    kind: str
    classes: tuple[str, ...]
    vocabulary: tuple[str, ...]
    partition: str
    x: torch.Tensor = field(repr=False)
    y: torch.Tensor = field(repr=False)
    train: Shards
    validation: Shards
    test: Shards
    public: torch.Tensor = field(repr=False)
    names: Sequence[str] = field(repr=False)
    notes: Sequence[str] = field(repr=False)
    roles: tuple[Column, ...] = field(default=(), repr=False)
    groups: Sequence[str] = field(default=(), repr=False)
    newcomers: int = 0  # of the K clients, the last ones, which are not of the population
    shared: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), repr=False)
    encoder: Features | None = field(default=None, repr=False)
    metadata: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    levels: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)
    strata: torch.Tensor | None = field(default=None, repr=False)
    labels: tuple[str, ...] = ()  # the names of several labels a row
    told: Mapping[str, Any] | None = field(default=None, repr=False)  # what data given in Python were
    preprocessing: Preprocessing | None = None  # how raw rows become rows of x
    decisions: tuple[str, ...] | None = field(default=None, repr=False)  # what was decided of the data, in sentences
    test_share: float | None = None  # of all rows, where one was asked for

    @property
    def population(self) -> int:
        """How many clients train."""
        return len(self.train) - self.newcomers

    @property
    def global_test(self) -> torch.Tensor:
        """All test rows of the population, ascending, int64 `[M]`."""
        return self.test.rows[: self.test.offsets[self.population]].sort().values

    def to(self, device: torch.device) -> "Federation":
        """The same with its data on a device."""
        moved = {name: getattr(self, name).to(device) for name in MOVED}
        moved["metadata"] = {name: column.to(device) for name, column in self.metadata.items()}
        return replace(self, **moved, encoder=self.encoder and self.encoder.to(device))

    def rows(self, rows: torch.Tensor) -> Data:
        """Some of its rows, int64 `[n]`, as data."""
        return Data(self.x, self.y, rows, self.metadata)

    def table(self, limit: int = 1000) -> dict[str, Any]:
        """What each of the first `limit` clients got, as partition.json has it; `labels` counts its training rows."""
        there = self.population
        told = {
            "partition": self.partition,
            "classes": list(self.classes),
            "population": there,
            "columns": [{"name": c.name, "role": c.role, "note": c.note} for c in self.roles],
            "clients": self._got(slice(0, min(limit, there))),
        }
        if self.told:
            told["data"] = dict(self.told)
        if self.encoder:
            told["encoder"] = self.encoder.describe()
        if self.newcomers:
            told["newcomers"] = self._got(slice(there, there + min(limit, self.newcomers)))
        return told

    def decided(self) -> dict[str, Any]:
        """How many rows each class has, of all splits, and what was decided of the data, in sentences.

        Nothing of data that are the library's own.
        """
        if self.decisions is None:
            return {}
        y = self.y if self.strata is None else self.strata
        counts = torch.bincount(y, minlength=len(self.classes)).tolist()
        return {"counts": counts, "decisions": list(self.decisions)}

    def _got(self, those: slice) -> list[dict[str, Any]]:
        """What some clients got."""
        shown, classes = those.stop - those.start, len(self.classes)
        span = slice(int(self.train.offsets[those.start]), int(self.train.offsets[those.stop]))
        y = self.y if self.strata is None else self.strata
        rows = self.train.rows[span].to(y.device)
        cells = (self.train.owners[span].to(y.device) - those.start) * classes + y[rows]
        labels = torch.bincount(cells, minlength=shown * classes).view(shown, classes).tolist()
        sizes = [shards.sizes[those].tolist() for shards in (self.train, self.validation, self.test)]
        keys = ("id", "name", "train", "validation", "test", "labels", "note")
        columns = zip(range(those.start, those.stop), self.names[those], *sizes, labels, self.notes[those], strict=True)
        told = [dict(zip(keys, client, strict=True)) for client in columns]
        for client, group in zip(told, self.groups[those], strict=False):
            client["group"] = group
        return told


def federate(
    source: Source,
    partition: str,
    clients: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
    public: float = 0.0,
    group: str | None = None,
    newcomers: float | str | None = None,
    shared_data: float = 0.0,
    embed: str | None = None,
) -> Federation:
    """Deals `source` to `clients` (None: as many as a `column:` names), by `partition`.

    `newcomers` are a share or a number of these clients, drawn, or values of the column: the last ones in the
    federation, on whose rows nothing else depends.

    `validation` is the share of each client's training rows that are set aside, rounded down. `public` is the share of
    all training rows that the server gets before anything is dealt, as many of every class as there are; `shared_data`
    is the share that everybody gets without labels, whatever their classes. A client's
    known group is the commonest value of the column `group` among its training rows, or what the partition says. Under
    iid, dirichlet and quantity nobody is left with fewer than min(10, N / 2K) training rows, but at least one: rows are
    moved from the clients with most. `embed` names the encoder whose features
    take the place of the rows. Raises UsageError where a client would be left without training rows.
    """
    if not 0 <= validation < 1:
        raise UsageError(f"got a validation share of {validation}; expected a number from 0 to below 1, such as 0.1")
    n, windows = len(source.train.y), source.preprocessing.files.windows if source.preprocessing else None
    if windows:
        _check_series(source, partition, public or shared_data, embed)
    served = _public(source.stratified, public, seed)
    shared = _shared(source.stratified, shared_data, served, seed)
    kept_back = torch.cat([served, shared])
    owner, names, shifts = deal(_without(source.stratified, kept_back), partition, clients, seed)
    if len(kept_back):
        whole = torch.full((len(owner) + len(kept_back),), -1)
        dealt = torch.ones(len(whole), dtype=torch.bool)
        dealt[kept_back] = False
        whole[dealt] = owner
        owner = whole
    population, column = len(names), natural_column(partition)
    late = held_out(newcomers, names if column else None, population, seed)
    if late and column and len(kept_back):
        setting, whose = (
            (f"public={public}", "the server's") if public else (f"shared_data={shared_data}", "the shared")
        )
        raise UsageError(
            f"{setting} and newcomers={newcomers}: {whose} public rows would be the newcomers' too, whom "
            f"the column {column} tells apart; leave one of them out"
        )
    order: Sequence[int] = range(population)
    place = torch.arange(population)
    if late:
        order = [*sorted({*order}.difference(late)), *late]
        place[order] = torch.arange(population)
    trainer, nobody = owner[:n], torch.full((n,), -1)
    series = Series.of(windows, source.train.columns, source.test.columns) if windows else None
    of_series = series.parts(trainer) if series else trainer
    most = (torch.bincount(of_series[of_series >= 0], minlength=population) * validation + 1e-9).long()
    if windows:
        rank = from_the_end(of_series, len(most))
    else:
        rank = ranks(trainer, population, stream(seed, "data", "validation"))
    held = (rank >= 0) & (rank < most[of_series])

    def sharded(owner: torch.Tensor) -> Shards:
        return Shards.from_owner(place[owner].where(owner >= 0, -1), population)

    train = sharded(trainer.where(~held, -1))
    seen = train.rows[: train.offsets[population - len(late)]]

    x, y = torch.cat([source.train.x, source.test.x]), torch.cat([source.train.y, source.test.y])
    roles, decided = fill(x, seen, source), []
    preprocessing = source.preprocessing and _with_fills(source.preprocessing, roles)
    if source.kind != "text":
        mean, deviation = moments(x, seen)
        unit = torch.ones(()) if source.kind == "image" else deviation
        for part in shifts:
            if part.name == "rotation" and y.dim() == 3:
                raise UsageError("rotation turns images and leaves their masks as they are; take noise or contrast")
            if part.name != "flip":
                for split, rows in (("train", slice(n)), ("test", slice(n, None))):
                    generator = stream(seed, "data", part.name, split)
                    shift(x[rows], owner[rows], population, part.name, part.value, unit, generator)
        if not embed:
            x.sub_(mean).div_(deviation)
            preprocessing = preprocessing and preprocessing.scaled(mean, deviation)
            what = "channels of images" if source.kind == "image" else "columns"
            decided.append(f"{what} are normalized by the mean and deviation of the clients' {len(seen)} training rows")
    encoder = None
    if embed:
        raw = tuple(x.shape[1:])
        x = encoded(embed, x)
        encoder = Features(embed, raw, digest(embed, raw), *moments(x, seen))
        x.sub_(encoder.mean).div_(encoder.deviation)
        preprocessing = preprocessing and replace(preprocessing, encoder=encoder.stored())
    for part in shifts:
        if part.name == "flip" and source.train.strata is not None:
            raise UsageError("flip changes labels to other classes, and this target has none; leave it out")
        if part.name == "flip":
            flip_labels(y[:n], trainer, population, len(source.classes), part.value, stream(seed, "data", "flip"))
    beside, strata = source.train.metadata, (source.train.strata, source.test.strata)
    groups = _groups(source, partition, trainer, population, group)
    if windows:
        decided.append(told(windows, validation))
    singly = Federation(
        source=source.name,
        kind="features" if embed else source.kind,
        classes=source.classes,
        vocabulary=() if embed else source.vocabulary,
        partition=partition,
        x=x,
        y=y,
        train=train,
        validation=sharded(trainer.where(held, -1)),
        test=sharded(torch.cat([nobody, owner[n:]])),
        public=served,
        names=PerClient(partial(_of, names, order), population) if late else names,
        notes=PerClient(partial(_note, shifts, population, order), population),
        roles=roles,
        groups=PerClient(partial(_of, groups, order), population) if late and groups else groups,
        newcomers=len(late),
        shared=shared,
        encoder=encoder,
        metadata={name: torch.cat([column, source.test.metadata[name]]) for name, column in beside.items()},
        levels=source.levels,
        labels=source.labels,
        told=source.told,
        preprocessing=preprocessing,
        decisions=None if source.decisions is None else (*source.decisions, *decided),
        strata=None if strata[0] is None or strata[1] is None else torch.cat([strata[0], strata[1]]),
        test_share=source.test_share,
    )
    if source.kind == "windows":
        singly = replace(singly, x=from_channels(singly.x))
    made = _in_windows(singly, windows, series) if windows else singly
    if made.decisions is None:
        return made
    return replace(made, decisions=(*made.decisions, *untested(made.test.sizes.tolist(), made.names)))


def _in_windows(f: Federation, windows: Windows, series: Series | None) -> Federation:
    """A federation of rows [N, D] as one of windows [M, length, D], each with the label of its target's row."""
    dealt = {"train": f.train, "validation": f.validation, "test": f.test}
    rows, shards, lacking = cut(dealt, f.names, windows, series)
    target = rows[:, -1]
    return replace(
        f,
        kind="windows",
        x=f.x[rows[:, : windows.length]],
        y=f.y[target],
        train=shards["train"],
        validation=shards["validation"],
        test=shards["test"],
        metadata={name: column[target] for name, column in f.metadata.items()},
        strata=None if f.strata is None else f.strata[target],
        decisions=None if f.decisions is None else (*f.decisions, *lacking),
    )


def _check_series(source: Source, partition: str, kept_back: float, embed: str | None) -> None:
    """Raises UsageError for what does not go with windows."""
    if natural_column(partition) is None:
        raise UsageError(
            f"windows are cut of each client's rows in their order, and partition={partition} deals rows singly; set "
            "partition=column:NAME, of a column that names the clients"
        )
    if kept_back:
        raise UsageError("windows do not go with public or shared_data, which take single rows out of the series")
    if embed:
        raise UsageError(f"windows do not go with embed={embed}, which makes features of single rows; leave it out")


def _with_fills(preprocessing: Preprocessing, roles: Sequence[Column]) -> Preprocessing:
    """The same with what the gaps of each column become."""
    fills = {column.name: column.fill for column in roles}
    columns = tuple(replace(feature, fill=fills.get(feature.name, ())) for feature in preprocessing.columns)
    return replace(preprocessing, columns=columns)


def _public(source: Source, share: float, seed: int) -> torch.Tensor:
    """The server's training rows, ascending, int64 `[P]`: of every class as many, or all that there are."""
    if not share:
        return torch.zeros(0, dtype=torch.int64)
    y = source.train.y
    each = max(1, round(share * len(y) / len(source.classes)))
    order = torch.randperm(len(y), generator=stream(seed, "data", "public"))
    of_class = [order[y[order] == label][:each] for label in range(len(source.classes))]
    return torch.cat(of_class).sort().values


def _shared(source: Source, share: float, served: torch.Tensor, seed: int) -> torch.Tensor:
    """The training rows that everybody has, ascending, int64 `[S]`: drawn from those that the server has not."""
    if not share:
        return torch.zeros(0, dtype=torch.int64)
    order = torch.randperm(len(source.train.y), generator=stream(seed, "data", "shared_data"))
    order = order[~torch.isin(order, served)]
    count = max(1, round(share * len(source.train.y)))
    if count >= len(order):
        raise UsageError(
            f"shared_data={share} is {count:,} of {len(order):,} training rows, and leaves none for the clients; "
            "expected a smaller share"
        )
    return order[:count].sort().values


def _without(source: Source, rows: torch.Tensor) -> Source:
    """The source without some of its training rows."""
    if not len(rows):
        return source
    kept = torch.ones(len(source.train.y), dtype=torch.bool)
    kept[rows] = False
    train = source.train
    columns = {name: values[kept.numpy()] for name, values in train.columns.items()}
    return replace(source, train=Table(train.x[kept], train.y[kept], columns))


def _groups(source: Source, partition: str, owner: torch.Tensor, clients: int, column: str | None) -> Sequence[str]:
    """Each client's group: the commonest value of a column in its training rows (`owner` [N]), or the partition's."""
    if column is None:
        return parse(partition)[0].groups(clients)
    columns = source.train.columns
    if column not in columns:
        known = ", ".join(columns) or "none"
        raise UsageError(f"no column {column!r} to group the clients of {source.name} by; there are: {known}")
    values, codes = np.unique(columns[column].astype(str), return_inverse=True)
    taken = owner >= 0
    cells = owner[taken] * len(values) + torch.from_numpy(codes)[taken]
    counts = torch.bincount(cells, minlength=clients * len(values)).view(clients, len(values))
    return tuple(str(values[place]) for place in counts.argmax(1).tolist())


def _of(values: Sequence[str], order: Sequence[int], client: int) -> str:
    return values[order[client]]


def _note(shifts: Sequence[Part], clients: int, order: Sequence[int], client: int) -> str:
    return ", ".join(filter(None, (note(part.name, part.value, order[client], clients) for part in shifts)))
