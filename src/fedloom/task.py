"""The problem that is learned: data, network, loss, and what a test means."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedloom.errors import UsageError
from fedloom.nets.cut import resume
from fedloom.nets.depth import blocks
from fedloom.quality import AsJudged, Quality

if TYPE_CHECKING:
    from fedloom.data.preprocessing import Preprocessing

# One gather of at most this many bytes at a time: a whole epoch of a small client, a piece of a large one.
CHUNK_BYTES = 32 * 2**20
NONE = -1  # the label of a sample that has none
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Batch:
    """Some samples: inputs `x` [B, ...] and targets `y` [B, ...]; `x, y = batch` works.

    `metadata` are the columns beside them by name, [B, ...] each: `batch["domain"]`.

    Examples:
        >>> batch = fedloom.Batch(torch.zeros(5, 3), torch.arange(5), {"domain": torch.tensor([0, 0, 1, 1, 1])})
        >>> x, y = batch
        >>> x.shape, len(y), batch["domain"].tolist()
        (torch.Size([5, 3]), 5, [0, 0, 1, 1, 1])
    """

    x: Tensor
    y: Tensor
    metadata: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """A column beside x and y, [B, ...]; raises UsageError for one that is not there."""
        return column_of(self.metadata, name)

    def part(self, which: slice) -> Batch:
        """Some of its samples."""
        return Batch(self.x[which], self.y[which], {name: column[which] for name, column in self.metadata.items()})

    def __len__(self) -> int:
        return self.y.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x, self.y))


@dataclass(frozen=True)
class Data:
    """Samples of one party: rows of a shared storage, copied only batch by batch.

    `inputs` [N, ...] and `labels` [N, ...] are the storage; `rows` (int64 [n], None for all) are this party's.
    `metadata` are columns beside them, [N, ...] each, which travel with the rows: `data["sex"]` [n, ...].

    Examples:
        >>> x, y, sex = torch.arange(8.0).view(4, 2), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
        >>> data = fedloom.Data(x, y, rows=torch.tensor([1, 3]), metadata={"sex": sex})
        >>> len(data), data.x.tolist(), data.y.tolist(), data["sex"].tolist()
        (2, [[2.0, 3.0], [6.0, 7.0]], [1, 1], [0, 1])
        >>> [batch["sex"].tolist() for batch in data.pieces(size=1)]
        [[0], [1]]
    """

    inputs: Tensor
    labels: Tensor
    rows: Tensor | None = None
    metadata: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(batch: Batch) -> Data:
        """The samples of a batch as data."""
        return Data(batch.x, batch.y, metadata=batch.metadata)

    def __len__(self) -> int:
        return (self.labels if self.rows is None else self.rows).shape[0]  # `len` of a tensor takes ten times as long

    @property
    def x(self) -> Tensor:
        """This party's inputs [n, ...]."""
        return self.inputs if self.rows is None else self.inputs[self.rows]

    @property
    def y(self) -> Tensor:
        """This party's targets [n, ...]."""
        return self.labels if self.rows is None else self.labels[self.rows]

    def without_labels(self) -> Data:
        """The same samples, whose targets are `NONE` [N]; nothing of their labels is left in it."""
        nothing = torch.full((1,), NONE, device=self.labels.device).expand(len(self.labels))
        return replace(self, labels=nothing)

    def __getitem__(self, name: str) -> Tensor:
        """This party's part of a column beside x and y, [n, ...]; raises UsageError for one that is not there."""
        column = column_of(self.metadata, name)
        return column if self.rows is None else column[self.rows]

    def all(self) -> Batch:
        """Everything as one batch."""
        return Batch(self.x, self.y, {name: self[name] for name in self.metadata})

    def at(self, rows: Tensor) -> Batch:
        """Rows (int64 [B]) of the storage as a batch; of rows [K, B] one with K first in all of its tensors."""
        columns = {name: column[rows] for name, column in self.metadata.items()}
        return Batch(self.inputs[rows], self.labels[rows], columns)

    def taken(self, order: Tensor | None) -> Tensor:
        """The rows of the storage (int64 [n]) that hold this party's samples, in the order of `order` if given."""
        if self.rows is None:
            return torch.arange(len(self.labels), device=self.labels.device) if order is None else order
        return self.rows if order is None else self.rows[order]

    def pieces(self, size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """All samples in batches of `size` (the last may be smaller), in the order of `order` (int64 [n]) if given."""
        rows = None if self.rows is None and order is None else self.taken(order)
        row_bytes = max(1, self.inputs[:1].numel() * self.inputs.element_size())
        chunk = max(1, CHUNK_BYTES // (row_bytes * size)) * size
        for start in range(0, len(self), chunk):
            here = slice(start, start + chunk)
            stored = (self.inputs, self.labels, *self.metadata.values())
            x, y, *columns = (s[here] if rows is None else s.index_select(0, rows[here]) for s in stored)
            if columns:
                parts = zip(*(column.split(size) for column in columns), strict=True)
                beside = [dict(zip(self.metadata, part, strict=True)) for part in parts]
                yield from map(Batch, x.split(size), y.split(size), beside)
            else:
                yield from map(Batch, x.split(size), y.split(size))


def column_of(metadata: Mapping[str, Tensor], name: str) -> Tensor:
    """A column beside x and y; raises UsageError, with those that there are, for one that is not there."""
    if name not in metadata:
        there = ", ".join(metadata) or "none"
        raise UsageError(
            f"no column {name!r} beside x and y (there: {there}); the setting metadata={name} would carry it"
        )
    return metadata[name]


Scores = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Above:
    """The mean loss of batches whose inputs are states at a cut; two of one criterion and one cut are one loss."""

    criterion: Callable[[Tensor, Batch], Tensor]
    at: str

    def __call__(self, net: nn.Module, batch: Batch) -> Tensor:
        return self.criterion(resume(net, batch.x, self.at), batch)


NAME = re.compile(r"\w[\w.\- ]*")


def by_name(found: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """What is judged, or tested on, by name; raises UsageError for no entry, and for names that no column can have.

    A name stands behind an @ in the columns of a record: `global_test_accuracy@exit3`.
    """
    if not found:
        raise UsageError(f"{where} is an empty dict; expected at least one entry by name, as in {{'exit1': model}}")
    for name in found:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UsageError(
                f"{where} has the name {name!r}; expected letters, digits, spaces and . _ - (the record puts an @ "
                "before it), as in 'exit3'"
            )
    return found


class Task(ABC):
    """A federated problem over `population` clients, numbered 0 to population - 1.

    A task is data and pure functions. It is given to every engine's workers and never changes during a run.

    Examples:
        >>> from fedloom.tasks.toy import Toy
        >>> task = Toy(sizes=(30, 20))
        >>> task.population, len(task.data(1, "train")), len(task.global_test())
        (2, 20, 24)
        >>> fedloom.run("fedavg", task, rounds=1).spec.clients
        2
    """

    population: int
    newcomers: int = 0  # clients beyond: from `population` on, which no cohort ever has, judged as those who come later
    classes: int  # how many classes there are; 0 where the problem has none
    # Whether `judge` takes what `observe` and `predict` give as it is, any message value (a Vector, a graph as a
    # tensor, counts), in place of scores.
    judges_values: bool = False
    # What made the inputs of raw ones [B, ...], for a method that makes some, or for new rows; None: they are raw.
    encoder: Callable[[Tensor], Tensor] | None = None
    # The measures that `judge` gives beside the loss, the main one first: by it validation data choose rounds. They
    # must be among those of `fedloom.quality`; where a class declares none, they are those that its `judge` gives.
    qualities: tuple[Quality, ...] = AsJudged()  # type: ignore[assignment]

    @abstractmethod
    def network(self) -> nn.Module:
        """A fresh network, whose weights come from torch's global generator.

        Methods that work on its head, or on the features before it, need the children `body` and `head`.
        """

    def build(self, model: str) -> nn.Module:
        """A fresh network for these data by its name, as `network` is; for clients whose networks differ."""
        raise UsageError(f"a {type(self).__name__} has one network only and builds no {model!r}")

    def recipe(self) -> Mapping[str, Any] | None:
        """What `nets.recipes.made` builds the network of, in plain JSON; None: nobody can but this task."""
        return None

    def preprocessing(self) -> Preprocessing | None:
        """How inputs are made of raw rows; None: nothing is known of raw ones."""
        return None

    def outputs(self) -> Mapping[str, Any]:
        """What the network's outputs mean, in plain JSON: `kind` class, amount or labels, with what these need."""
        return {"kind": "class", "classes": [*map(str, range(self.classes))]} if self.classes else {"kind": "scores"}

    @abstractmethod
    def data(self, client: int, split: str) -> Data:
        """A client's samples of the split `train`, `validation` or `test`."""

    @abstractmethod
    def global_test(self) -> Data:
        """The global test set, which no training ever sees; without samples where nobody but clients has some."""

    def global_tests(self) -> Mapping[str, Data]:
        """Further global tests by name, each judged by itself: domains, new classes, attacked inputs; usually none.

        Their measures are recorded as `global_test_accuracy@NAME`, those on `global_test` without a name.
        """
        return {}

    def global_validation(self) -> Data | None:
        """Validation data at the server, where clients have no labels to validate with; None: clients validate."""
        return None

    @abstractmethod
    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean loss of a batch given the network's outputs for it, a tensor []."""

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a network on a batch, a tensor []."""
        return self.criterion(net(batch.x), batch)

    def head_loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a network's head alone, a tensor []; the batch's inputs are features [B, D]."""
        return self.criterion(net.get_submodule("head")(batch.x), batch)

    def loss_above(self, at: str) -> Callable[[nn.Module, Batch], Tensor]:
        """The mean loss of what stands behind a cut of a network; the batch's inputs are states at it (`nets.cut`)."""
        return Above(self.criterion, at)

    @abstractmethod
    def judge(self, scores: Any, data: Data) -> dict[str, float]:
        """Measures on data of a function from inputs to scores (or of a value, where `judges_values`).

        At least `n`, and as means over samples `loss` and others.

        The main one of `qualities` (usually `accuracy`), where it is given, is what validation data choose rounds by.
        """

    @property
    def answer(self) -> str:
        """What outputs are an answer to, by which measures can be asked for: `class`, `labels`, `amount`, or nothing.

        One of a class each, of several labels each there or not, or a number. It is `class` where there are classes; a
        problem of another kind says what it is, and `answers` what its outputs mean.
        """
        return "class" if self.classes and not self.judges_values else ""

    def answers(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets [B, ...] as measures take them: answers (float64), and what is true.

        Those of a class are probabilities [B, C] and numbers of classes [B]; of labels, probabilities [B, L] and 0 or 1
        [B, L]; of an amount, amounts [B] and amounts [B], in the unit of the target.
        """
        return outputs.double().softmax(1), y

    @abstractmethod
    def to(self, device: torch.device) -> Task:
        """This task with its storage on a device."""

    def at(self, round: int) -> Task:
        """The problem as it is in a round, where it changes with time."""
        return self

    def stage(self, round: int) -> int | None:
        """Which of several things is judged in a round: only rounds of one stage compare. None: always the same."""
        return None

    def present(self, client: int) -> bool:
        """Whether a client has something to train on; who has not is left out of a round's cohort."""
        return bool(self.info(client).get("n", 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.blank().shape[1:])

    def blank(self) -> Tensor:
        """An input of zeros [1, ...], of the shape and the type that inputs have."""
        inputs = self.data(0, "train").inputs
        return inputs.new_zeros(1, *inputs.shape[1:])

    def public(self) -> Data | None:
        """Public data with labels, at the server only, where the task has some."""
        return None

    def shared_data(self) -> Data | None:
        """Public data without labels (`Data.without_labels`), the same for everybody and in every round, if any."""
        return None

    def pool(self, client: int) -> Data | None:
        """A client's samples whose labels an oracle tells for a price, with these labels; None: there is no oracle.

        They are no others than in the storage of its `train` samples. A method finds them, without the labels, in
        `client.pool`, and asks for labels by `client.ask`; from then on they are among the client's training data.
        """
        return None

    @property
    def has_oracle(self) -> bool:
        """Whether labels can be asked for."""
        return self.pool(0) is not None

    def allowance(self, client: int) -> int:
        """How many labels a client may ask for in a run, where there is an oracle."""
        pool = self.pool(client)
        return 0 if pool is None else len(pool)

    @cached_property
    def _staged(self) -> bool:
        """Whether its network has several blocks in a stage; looked at once, as a network takes time to make."""
        return len(blocks(self.network())) > 1

    @cached_property
    def headed(self) -> bool:
        """Whether its network is `head(body(x))`, as methods need it that work on either."""
        return {"body", "head"} <= {name for name, _ in self.network().named_children()}

    @property
    def offers(self) -> frozenset[str]:
        """What this problem has beyond labelled rows at every client: a method's `needs` must be among it."""
        having = {"public": self.public(), "shared_data": self.shared_data(), "encoder": self.encoder}
        found = {name: its is not None for name, its in having.items()} | {"blocks": self._staged}
        return frozenset(name for name, there in found.items() if there)

    @property
    def demands(self) -> frozenset[str]:
        """What a method's `needs` must name to run on this problem at all; usually nothing."""
        return frozenset()

    def info(self, client: int) -> Mapping[str, Any]:
        """What a client registers with the server before training."""
        return {"n": len(self.data(client, "train"))}

    def rows_of(self, client: int, split: str) -> int:
        """How many samples a client has in a split."""
        return len(self.data(client, split))

    def describe(self) -> dict[str, Any]:
        """What each client got, in the form of a run's `partition.json`."""
        late = range(self.population, self.population + self.newcomers)
        whose = {"clients": range(self.population)} | ({"newcomers": late} if late else {})
        return {"partition": "given", "classes": [], "population": self.population} | {
            name: [{"id": k} | {split: self.rows_of(k, split) for split in SPLITS} for k in clients[:1000]]
            for name, clients in whose.items()
        }
