"""The targets of new rows, and the columns beside them, read as those of the training rows were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedloom.data.anew import numbers
from fedloom.data.arrow import is_string
from fedloom.data.cells import trim
from fedloom.data.columns import stacked
from fedloom.data.files import Files
from fedloom.data.masks import IGNORED, mask_array
from fedloom.data.metadata import Columns, numbers_of
from fedloom.data.preprocessing import Feature
from fedloom.data.source import listed, require_columns
from fedloom.data.tabular import as_numbers
from fedloom.data.targets import TARGETS, sound
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa


class Cells(NamedTuple):
    """How cells are read: `separator` is that of cells which are text still, `files` how files are read."""

    separator: str
    files: Files


EMPTY = {"class": torch.int64, "amount": torch.float32, "labels": torch.float32, "shares": torch.float32,
         "mask": torch.uint8}  # what targets of each kind are  # fmt: skip


def truths(where: str, table: pa.Table, label: str | None, target: str, names: Sequence[str], cells: Cells) -> Tensor:
    """The targets [N, ...] of a table's rows, whose names (of classes, labels or the classes of pixels) are known.

    Raises UsageError for rows that have none, or one that is not known.
    """
    kind = TARGETS[target]
    table = kind.joined(where, table, label)
    label = kind.column(where, table.column_names, label)
    return READ[target](where, label, table.column(label), names, cells)


def beside_anew(where: str, table: pa.Table, known: Mapping[str, Mapping[str, Any]], cells: Cells) -> Columns:
    """The columns [N] of new rows, by what `metadata.known` gave; raises UsageError for values that it knows not."""
    require_columns(where, known, table.column_names)
    found = {}
    for name, how in known.items():
        column, values = table.column(name), list(how["values"])
        words = trim(column).to_pylist() if is_string(column.type) else [*map(str, column.to_pylist())]
        if values and {*words} <= {*values}:
            found[name] = torch.tensor([values.index(word) for word in words])
            continue
        read_as = numbers(Feature(name, "number"), column, cells.separator, cells.files.decimal)
        array = None if isinstance(read_as, str) or read_as.null_count else numbers_of(where, name, read_as)
        if array is None or (values and not {*map(str, array.tolist())} <= {*values}):
            strange = sorted({str(word) for word in words} - {*values})
            among = f"those known are {listed(values)}" if values else "it has numbers"
            raise UsageError(f"metadata={name}: {where} has {listed(strange, 3)} there, and {among}; repair such rows")
        if how["whole"] and array.dtype.kind != "i":
            raise UsageError(f"metadata={name}: {where} has fractions there, and the numbers known are whole")
        found[name] = torch.from_numpy(array.astype(np.int64 if how["whole"] else np.float32))
    return found


def _classes(where: str, label: str, column: pa.ChunkedArray, names: Sequence[str], cells: Cells) -> Tensor:
    column = trim(column) if is_string(column.type) else column
    places = {name: place for place, name in enumerate(names)}
    found = []
    for row, value in enumerate(column.to_pylist()):
        text = str(int(value)) if isinstance(value, float) and value == int(value) else str(value)
        if text not in places:
            raise UsageError(
                f"row {row} of {where} has the label {value!r}, which is no class of this run ({', '.join(names[:8])}"
                f"{', ...' if len(names) > 8 else ''}); leave such rows out, or have the data by which rows are read "
                "show the class"
            )
        found.append(places[text])
    return torch.tensor(found, dtype=torch.int64)


def _amounts(where: str, label: str, column: pa.ChunkedArray, names: Sequence[str], cells: Cells) -> Tensor:
    read = numbers(Feature(label, "number"), column, cells.separator, cells.files.decimal)
    if isinstance(read, str):
        raise UsageError(f"{where}: {read}; the target is an amount")
    found = as_numbers(read)
    if found.shape[1] != 1 or not np.isfinite(found).all():
        rows = (~np.isfinite(found)).any(axis=1).nonzero()[0]
        raise UsageError(
            f"the target {label!r} of {where} is no number in row {listed(rows, 3) or 0} (rows count from 0); leave "
            "such rows out"
        )
    return torch.from_numpy(found[:, 0].astype(np.float32))


def _labels(where: str, label: str, column: pa.ChunkedArray, names: Sequence[str], cells: Cells) -> Tensor:
    found = _several(where, label, column, names)
    if not np.isin(found, (0, 1)).all():
        raise UsageError(f"the labels {label!r} of {where} hold other values than 0 and 1, or gaps; make them so")
    return torch.from_numpy(found.astype(np.float32))


def _shares(where: str, label: str, column: pa.ChunkedArray, names: Sequence[str], cells: Cells) -> Tensor:
    found = _several(where, label, column, names)
    sound(where, label, found)
    return torch.from_numpy((found / found.sum(axis=1, keepdims=True)).astype(np.float32))


def _several(where: str, label: str, column: pa.ChunkedArray, names: Sequence[str]) -> np.ndarray:
    """Rows of numbers, [N, L], one for each name."""
    import pyarrow as pa

    found = stacked(column)
    if isinstance(column.type, pa.FixedShapeTensorType):
        found = column.combine_chunks().to_numpy_ndarray()
    if found is None or found.ndim != 2 or found.shape[1] != len(names):
        width = list(found.shape[1:]) if found is not None else str(column.type)
        raise UsageError(
            f"the label {label!r} of {where} is {width} a row; this run has {len(names)} labels: {listed(names)}"
        )
    return found


def _masks(where: str, label: str, column: pa.ChunkedArray, names: Sequence[str], cells: Cells) -> Tensor:
    if (arrays := stacked(column)) is not None:
        import pyarrow as pa

        column = pa.chunked_array([pa.FixedShapeTensorArray.from_numpy_ndarray(arrays)])
    pixels = mask_array(where, label, column, cells.files.resize)
    there = np.unique(pixels).tolist()
    values = [0, IGNORED] if [*names] == ["0", "1"] and {*there} <= {0, IGNORED} else [*map(int, names)]
    if strange := [value for value in there if value not in (*values, IGNORED)]:
        raise UsageError(
            f"the masks {label!r} of {where} have the class {listed(strange)}, and this run those of {listed(names)}"
        )
    number = np.full(IGNORED + 1, IGNORED, dtype=np.uint8)
    number[values] = np.arange(len(values))
    return torch.from_numpy(number[pixels])


READ: dict[str, Callable[[str, str, pa.ChunkedArray, Sequence[str], Cells], Tensor]] = {
    "class": _classes,
    "amount": _amounts,
    "labels": _labels,
    "shares": _shares,
    "mask": _masks,
}
