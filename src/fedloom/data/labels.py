"""The label: which column it is, whether its values may be classes, and both splits' classes as numbers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedloom.data import cells
from fedloom.data.arrow import is_list, is_string
from fedloom.data.roles import FEW, LABELS, Wanted
from fedloom.data.source import listed, require_columns
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

MOST_CODES = 100  # classes that whole numbers may be without counting from 0 or 1
REGRESSION = "a number to be predicted is regression: set problem=regression, or cut it into classes"
FEW_ROWS = 10  # of a class, on average: fewer, and whole numbers are amounts


def label_column(data: str, names: list[str], label: str | None) -> str:
    """The column that is the label: the one that is named, or that is called as labels usually are."""
    if label is not None:
        require_columns(data, [label], names)
        return label
    usual = [name for name in LABELS if name in names]
    if len(usual) > 1 and usual[0] not in ("label", "labels", "target", "targets"):
        raise UsageError(
            f"{data} has {len(usual)} columns that may be the label, {listed(usual)}; say which: label=NAME"
        )
    if usual:
        return usual[0]
    raise UsageError(
        f"{data} has no column named {', '.join(LABELS[:-1])} or {LABELS[-1]}; say which one is the label "
        f"(label=NAME) among: {', '.join(names)}"
    )


def cast_label(data: str, table: pa.Table, wanted: Wanted) -> pa.Table:
    """A split whose label may be a class: a string, a truth value or a whole number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    label, names = wanted.label, table.column_names
    column = table.column(label)
    kind = column.type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        try:
            column = (
                pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column) if pa.types.is_floating(kind) else column
            )
            column = column.cast(pa.int64())
        except pa.ArrowInvalid:
            raise UsageError(f"label column {label!r} of {data} holds fractions; {REGRESSION}") from None
    elif not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or is_string(kind)):
        lists = isinstance(kind, pa.FixedShapeTensorType) or is_list(kind)
        several = "; several labels a row are no classes" if lists else ""
        raise UsageError(f"label column {label!r} of {data} is {kind}; expected whole numbers or strings{several}")
    return table.set_column(names.index(label), label, column)


def refuse_amounts(data: str, table: pa.Table, wanted: Wanted) -> None:
    """Raises UsageError for a label with too many different numbers to be classes, unless it is kept or has names."""
    import pyarrow as pa
    import pyarrow.compute as pc

    label = wanted.label
    values = table.column(label).drop_null()
    many = len(values.unique())
    if many <= FEW or label in wanted.keep or _class_names(table, label):
        return
    scarce = len(values) < FEW_ROWS * many
    if is_string(values.type):
        numeric = 1 - len(cells.strangers(values)) / len(values) + cells.share(values, cells.GROUPED)
        amount, kind = scarce and numeric > 0.5, "numbers written as text"
    elif pa.types.is_integer(values.type):
        ends = pc.min_max(values).as_py()
        coded = ends["min"] in (0, 1) and ends["max"] - ends["min"] + 1 == many
        amount, kind = not coded and (scarce or many > MOST_CODES), "whole numbers"
    else:
        return
    if amount:
        some = listed(values.unique().to_pylist(), 3)
        raise UsageError(
            f"label column {label!r} of {data} has {many} different {kind}, {some}, in {len(values)} rows; "
            f"{REGRESSION}; keep={label} takes each of them for a class"
        )


def encode_labels(
    data: str, train: pa.Table, test: pa.Table, label: str
) -> tuple[tuple[str, ...], torch.Tensor, torch.Tensor]:
    """The classes (the training rows' distinct values, sorted) and both splits' y, each class present in both."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = [train.column(label), test.column(label)]
    found, tested = (set(pc.unique(column).to_pylist()) for column in columns)
    if len(found) < 2:
        raise UsageError(f"label column {label!r} of {data} has one class only, {listed(found)}; expected two or more")
    if tested - found:
        raise UsageError(
            f"class {listed(sorted(tested - found))} of {data} is in the test split but not in the training split; "
            "drop its test rows or add training rows"
        )
    if found - tested:
        raise UsageError(
            f"class {listed(sorted(found - tested))} of {data} has no row in the test split; add test rows, drop the "
            "class, or give all rows in one file to have a test split held out"
        )
    values = sorted(found)
    names = _class_names(train, label)
    classes = tuple(names[v] if names and isinstance(v, int) and 0 <= v < len(names) else str(v) for v in values)
    known = pa.array(values, type=columns[0].type)
    y_train, y_test = (torch.from_numpy(pc.index_in(c, value_set=known).to_numpy().astype(np.int64)) for c in columns)
    return classes, y_train, y_test


def _class_names(table: pa.Table, label: str) -> list[str]:
    """The names that a hub data set (or a Parquet file written from one) gives to integer labels, if any."""
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(label, {})
    return list(feature.get("names", ())) if isinstance(feature, dict) else []
