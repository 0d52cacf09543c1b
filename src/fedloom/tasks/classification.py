"""One label a sample out of a known set of classes: images, tables, texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedloom.data.files import PLAIN, Files
from fedloom.data.load import load
from fedloom.data.partition import Federation, federate, natural_column
from fedloom.data.preprocessing import Preprocessing
from fedloom.data.text import words
from fedloom.encoders.features import Features
from fedloom.encoders.registry import build as build_encoder
from fedloom.encoders.registry import require_suited
from fedloom.errors import UsageError
from fedloom.nets import BUILDERS, reads_series
from fedloom.nets.libraries import without_weights
from fedloom.nets.recipes import made
from fedloom.task import Batch, Data, Scores, Task
from fedloom.tasks import ground
from fedloom.user_networks import is_own, placed_network

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec

T = TypeVar("T", bound="Classification")

JUDGED_AT_ONCE = 1000  # samples in one forward pass of an evaluation
DEFAULT_NETWORKS = {"tabular": "mlp:64", "text": "transformer", "features": "linear", "windows": "gru"}
NO_NAME = re.compile(r"[^\w.\- ]+")  # what the name of a test may not have in it


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy on a federation of labelled data, with a network of the library.

    Examples:
        >>> from fedloom import tasks
        >>> task = tasks.build(fedloom.Spec(data="digits", clients=5, partition="iid"))
        >>> isinstance(task, fedloom.Classification), task.population, task.classes, task.shape
        (True, 5, 10, (1, 8, 8))
    """

    target: ClassVar[str] = "class"  # what the label is, of `fedloom.data.targets`

    federation: Federation
    model: str
    head: str | None = field(default=None, kw_only=True)  # of a network of its user's own, where that says so

    @classmethod
    def load(
        cls,
        data: str = "digits",
        label: str | None = None,
        partition: str = "dirichlet:0.3",
        clients: int | None = None,
        validation: float = 0.1,
        model: str | None = None,
        seed: int = 0,
        public: float = 0.0,
        shared_data: float = 0.0,
        exclude: Sequence[str] = (),
        keep: Sequence[str] = (),
        missing: str = "refuse",
        group: str | None = None,
        newcomers: float | str | None = None,
        embed: str | None = None,
        metadata: Sequence[str] = (),
        files: Files = PLAIN,
        head: str | None = None,
        test_share: float | None = None,
    ) -> Self:
        """Reads data by name, file, folder or `hf:NAME`, and deals it to clients (see `fedloom.data`).

        `files` says how files are read. `embed` names a frozen encoder (see `fedloom.encoders`), of whose features the
        problem then is. `head` names the head of a `model` of one's own (see `fedloom.nets.own`).
        """
        natural = natural_column(partition)
        excluded = (*exclude, group) if group and group not in (natural, *metadata) else tuple(exclude)
        encode = embed and build_encoder(embed).encode()
        if model and reads_series(model):
            files = replace(files, series=model)
        columns = partial(load, client=natural, exclude=excluded, keep=tuple(keep), missing=missing, files=files)
        beside = partial(columns, metadata=tuple(metadata), target=cls.target, test=test_share)
        source = beside(data, label, seed, encode=encode or words)
        if embed:
            require_suited(embed, source)
        if clients is None and natural is None:
            clients = 20
        federation = federate(
            *(source, partition, clients, validation, seed, public, group, newcomers, shared_data, embed)
        )
        model = placed_network(model or cls.default(federation))
        if head and not is_own(model, BUILDERS):
            raise UsageError(f"head={head} says what is the head of a network of your own, and {model} has its own")
        task = replace(cls.of(federation, model), head=head)
        task.network()  # a network that does not fit these data is told now
        return task

    @classmethod
    def of(cls, federation: Federation, model: str) -> Self:
        """The task on data that are dealt."""
        return cls(federation, model)

    @classmethod
    def default(cls, federation: Federation) -> str:
        """The network that is taken where none is asked for."""
        return default_network(federation)

    @property
    def population(self) -> int:  # type: ignore[override]
        return self.federation.population

    @property
    def encoder(self) -> Features | None:  # type: ignore[override]
        return self.federation.encoder

    @property
    def test_share(self) -> float | None:
        """The share of test rows that was asked for, and held out."""
        return self.federation.test_share

    @property
    def newcomers(self) -> int:  # type: ignore[override]
        return self.federation.newcomers

    @property
    def classes(self) -> int:  # type: ignore[override]
        return 0 if self.federation.labels else len(self.federation.classes)  # those of labels are strata alone

    def network(self) -> nn.Module:
        return self.build(self.model)

    def build(self, model: str) -> nn.Module:
        return made(self._recipe(model))

    def recipe(self) -> Mapping[str, Any] | None:
        return None if is_own(self.model, BUILDERS) else self._recipe(without_weights(self.model))

    def _recipe(self, model: str) -> dict[str, Any]:
        f = self.federation
        shape, words = list(f.x.shape[1:]), len(f.vocabulary)
        recipe = {"kind": "library", "model": model, "shape": shape, "outputs": self.width, "vocabulary": words}
        if is_own(model, BUILDERS):
            recipe |= {"kind": "own", "head": self.head if model == self.model else None}
        return recipe

    @property
    def width(self) -> int:
        """How many outputs the network has."""
        return len(self.federation.labels or self.federation.classes)

    def preprocessing(self) -> Preprocessing | None:
        return self.federation.preprocessing

    def outputs(self) -> Mapping[str, Any]:
        return {"kind": "class", "classes": list(self.federation.classes)}

    def data(self, client: int, split: str) -> Data:
        return self.federation.rows(getattr(self.federation, split)[client])

    def global_test(self) -> Data:
        return self.federation.rows(self.federation.global_test)

    def global_tests(self) -> Mapping[str, Data]:
        """The test rows of every value of each column of metadata, where these have names: `sex Female`."""
        return by_value(self.global_test(), self.federation.levels)

    def public(self) -> Data | None:
        f = self.federation
        return f.rows(f.public) if len(f.public) else None

    def shared_data(self) -> Data | None:
        f = self.federation
        return f.rows(f.shared).without_labels() if len(f.shared) else None

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.y)

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        return measures(scores, data)

    def info(self, client: int) -> Mapping[str, Any]:
        groups = self.federation.groups
        return {"n": len(self.federation.train[client])} | ({"group": groups[client]} if groups else {})

    def to(self, device: torch.device) -> Classification:
        if self.federation.x.device == device:
            return self
        return replace(self, federation=self.federation.to(device))

    def describe(self) -> dict[str, Any]:
        return self.federation.table() | self.federation.decided()


