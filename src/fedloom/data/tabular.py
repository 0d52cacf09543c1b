"""Tabular features: numbers as they are, strings one-hot over the training rows' categories, dates as their places in
time, texts by the frequent words that they have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedloom.data import dates, text
from fedloom.data.roles import MOST_CATEGORIES
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa


def tabular(
    data: str, features: Mapping[str, str], train: pa.Table, test: pa.Table
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...], dict[str, tuple[str, ...]]]:
    """Both splits' features `[N, D]`, in the order of the columns, NaN for gaps; how many of D each column became; and
    the values of those that have some: categories, or the words of a text."""
    blocks: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    known: dict[str, tuple[str, ...]] = {}
    problems = []
    for name, role in features.items():
        if role == "category":
            known[name] = _categories(data, name, train)
        elif role == "text":
            known[name] = text.frequent_words(train.column(name).to_pylist())
            if not known[name]:
                problems.append(f"column {name!r} is text of which no word is in several rows and missing in others")
        hours = role == "date" and dates.with_hours(train.column(name))
        for table, block in zip((train, test), blocks, strict=True):
            column = table.column(name)
            if role == "category":
                values = one_hot(column, known[name])
            elif role == "text":
                values = text.having(column.to_pylist(), known[name])
            else:
                values = dates.places(column, hours) if role == "date" else as_numbers(column)
            if infinite := int(np.isinf(values).any(axis=1).sum()):
                problems.append(f"column {name!r} has {infinite} rows with infinite values, or too large for float32")
            block.append(values)
        if len({block[-1].shape[1] for block in blocks}) > 1:
            problems.append(f"column {name!r} has rows of another length in the test split")
    if problems:
        raise UsageError(f"{data}: {'; '.join(problems)}; repair or exclude them")
    x_train, x_test = (torch.from_numpy(np.concatenate(block, axis=1)) for block in blocks)
    return x_train, x_test, tuple(values.shape[1] for values in blocks[0]), known


def as_numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers as float32 `[N, 1]`, of rows of numbers as `[N, D]`; what is missing is NaN."""
    import pyarrow as pa

    if isinstance(column.type, pa.FixedShapeTensorType):
        values = column.combine_chunks().to_numpy_ndarray()
    else:
        values = column.cast(pa.float64(), safe=False).to_numpy()[:, None]
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _categories(data: str, name: str, train: pa.Table) -> tuple[str, ...]:
    """The distinct strings of the training rows, sorted."""
    found = sorted(train.column(name).drop_null().unique().to_pylist())
    if len(found) > MOST_CATEGORIES:
        raise UsageError(
            f"column {name!r} of {data} has {len(found)} distinct strings, over {MOST_CATEGORIES}; "
            f"leave it out with exclude={name}, or give it as numbers"
        )
    return tuple(found)


def one_hot(column: pa.ChunkedArray, categories: tuple[str, ...]) -> np.ndarray:
    """Strings as `[N, categories]`: zeros for one that is none of these, NaN for a missing one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    index = pc.index_in(column, value_set=pa.array(categories, type=column.type))
    rows = np.eye(len(categories) + 1, len(categories), dtype=np.float32)[index.fill_null(len(categories)).to_numpy()]
    rows[column.is_null().to_numpy()] = np.nan
    return rows
