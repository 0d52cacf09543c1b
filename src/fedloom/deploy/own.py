"""The problem at one client: made of data of its own, or of its share of data that every side has.

What makes inputs of raw rows (columns, categories, scales) was learned from the server's own rows and comes with the
offer, so that rows mean the same everywhere; so do the classes. No row leaves the client for this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedloom import tasks
from fedloom.data.labels import label_column
from fedloom.data.load import read_tables
from fedloom.data.objects import is_table, table_of
from fedloom.data.partition import Federation
from fedloom.data.preprocessing import Preprocessing
from fedloom.data.rows import inputs
from fedloom.data.shards import Shards
from fedloom.deploy.config import ClientConfig, DataConfig
from fedloom.errors import UsageError
from fedloom.random import stream
from fedloom.runs.spec import Spec
from fedloom.task import SPLITS, Task
from fedloom.tasks.classification import Classification
from fedloom.user_files import function_at

TEST = 0.2  # share of a client's rows that are held out, where the run asks for no other and no split is given
NO_FORM = "clients bring data of their own to problems of classes in tables, images and texts so far"

Rows = tuple[Tensor, Tensor]  # inputs [N, ...] and classes int64 [N]


def described(task: Task) -> dict[str, Any] | None:
    """What clients must know to bring rows of their own to a problem; None where they cannot."""
    known = task.preprocessing() if type(task) is Classification else None
    if not isinstance(task, Classification) or known is None or task.encoder is not None:
        return None
    f = task.federation
    label = next((column.name for column in f.roles if column.role == "label"), None)
    return {"preprocessing": known.stored(), "classes": list(f.classes), "model": task.model, "label": label}


def task_of(config: ClientConfig, spec: Spec, offer: Mapping[str, Any], number: int) -> Task:
    """The task in which this client is the one with that number; raises UsageError where its data do not fit."""
    if config.data.share:
        if "data" not in offer["settings"]:
            raise UsageError(
                "the data of this run have no name that every side knows, so that nobody has a share of them; name "
                'data of your own under [data]: file = "..." or loader = "site.py:load"'
            )
        return tasks.build(replace(spec, data=offer["settings"]["data"]))
    if offer["rows"] is None:
        raise UsageError(f"{NO_FORM}, and this run is of another one; take share = true for a trial, or another run")
    return _of_rows(_read(config.folder, config.data, offer["rows"], spec), offer["rows"], spec, number)


def _of_rows(splits: Mapping[str, Rows], about: Mapping[str, Any], spec: Spec, number: int) -> Task:
    """The task on rows of one client, of whom the others are not known."""
    how = Preprocessing.restored(about["preprocessing"])
    sizes = {split: len(splits[split][1]) for split in SPLITS}
    clients = spec.clients or 1

    def part(split: str) -> Shards:
        first = sum(sizes[one] for one in SPLITS[: SPLITS.index(split)])
        offsets = torch.tensor([sizes[split] if k > number else 0 for k in range(clients + 1)])
        return Shards(torch.arange(first, first + sizes[split]), offsets)

    x, y = (torch.cat([splits[split][place] for split in SPLITS]) for place in (0, 1))
    federation = Federation(
        source="data of its own",
        kind=how.kind,
        classes=tuple(about["classes"]),
        vocabulary=how.vocabulary,
        partition="own",
        x=x,
        y=y,
        train=part("train"),
        validation=part("validation"),
        test=part("test"),
        public=torch.zeros(0, dtype=torch.int64),
        names=[str(k) for k in range(clients)],
        notes=[""] * clients,
        preprocessing=how,
    )
    task = Classification(federation, about["model"])
    task.network()  # one that does not fit is told now
    return task


def _read(folder: Path, data: DataConfig, about: Mapping[str, Any], spec: Spec) -> dict[str, Rows]:
    """The rows of each split, as the run reads them."""
    how = Preprocessing.restored(about["preprocessing"])
    if data.file is not None:
        found: Any = _whole(str(folder / data.file))
    else:
        place = data.loader or ""
        name, _, function = place.rpartition(":")
        if not name.endswith(".py") or not function.isidentifier():
            raise UsageError(f'data.loader={place!r} is no function; give FILE.py:NAME, such as "site.py:load"')
        found = function_at(f"{(folder / name).resolve()}:{function}")()
    given = found if isinstance(found, Mapping) and {*found} <= {*SPLITS} and "train" in found else {"train": found}
    where = data.file or data.loader or ""
    splits = {split: _rows(f"{where} ({split})", rows, how, about, spec) for split, rows in given.items()}
    if "test" not in splits:
        splits["train"], splits["test"] = _split(splits["train"], spec.test_share or TEST, spec.seed, "test")
    if "validation" not in splits:
        splits["train"], splits["validation"] = _split(splits["train"], spec.validation, spec.seed, "validation")
    if not len(splits["train"][1]):
        raise UsageError(f"{where} has no training rows; give some")
    return splits


def _whole(path: str) -> str:
    if not Path(path).exists():
        raise UsageError(f"there is no file {path}; data.file in the client's settings names one")
    return path


def _rows(where: str, given: Any, how: Preprocessing, about: Mapping[str, Any], spec: Spec) -> Rows:
    """Inputs and classes of what was read, or what a function gave: a file, a table, or (inputs, labels)."""
    if isinstance(given, tuple) and len(given) == 2:
        x, _ = inputs(given[0], how)
        labels = torch.as_tensor(given[1]).tolist() if not _are_texts(given[1]) else list(given[1])
    else:
        table = read_tables(Path(given), how.files)[0] if isinstance(given, str) else None
        if table is None and not is_table(given):
            raise UsageError(
                f"{where} is a {type(given).__name__}; expected a table with the label in it, or (inputs, labels), "
                'or these by split: {"train": ..., "test": ...}'
            )
        table = table_of(given) if table is None else table
        label = label_column(where, table.column_names, spec.label or about["label"])
        x, _ = inputs(given, how)
        labels = table.column(label).to_pylist()
    if len(labels) != len(x):
        raise UsageError(f"{where} has {len(x)} inputs and {len(labels)} labels; give as many")
    return x, _classes(where, labels, about["classes"])


def _are_texts(labels: Any) -> bool:
    return len(labels) > 0 and isinstance(labels[0], str)


def _classes(where: str, labels: list[Any], classes: list[str]) -> Tensor:
    """Labels as numbers of classes; raises UsageError for one that is none."""
    places = {name: place for place, name in enumerate(classes)}
    found = []
    for row, label in enumerate(labels):
        text = str(int(label)) if isinstance(label, float) and label == int(label) else str(label)
        if text not in places:
            raise UsageError(
                f"row {row} of {where} has the label {label!r}, which is no class of this run ({', '.join(classes[:8])}"
                f"{', ...' if len(classes) > 8 else ''}); leave such rows out, or have the server's data show the class"
            )
        found.append(places[text])
    return torch.tensor(found, dtype=torch.int64)


def _split(rows: Rows, share: float, seed: int, purpose: str) -> tuple[Rows, Rows]:
    """Some rows, drawn by chance, and the others: what stays, and what is held out."""
    x, y = rows
    order = torch.randperm(len(y), generator=stream(seed, "client", "split", purpose))
    held = order[: round(share * len(y))].sort().values
    kept = order[len(held) :].sort().values
    return (x[kept], y[kept]), (x[held], y[held])
