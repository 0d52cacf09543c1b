"""How rows are dealt: one rule, then modifiers, as in `dirichlet:0.1+longtail:100+rotation:45`.

    iid                every client the same share of shuffled rows
    dirichlet:ALPHA    the clients' shares of each class are drawn from Dirichlet(ALPHA) [Yurochkin et al. 2019,
                       arXiv 1905.12022]
    classes:C          every client holds C shards of one class each [after McMahan et al. 2017, arXiv 1602.05629, whose
                       shards may straddle two classes]
    quantity:ALPHA     the clients' sizes are drawn from Dirichlet(ALPHA), the classes are alike [Li et al. 2022,
                       arXiv 2102.02079]
    column:NAME        natural: a client for each distinct value of a column

    +longtail:FACTOR   training rows are dropped until the classes' sizes fall exponentially from FACTOR to 1
    +rotation:DEGREES  client k of K sees its images turned by k / (K - 1) * DEGREES
    +noise:SIGMA       ... with Gaussian noise of k / (K - 1) * SIGMA (of a pixel in [0, 1], of a column's deviation)
    +contrast:LOW      ... with their contrast falling from 1 to LOW
    +flip:P            ... and the share k / (K - 1) * P of its training and validation labels is another class's

The rule that deals the training rows deals the test rows too: a client's personal test has its own distribution, and
all of them together are the test split. Features are shifted for training, validation and test rows alike; the labels
of test rows stay clean. Every part has its own random stream: a modifier, or more validation rows, leaves the dealing
as it is (`longtail` takes rows away, no more).
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch

from fedloom.data.shards import PerClient, ranks
from fedloom.data.source import Source, listed
from fedloom.errors import UsageError, unknown
from fedloom.members import Registry
from fedloom.parsing import Term, bound, chain
from fedloom.random import numpy_stream, stream

MOST_ALPHA = 1e290  # beyond it all shares are equal long since, and their sum over clients overflows
LEAST = 10  # training rows that no client of a drawn partition has fewer of, where there are enough

_Form = tuple[str, str, Callable[[float], bool]]  # what a number is: in words, by example, and as a test
MODIFIERS: dict[str, _Form] = {
    "longtail": ("a number from 1", "longtail:100", lambda value: value >= 1),
    "rotation": ("a number of degrees", "rotation:45", lambda value: True),
    "noise": ("a number from 0", "noise:0.2", lambda value: value >= 0),
    "contrast": ("a number above 0, up to 1", "contrast:0.5", lambda value: 0 < value <= 1),
    "flip": ("a number from 0 to 1", "flip:0.4", lambda value: 0 <= value <= 1),
}
_SUITS = {"rotation": ("image",), "contrast": ("image",), "noise": ("image", "tabular")}  # kinds of data; else any


@dataclass(frozen=True)
class Partition(ABC):
    """A rule by which rows are dealt to clients. Its fields are its options, as in `my_rule:0.3,most=2`.

    `form` says what its one number is, where a rule has no more to it; `evened`: clients that are left with too few
    training rows get some of others' (else that is an error).
    """

    form: ClassVar[_Form | None] = None
    evened: ClassVar[bool] = True

    @classmethod
    def of(cls, term: Term) -> "Partition":
        """The rule that a term asks for."""
        return cls(**({fields(cls)[0].name: _number(term, *cls.form)} if cls.form else bound(term, cls)))

    def groups(self, clients: int) -> Sequence[str]:
        """The known group of each client; nothing where the rule makes none."""
        return ()

    @abstractmethod
    def owners(self, source: Source, clients: int, seed: int) -> torch.Tensor:
        """The client of each row, int64 `[N + M]`: of the N training rows, then of the M test rows; -1 is nobody.

        Draws come from `fedloom.random.stream(seed, "data", "partition", ...)`. Raises UsageError where it cannot be.
        """


@dataclass(frozen=True)
class Cut(Partition):
    """A rule that shuffles the rows, of each class or of all, and cuts them by the same shares in both splits.

    The n rows of a group lie at even distances, from a random start, on [0, 1]; a client owns what falls on its share.
    """

    per_class: ClassVar[bool] = True

    @abstractmethod
    def shares(self, counts: torch.Tensor, clients: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Each group's shares, `[K]` in any unit, from its training rows' number; one group unless `per_class`."""

    def owners(self, source: Source, clients: int, seed: int) -> torch.Tensor:
        y = source.train.y
        counts = torch.bincount(y, minlength=len(source.classes)) if self.per_class else torch.tensor([len(y)])
        generators = [stream(seed, "data", "partition", split) for split in ("train", "test")]
        labels = [y, source.test.y]
        owners = [torch.full_like(y, -1) for y in labels]
        for group, shares in enumerate(self.shares(counts, clients, numpy_stream(seed, "data", "partition"))):
            edges = torch.from_numpy(shares).cumsum(0)
            edges = edges / edges[-1]
            for y, owner, generator in zip(labels, owners, generators, strict=True):
                rows = (y == group).nonzero().squeeze(1) if self.per_class else torch.arange(len(y))
                rows = rows[torch.randperm(len(rows), generator=generator)]
                start = 1 - torch.rand((), dtype=torch.float64, generator=generator)
                owner[rows] = torch.searchsorted(edges, (torch.arange(len(rows)) + start) / len(rows))
        return torch.cat(owners)