def measures(scores: Scores, data: Data) -> dict[str, float]:
    """Loss and accuracy of a predictor on labelled data, as means over its `n` samples."""
    loss = torch.zeros((), dtype=torch.float64, device=data.inputs.device)
    right = torch.zeros((), dtype=torch.int64, device=data.inputs.device)
    for x, y in data.pieces(JUDGED_AT_ONCE):
        out = scores(x)
        loss += F.cross_entropy(out, y, reduction="sum")
        right += (out.argmax(1) == y).sum()
    return {"n": len(data), "loss": loss.item() / len(data), "accuracy": right.item() / len(data)}


def by_value(data: Data, levels: Mapping[str, Sequence[str]]) -> dict[str, Data]:
    """Data value by value of each column beside x and y that has names for them, as far as there are rows."""
    found = {}
    for column, names in levels.items():
        numbers = data[column]
        for number, name in enumerate(names):
            if (rows := (numbers == number).nonzero().flatten()).numel():
                found[NO_NAME.sub("_", f"{column} {name}").strip()] = replace(data, rows=data.taken(rows))
    return found


@ground
def build(spec: Spec) -> Classification:
    """The task of a run's data settings."""
    return loaded(Classification, spec)


def loaded(kind: type[T], spec: Spec) -> T:
    """A task of a kind, of a run's data settings."""
    return kind.load(
        *(spec.data, spec.label, spec.partition, spec.clients, spec.validation, spec.model, spec.seed, spec.public),
        *(spec.shared_data, spec.exclude, spec.keep, spec.missing, spec.group, spec.newcomers, spec.embed),
        metadata=spec.metadata,
        files=Files.of(spec),
        head=spec.head,
        test_share=spec.test_share,
    )


def default_network(federation: Federation) -> str:
    """A small network that suits the data: `cnn` on images of 28 x 28 and more, `mlp:64` on smaller ones and tables.

    On features it is a head alone.
    """
    if federation.kind == "image":
        return "cnn" if min(federation.x.shape[2:]) >= 28 else "mlp:64"
    return DEFAULT_NETWORKS[federation.kind]
