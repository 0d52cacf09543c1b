"""What the rows of a problem mean, without any of them; and the problem on rows that are read by that.

It was learned of some rows somewhere: which columns there are, their categories, the classes, the scales. As plain JSON
it goes to clients that bring rows of their own, and as a file (`NAME.columns.yaml`) from a site with rows to a server
without.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedloom import tasks
from fedloom._version import __version__
from fedloom.data import metadata
from fedloom.data.files import COLUMNS, GIVEN, Files
from fedloom.data.given import CLIENT, Given
from fedloom.data.load import read_splits
from fedloom.data.partition import Federation
from fedloom.data.preprocessing import Preprocessing
from fedloom.data.shards import Shards
from fedloom.data.source import Column
from fedloom.data.truths import EMPTY
from fedloom.errors import UsageError
from fedloom.fields import dumped, loaded
from fedloom.parsing import chain
from fedloom.runs.spec import Spec, with_overrides
from fedloom.runs.spec import plain as without_tuples
from fedloom.task import SPLITS, Task
from fedloom.tasks._apart import OWN
from fedloom.tasks._over import Over
from fedloom.tasks._trained_by import BALANCED
from fedloom.tasks.classification import Classification
from fedloom.tasks.distribution import Distribution
from fedloom.tasks.multilabel import Multilabel
from fedloom.tasks.oracle import Oracle
from fedloom.tasks.regression import Regression
from fedloom.tasks.segmentation import Segmentation
from fedloom.user_networks import placed_network

KINDS: dict[str, type[Classification]] = {
    "classification": Classification,
    "regression": Regression,
    "multilabel": Multilabel,
    "distribution": Distribution,
    "segmentation": Segmentation,
}
NETWORK = ("federation", "model", "head")  # of a problem, beside what it has learned
WHY = {  # why clients bring no rows of their own to a problem of another kind
    "oracle": "labels are told within a budget that is dealt by the sizes of all clients' pools, which no side knows",
    "finetune": "it needs a pretrained model, and clients load none that a server names",
    "graph": "a client's samples are the nodes of a graph, and no rows of a table",
    "several": "it is of several data sets, and a client brings one",
    "vertical": "its clients hold columns of the same rows",
    "causal": "its rows are drawn, and read from nowhere",
    "saddle": "its clients' functions are drawn, or of rows that are dealt by itself",
}
DEALT = {  # settings of rows that are dealt, and why clients with rows of their own do not follow them
    "newcomers": "who is held out of training has rows that are dealt with the others'",
    "group": "groups are found in rows that are dealt",
    "shared_data": "there are no rows that all sides have",
    "embed": "what makes features of rows is an encoder, and clients load none that a server names",
}
READ_BY_IT = (
    *("label", "exclude", "keep", "metadata", "missing", "sep", "encoding", "decimal", "resize", "windows"),
)  # settings that a file of columns stands for


@dataclass(frozen=True)
class Rows:
    """Samples of a split: inputs `x` [N, ...], targets `y` [N, ...] and the columns beside them [N]."""

    x: Tensor
    y: Tensor
    beside: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.y)

    def at(self, rows: Tensor) -> Rows:
        """Some of them, by their places, int64 [n]."""
        return Rows(self.x[rows], self.y[rows], {name: column[rows] for name, column in self.beside.items()})


@dataclass(frozen=True)
class Meaning:
    """What the rows of a `problem` mean: `how` they are read, and what their targets are.

    `kind` and `shape` are those of its inputs, `label` the column of the targets, `names` those of classes, labels or
    classes of pixels; `fields` are what else the problem has learned (the scale of an amount), `beside` the columns
    beside x and y (`metadata.known`), and `source` says of which rows all this was learned. `model` and `head` are the
    network's.
    """

    problem: str
    source: str
    label: str | None
    names: tuple[str, ...]
    fields: Mapping[str, Any]
    kind: str
    shape: tuple[int, ...]
    beside: Mapping[str, Any]
    how: Preprocessing
    model: str | None = None
    head: str | None = None

    @staticmethod
    def of(task: Task) -> Meaning:
        """What the rows of a problem mean; raises UsageError where clients cannot bring rows to it, saying why."""
        task = ground_of(task)
        problem = next((name for name, kind in KINDS.items() if type(task) is kind), None)
        how = task.preprocessing()
        if problem is None or how is None or not isinstance(task, Classification):
            raise UsageError(no_form(type(task).__module__.rpartition(".")[2]))
        f = task.federation
        own = {one.name: getattr(task, one.name) for one in dataclasses.fields(task)}
        learned = f"{int(f.train.offsets[f.population])} of the {len(f.y)} rows of {Path(f.source).name}"
        return Meaning(
            problem,
            f.source if f.partition == OWN else learned,
            next((column.name for column in f.roles if column.role == "label"), None),
            f.labels or (f.classes if f.strata is None else ()),
            {name: value for name, value in own.items() if name not in NETWORK},
            f.kind,
            tuple(f.x.shape[1:]),
            metadata.known(dict(f.metadata), f.levels),
            how,
            task.model,
            task.head,
        )

    def stored(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        plain = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        lists = {"names": list(self.names), "shape": list(self.shape), "how": self.how.stored()}
        return plain | lists | {"fields": dict(self.fields), "beside": dict(self.beside)}

    @staticmethod
    def restored(stored: Any, where: str) -> Meaning:
        """What `stored` gave; raises UsageError for anything else, and for what would have a side load something."""
        try:
            told = dict(stored)
            how = Preprocessing.restored(told["how"])
            shape, names = tuple(map(int, told["shape"])), tuple(map(str, told["names"]))
            made = Meaning(**told | {"names": names, "shape": shape, "how": how})
            known = made.problem in KINDS and made.how.tokens in ("", "words", "characters") and how.encoder is None
            made.none()
            learned = {one.name for one in dataclasses.fields(KINDS[made.problem])} - {*NETWORK}
            if learned != {*made.fields} or not all(math.isfinite(value) for value in made.fields.values()):
                raise ValueError(f"its fields are {', '.join(made.fields) or 'none'}")
        except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as error:
            raise UsageError(f"{where} does not say what rows mean ({error}); fedloom columns writes it") from error
        if not known:
            raise UsageError(f"{where} is of another kind of problem, or of rows that need more than itself to be read")
        return made

    @staticmethod
    def read(path: Path) -> Meaning:
        """From a file that `write` wrote; raises UsageError."""
        try:
            told = loaded(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {path}: {error}".replace("\n", " ")) from error
        if not isinstance(told, dict) or told.pop("fedloom", None) is None:
            raise UsageError(f"{path} does not say what rows mean; fedloom columns writes it")
        return Meaning.restored(told, str(path))

    def text(self) -> str:
        """The YAML of such a file."""
        return dumped({"fedloom": __version__} | without_tuples(self.stored()))

    def scaled(self, y: Tensor) -> Tensor:
        """Targets as the problem learns them: amounts in the unit of their deviation."""
        return (y - self.fields["mean"]) / self.fields["deviation"] if "deviation" in self.fields else y

    def none(self) -> Rows:
        """No rows, of the shapes and types that rows have."""
        target = KINDS[self.problem].target
        several = {"labels": (len(self.names),), "shares": (len(self.names),), "mask": self.shape[1:]}
        x = torch.zeros(0, *self.shape, dtype=torch.int64 if self.kind == "text" else torch.float32)
        y = torch.zeros(0, *several.get(target, ()), dtype=EMPTY[target])
        beside = {
            n: torch.zeros(0, dtype=torch.int64 if one["whole"] else torch.float32) for n, one in self.beside.items()
        }
        return Rows(x, y, beside)

    def task(self, splits: Mapping[str, Rows], number: int, clients: int, spec: Spec, told: Sequence[str]) -> Task:
        """The problem of so many clients, of whom the one with that number has some rows, and no other has any.

        `told` is what is to be known of these data, in sentences.
        """
        kind, sizes = KINDS[self.problem], [len(splits[split]) for split in SPLITS]
        each = [splits[split] for split in SPLITS]

        def part(place: int) -> Shards:
            first = sum(sizes[:place])
            offsets = torch.tensor([sizes[place] if k > number else 0 for k in range(clients + 1)])
            return Shards(torch.arange(first, first + sizes[place]), offsets)

        by_class = kind.target in ("class", "shares")
        federation = Federation(
            source=self.source,
            kind=self.kind,
            classes=self.names if by_class else (),
            vocabulary=self.how.vocabulary,
            partition=OWN,
            x=torch.cat([rows.x for rows in each]),
            y=torch.cat([rows.y for rows in each]),
            train=part(0),
            validation=part(1),
            test=part(2),
            public=torch.zeros(0, dtype=torch.int64),
            names=[str(k) for k in range(clients)],
            notes=[""] * clients,
            roles=(Column(self.label, "label"),) if self.label else (),
            metadata={name: torch.cat([rows.beside[name] for rows in each]) for name in self.beside},
            levels={name: tuple(one["values"]) for name, one in self.beside.items() if one["values"]},
            strata=None if kind.target == "class" else torch.zeros(sum(sizes), dtype=torch.int64),
            labels=() if kind.target in ("class", "amount") else self.names,
            preprocessing=self.how,
            decisions=tuple(told),
            test_share=spec.test_share,
        )
        model = self.model or placed_network(spec.model or kind.default(federation))
        task = replace(kind(federation, model, **self.fields), head=self.head)
        task.network()  # one that does not fit is told now
        return tasks.build(spec, ground=lambda: task)


def ground_of(task: Task) -> Task:
    """The problem without what lies upon it; an oracle goes by all clients' rows, and is none without them."""
    while isinstance(task, Over) and not isinstance(task, Oracle):
        task = task.inner
    return task