@dataclass(frozen=True)
class Iid(Cut):
    """Every client the same share."""

    per_class = False

    @classmethod
    def of(cls, term: Term) -> Partition:
        if term.rest is not None:
            raise UsageError(f"{term.name} takes no value, but got {term.text!r}; write {term.name}")
        return cls()

    def shares(self, counts: torch.Tensor, clients: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        yield np.ones(clients)


@dataclass(frozen=True)
class Dirichlet(Cut):
    """The clients' shares of each class are drawn."""

    alpha: float
    form = "a number above 0", "dirichlet:0.3", lambda value: value > 0

    def shares(self, counts: torch.Tensor, clients: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        for _ in counts:
            yield rng.dirichlet(np.full(clients, min(self.alpha, MOST_ALPHA)))


@dataclass(frozen=True)
class Quantity(Dirichlet):
    """The clients' sizes are drawn, and the classes are alike."""

    per_class = False
    form = "a number above 0", "quantity:0.5", lambda value: value > 0


@dataclass(frozen=True)
class Classes(Cut):
    """For each class, 1 for the clients that hold a shard of it: each client holds `held` classes.

    The K * held shards go to the classes by highest average, at least one each; a class's shards go to the clients with
    most places free, ties by lot, which always comes out even (Havel and Hakimi).
    """

    held: float
    evened = False
    form = "a whole number from 1", "classes:2", lambda value: value >= 1 and value == int(value)

    def shares(self, counts: torch.Tensor, clients: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        held = int(self.held)
        classes, shards, size = len(counts), clients * held, counts.numpy()[:, None]
        if held > classes:
            raise UsageError(f"classes:{held} but the data has only {classes} classes; take at most classes:{classes}")
        if shards < classes:
            raise UsageError(
                f"{clients} clients of {held} classes hold at most {shards} of the {classes} classes; take "
                f"classes:{-(-classes // clients)} or {-(-classes // held)} clients"
            )
        place = np.arange(1, clients + 1)
        average = np.where(place <= size, size / place, 0)
        if np.count_nonzero(average) < shards:
            raise UsageError(
                f"{clients} clients of {held} classes need {shards} shards, more than the rows give; take fewer "
                "clients or fewer classes"
            )
        average[:, 0] = np.inf
        seats = np.bincount(np.argsort(-average, axis=None, kind="stable")[:shards] // clients, minlength=classes)
        free = np.full(clients, held)
        holds = np.zeros((classes, clients), dtype=bool)
        for label in rng.permutation(classes):
            chosen = np.argsort(-(free + rng.random(clients)))[: seats[label]]
            holds[label, chosen] = True
            free[chosen] -= 1
        for row in holds:
            yield row.astype(np.float64)


@dataclass(frozen=True)
class Groups(Cut):
    """Clients in groups that share no class: client k is in group k modulo G, whose members share its rows evenly."""

    count: float
    evened = False
    form = "a whole number from 2", "groups:3", lambda value: value >= 2 and value == int(value)

    def shares(self, counts: torch.Tensor, clients: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        groups, most = int(self.count), min(len(counts), clients)
        if groups > most:
            raise UsageError(f"groups:{groups}, but every group needs a client and a class; take at most groups:{most}")
        for place in rng.permutation(len(counts)):
            yield (np.arange(clients) % groups == place % groups).astype(np.float64)

    def groups(self, clients: int) -> Sequence[str]:
        return [str(client % int(self.count)) for client in range(clients)]


@dataclass(frozen=True)
class Natural(Partition):
    """A client for each distinct value of a column in the training rows, in the order of these."""

    column: str
    evened = False

    @classmethod
    def of(cls, term: Term) -> Partition:
        if not term.rest:
            raise UsageError(f"{term.name} needs a column's name, as in column:client, but got {term.text!r}")
        return cls(term.rest)

    def owners(self, source: Source, clients: int, seed: int) -> torch.Tensor:
        return self.named(source, clients)[0]

    def named(self, source: Source, clients: int | None) -> tuple[torch.Tensor, Sequence[str]]:
        """The owner `[N + M]` of all rows, and the clients' names."""
        column, splits = self.column, [source.train.columns, source.test.columns]
        if column not in splits[0]:
            known = ", ".join(splits[0]) or "none"
            raise UsageError(f"no column {column!r} to deal {source.name} by; the columns left for that are: {known}")
        values = [split[column] for split in splits]
        for part in values:
            missing = sum(value is None for value in part) if part.dtype == object else int((part != part).sum())
            if missing:
                raise UsageError(
                    f"column {column!r} of {source.name} has {missing} missing values; every row needs its client"
                )
        names, owner = np.unique(values[0], return_inverse=True)
        absent = np.setdiff1d(values[1], names)
        if len(absent):
            raise UsageError(
                f"client {listed(absent)} of column {column!r} has test rows but no training rows; drop those "
                "rows or add training rows"
            )
        if clients not in (None, len(names)):
            raise UsageError(
                f"column {column!r} of {source.name} names {len(names)} clients, but clients is {clients}; leave "
                f"clients out or say {len(names)}"
            )
        owners = np.concatenate([owner, np.searchsorted(names, values[1])])
        return torch.from_numpy(owners), tuple(str(name) for name in names.tolist())


_RULES: dict[str, type[Partition]] = {
    "iid": Iid,
    "dirichlet": Dirichlet,
    "classes": Classes,
    "groups": Groups,
    "quantity": Quantity,
    "column": Natural,
}
PARTITIONS = Registry[type[Partition]]("partition", "fedloom.partitions", _RULES, Partition)


@dataclass(frozen=True)
class Part:
    """A modifier: `rotation:45` has the value 45."""

    name: str
    value: float


def parse(partition: str) -> tuple[Partition, tuple[Part, ...]]:
    """The rule and the modifiers of a partition; raises UsageError for what is not one."""
    first, *rest = chain(partition)
    if first.name in MODIFIERS:
        raise UsageError(
            f"partition {partition!r} starts with a modifier; say first how to deal, as in iid+{partition}"
        )
    rule = PARTITIONS[first.name].of(first)
    for term in rest:
        if term.name in PARTITIONS and term.name not in MODIFIERS:
            raise UsageError(
                f"partition {partition!r} has two rules, {first.text} and {term.text}; keep one, then modifiers "
                f"({', '.join(MODIFIERS)})"
            )
        if term.name not in MODIFIERS:
            raise unknown("partition modifier", term.name, MODIFIERS)
    modifiers = tuple(Part(term.name, _number(term, *MODIFIERS[term.name])) for term in rest)
    names = [part.name for part in modifiers]
    twice = [name for name in MODIFIERS if names.count(name) > 1]
    if twice:
        raise UsageError(f"partition {partition!r} has {twice[0]} twice; keep one")
    return rule, modifiers


def _number(term: Term, what: str, example: str, allowed: Callable[[float], bool]) -> float:
    try:
        value = float(term.rest or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not allowed(value):
        raise UsageError(f"{term.name} needs {what}, as in {example}, but got {term.text!r}")
    return value


def deal(
    source: Source, partition: str, clients: int | None, seed: int
) -> tuple[torch.Tensor, Sequence[str], tuple[Part, ...]]:
    """The owner `[N + M]` of all training, then all test rows (-1: nobody), the clients' names, the shifts to apply."""
    rule, modifiers = parse(partition)
    for part in modifiers:
        suits = _SUITS.get(part.name, (source.kind,))
        if source.kind not in suits:
            raise UsageError(
                f"{part.name} changes {' or '.join(suits)} data, but {source.name} is {source.kind}; "
                "leave it out of the partition"
            )
    n = len(source.train.y)
    if isinstance(rule, Natural):
        owner, names = rule.named(source, clients)
    else:
        names = PerClient(str, _population(partition, clients, n))
        owner = _sound(rule, rule.owners(source, len(names), seed), n + len(source.test.y), len(names))
    for part in modifiers:
        if part.name == "longtail":
            owner[:n][~_longtail(source, part.value, seed)] = -1
    _fill(source, rule, owner[:n], names, seed)
    return owner, names, tuple(part for part in modifiers if part.name != "longtail")


def _sound(rule: Partition, owner: torch.Tensor, rows: int, clients: int) -> torch.Tensor:
    """The owners, if they are what `Partition.owners` promises."""
    fits = owner.dtype == torch.int64 and owner.shape == (rows,) and -1 <= owner.min() <= owner.max() < clients
    if not fits:
        raise UsageError(
            f"the partition {type(rule).__name__} gave owners {owner.dtype} {list(owner.shape)} from {owner.min()} to "
            f"{owner.max()}; expected int64 [{rows}], a client from 0 to {clients - 1} or -1 for each row"
        )
    return owner


def _population(partition: str, clients: int | None, rows: int) -> int:
    if clients is None or clients < 1:
        raise UsageError(f"partition {partition} needs a number of clients from 1, as in clients=20, but got {clients}")
    if clients > rows:
        raise UsageError(f"{clients} clients but only {rows} training rows; take at most {rows} clients")
    return clients


def _longtail(source: Source, factor: float, seed: int) -> torch.Tensor:
    """Which training rows stay, bool `[N]`: the largest class stays the largest, the smallest is 1 / factor of it."""
    counts = torch.bincount(source.train.y, minlength=len(source.classes))
    order = counts.argsort(descending=True, stable=True)
    place = torch.linspace(0, 1, len(counts), dtype=torch.float64)
    most = (counts[order[:-1]] ** (1 / (1 - place[:-1]))).min()
    if factor > most:
        raise UsageError(
            f"longtail:{factor:g} would leave the smallest class of {source.name} no row; "
            f"take a factor of at most {int(most)}"
        )
    profile = torch.empty_like(place)
    profile[order] = factor**-place
    kept = ((counts / profile).min() * profile).round().clamp(min=1)
    return ranks(source.train.y, len(counts), stream(seed, "data", "longtail")) < kept[source.train.y]


def _fill(source: Source, rule: Partition, owner: torch.Tensor, names: Sequence[str], seed: int) -> None:
    """Sees to it, in place, that every client has training rows: moves some where they were drawn, else raises."""
    clients = len(names)
    sizes = torch.bincount(owner[owner >= 0], minlength=clients)
    rows = int(sizes.sum())
    if not rule.evened or rows < clients:
        empty = [names[k] for k in (sizes == 0).nonzero().flatten().tolist()]
        if empty:
            raise UsageError(
                f"client {listed(empty)} of {source.name} is left without training rows; take fewer clients or "
                "a milder longtail"
            )
        return
    need = (max(1, min(LEAST, rows // (2 * clients))) - sizes).clamp(min=0)
    moved = int(need.sum())
    if moved:
        # The highest level such that what lies above it is enough.
        levels = range(int(sizes.max()))
        level = bisect_right(levels, -moved, key=lambda level: -int((sizes - level).clamp(min=0).sum())) - 1
        rank = ranks(owner, clients, stream(seed, "data", "partition", "fill"))
        spare = (rank >= level).nonzero().squeeze(1)
        spare = spare[rank[spare].argsort(descending=True, stable=True)[:moved]]
        owner[spare] = torch.arange(clients).repeat_interleave(need)
