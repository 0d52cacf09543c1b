"""The problem at one client: made of data of its own, or of its share of data that every side has.

What makes inputs and targets of raw rows (columns, categories, classes, scales) was learned of other rows and comes
with the offer, so that rows mean the same everywhere. No row leaves the client for this.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedloom import tasks
from fedloom.data.anew import sequence
from fedloom.data.columns import Read, unnested
from fedloom.data.load import read_splits
from fedloom.data.objects import is_table, table_of, table_of_columns
from fedloom.data.rows import as_table, inputs_of
from fedloom.data.text import continued
from fedloom.data.truths import Cells, beside_anew, truths
from fedloom.data.windows import from_the_end, in_series, starts
from fedloom.deploy.config import ClientConfig, DataConfig
from fedloom.deploy.offer import FILES, lies_here
from fedloom.errors import UsageError
from fedloom.parsing import chain
from fedloom.random import stream
from fedloom.runs.spec import Spec
from fedloom.task import SPLITS, Task
from fedloom.tasks._apart import Brought
from fedloom.tasks._described import KINDS, Meaning, Rows, at_server, ground_of, refuse
from fedloom.user_files import function_at

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("fedloom.client")

TEST = 0.2  # share of a client's rows that are held out, where the run asks for no other and no split is given
TARGET = "y"  # what targets are called that come beside inputs


@dataclass(frozen=True)
class Sheet:
    """Rows of raw cells, called `where` in errors: the table, what separates its cells, and that of the targets."""

    where: str
    table: pa.Table
    separator: str
    targets: pa.Table
    label: str | None


@dataclass(frozen=True)
class Part:
    """Rows of a split, and where they stand in series (or in a text) the number of that of each, int64 [N]."""

    rows: Rows
    series: Tensor | None

    def at(self, rows: Tensor) -> Part:
        """Some of them, by their places, int64 [n]."""
        return Part(self.rows.at(rows), None if self.series is None else self.series[rows])


def described(task: Task) -> dict[str, Any]:
    """What clients must know to bring rows of their own to a problem; where they cannot, `why`."""
    try:
        return Meaning.of(task).stored()
    except UsageError as error:
        return {"why": str(error)}


def brought(spec: Spec, clients: Mapping[int, ClientConfig]) -> Task:
    """The problem of a run in which these clients, by number, have rows of their own, all of them on this machine."""
    server = at_server(spec)
    offer = {"settings": {"data": spec.data}, "rows": described(server)}
    own = {number: config for number, config in clients.items() if not config.data.share}
    parts = {number: ground_of(task_of(config, spec, offer, number)) for number, config in own.items()}
    return tasks.build(spec, ground=lambda: Brought(ground_of(server), parts)) if parts else server


def task_of(config: ClientConfig, spec: Spec, offer: Mapping[str, Any], number: int) -> Task:
    """The task in which this client is the one with that number; raises UsageError where its data do not fit."""
    if config.data.share:
        name = offer["settings"].get("data")
        if name is None or lies_here(name):
            raise UsageError(
                "the data of this run have no name that every side knows, so that nobody has a share of them; name "
                'data of your own under [data]: file = "..." or loader = "site.py:load"'
            )
        return tasks.build(replace(spec, data=name))
    if "why" in offer["rows"]:
        raise UsageError(f"{str(offer['rows']['why'])[:400]}; take share = true for a trial, or another run")
    meaning = Meaning.restored(offer["rows"], "what the server offers")
    if any(part in str(name) for name in (meaning.model, meaning.head) for part in FILES):
        raise UsageError(f"the server names a file, {meaning.model}; no file name from elsewhere is followed")
    refuse(spec)
    if tasks.stacked(chain(spec.problem), "the problem")[0][0].name != meaning.problem:
        raise UsageError(f"the server offers problem={spec.problem} and rows of problem={meaning.problem}")
    return meaning.task(_read(config.folder, config.data, meaning, spec), number, spec.clients or 1, spec, ())


def _read(folder: Path, data: DataConfig, meaning: Meaning, spec: Spec) -> dict[str, Rows]:
    """The rows of each split, as the run reads them."""
    where = data.file or data.loader or ""
    found = {
        split: _part(f"{where} ({split})", given, meaning) for split, given in _given(folder, data, meaning).items()
    }
    for split, share in (("test", spec.test_share or TEST), ("validation", spec.validation)):
        if split not in found:
            found["train"], found[split] = _apart(found["train"], share, spec.seed, split)
    rows = {split: _in_windows(part, meaning) for split, part in found.items()}
    if not len(rows["train"]):
        raise UsageError(f"{where} has no training rows{_least(meaning)}; give some")
    return rows


def _given(folder: Path, data: DataConfig, meaning: Meaning) -> Mapping[str, Any]:
    """What there is of each split: a table, inputs and targets, or a text."""
    if data.file is not None:
        path = folder / data.file
        if not path.exists():
            raise UsageError(f"there is no file {path}; data.file in the client's settings names one")
        read = read_splits(str(path), KINDS[meaning.problem].target, meaning.how.files)
        if isinstance(read, str):
            return {"train": read}
        return {"train": read} | ({} if read.test is None else {"test": replace(read, train=read.test)})
    place = data.loader or ""
    name, _, function = place.rpartition(":")
    if not name.endswith(".py") or not function.isidentifier():
        raise UsageError(f'data.loader={place!r} is no function; give FILE.py:NAME, such as "site.py:load"')
    found = function_at(f"{(folder / name).resolve()}:{function}")()
    return found if isinstance(found, Mapping) and {*found} <= {*SPLITS} and "train" in found else {"train": found}


def _part(where: str, given: Any, meaning: Meaning) -> Part:
    """Rows of a split."""
    how, cut = meaning.how, meaning.how.files.windows
    if isinstance(given, str) and how.tokens == "characters":
        x, y, roles = continued(where, given, meaning.names, how.shape[0])
        return Part(Rows(x, y, {}), roles)
    sheet, told = _sheet(where, given, meaning), list[str]()
    singly = replace(how, files=replace(how.files, windows=None), sequence=()) if cut else how
    x = inputs_of(where, sheet.table, sheet.separator, singly, told)
    cells, target = Cells(sheet.separator, how.files), KINDS[meaning.problem].target
    y = truths(where, sheet.targets, sheet.label, target, meaning.names, cells)
    if len(y) != len(x):
        raise UsageError(f"{where} has {len(x)} inputs and {len(y)} labels; give as many")
    beside = beside_anew(where, sheet.table, meaning.beside, cells)
    for line in told:
        log.warning("%s", line)
    rows = Rows(x, meaning.scaled(y), beside)
    if not cut:
        return Part(rows, torch.zeros(len(y), dtype=torch.int64) if how.tokens == "characters" else None)
    order, series = in_series(where, sequence(where, sheet.table, sheet.separator, how), cut)
    return Part(rows.at(order), series)


def _sheet(where: str, given: Any, meaning: Meaning) -> Sheet:
    """What was read of a file, or given by a function, as tables."""
    if isinstance(given, Read):
        table = unnested(given.train)
        return Sheet(where, table, given.separator, table, meaning.label)
    if isinstance(given, tuple) and len(given) == 2:
        _, table, separator = as_table(given[0], meaning.how)
        return Sheet(where, table, separator, table_of_columns({TARGET: given[1]}), TARGET)
    if not is_table(given):
        raise UsageError(
            f"{where} is a {type(given).__name__}; expected a table with the label in it, or (inputs, labels), "
            'or these by split: {"train": ..., "test": ...}'
        )
    table = unnested(table_of(given))
    return Sheet(where, table, "", table, meaning.label)


def _apart(part: Part, share: float, seed: int, purpose: str) -> tuple[Part, Part]:
    """What stays, and what is held out: rows drawn by chance, or the last of each series."""
    count = len(part.rows)
    if part.series is None:
        order = torch.randperm(count, generator=stream(seed, "client", "split", purpose))
        held = order[: round(share * count)]
    else:
        sizes = torch.bincount(part.series)
        held = (from_the_end(part.series, len(sizes)) < (sizes * share).round()[part.series]).nonzero().flatten()
    kept = torch.ones(count, dtype=torch.bool)
    kept[held] = False
    return part.at(kept.nonzero().flatten()), part.at((~kept).nonzero().flatten())


def _in_windows(part: Part, meaning: Meaning) -> Rows:
    """The rows of a split; where a row is a window of a series, these windows, each with the target of its last row."""
    rows, cut = part.rows, meaning.how.files.windows
    if cut is None or part.series is None:
        return rows
    reach = torch.arange(cut.length + cut.horizon)
    pieces = torch.arange(len(rows)).split(torch.bincount(part.series).tolist())
    found = [piece[starts(len(piece), cut)[:, None] + reach] for piece in pieces]
    at = torch.cat([torch.zeros(0, len(reach), dtype=torch.int64), *found])
    return replace(rows.at(at[:, -1]), x=rows.x[at[:, : cut.length]])


def _least(meaning: Meaning) -> str:
    cut = meaning.how.files.windows
    return f" of which a window of {cut.length}, with its target, could be cut" if cut else ""