def no_form(problem: str) -> str:
    """Why clients bring no rows of their own to a problem."""
    why = WHY.get(problem, f"what rows mean is known for {', '.join(KINDS)} alone")
    return f"clients bring no data of their own to a problem of the kind {problem}: {why}"


def refuse(spec: Spec) -> None:
    """Raises UsageError for settings that nobody can follow where clients have rows of their own."""
    plain = type(spec)()
    for name, why in DEALT.items():
        if (value := getattr(spec, name)) != getattr(plain, name):
            raise UsageError(
                f"{name}={value} does not go with clients that have rows of their own: {why}; leave it out"
            )
    if spec.class_weights == BALANCED:
        raise UsageError(
            f"class_weights={BALANCED} counts the rows of all clients, which nobody has here; give numbers: 1,2.5,1"
        )


def learned(data: str, overrides: Sequence[str]) -> Meaning:
    """What the rows of data mean, learned of all that are not test rows; `overrides` say how to read them."""
    asked = with_overrides({}, overrides)
    may = ("problem", *READ_BY_IT, "partition", "test_share", "model", "head", "seed")
    for name in asked:
        if name not in may:
            raise UsageError(f"{name} says nothing of what rows mean; leave it out (there are: {', '.join(may)})")
    dealt = {} if "partition" in asked else {"partition": "iid", "clients": 1}
    spec = Spec.of({"data": data, "validation": 0} | dealt | asked)
    whole = _one_client(spec) if spec.windows not in (None, GIVEN) and "partition" not in asked else None
    if whole:
        spec = replace(spec, partition=f"column:{CLIENT}", clients=None)
    found = Meaning.of(tasks.build(spec, whole))
    source = found.source.replace(str(whole), Path(data).name)
    return replace(found, source=source, label=spec.label or found.label, model=spec.model, head=spec.head)


def _one_client(spec: Spec) -> Given:
    """The rows of a table as those of one client: its series are cut in their order, and not dealt."""
    read = read_splits(str(Path(spec.data).expanduser()), "class", Files.of(spec))
    if isinstance(read, str):
        raise UsageError(f"windows={spec.windows} cuts the rows of tables, and {spec.data} is a text; leave it out")
    whole = Given.of([read.train if read.test is None else (read.train, read.test)])
    whole.read = replace(whole.read, separator=read.separator)
    return whole


def at_server(spec: Spec) -> Task:
    """The problem of a run's settings as a server has it: without a row where its data are a file that says what rows
    mean. Then there is no global test, and clients alone judge, on rows of their own.
    """
    if not spec.data.endswith(COLUMNS):
        return tasks.build(spec)
    refuse(spec)
    plain = type(spec)()
    for name in (*READ_BY_IT, "partition", "public"):
        if (value := getattr(spec, name)) != getattr(plain, name):
            why = "says how rows are read; give it to fedloom columns" if name in READ_BY_IT else "has no rows to deal"
            told = ",".join(value) if isinstance(value, tuple) else value
            raise UsageError(f"{name}={told}: {Path(spec.data).name} {why}, and leave it out here")
    meaning = Meaning.read(Path(spec.data).expanduser())
    lowest = tasks.stacked(chain(spec.problem), f"problem {spec.problem!r}")[0][0].text
    if lowest != meaning.problem:
        raise UsageError(
            f"{spec.data} says what rows of problem={meaning.problem} mean, and the run is of problem={lowest}; write "
            f"it again: fedloom columns TABLE problem={lowest}"
        )
    told = [
        f"The server has no rows: columns, classes and scales are those of {meaning.source}, as "
        f"{Path(spec.data).name} has them.",
        "There is no global test: clients judge, on validation and test rows of their own.",
    ]
    nothing = dict.fromkeys(SPLITS, meaning.none())
    named = replace(meaning, model=None if spec.model else meaning.model, head=spec.head or meaning.head)
    made = named.task(nothing, 0, spec.clients or 1, spec, told)
    Meaning.of(made)  # raises UsageError where something lies upon it that needs all clients' rows
    return made
