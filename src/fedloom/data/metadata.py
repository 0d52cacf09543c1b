"""Columns that go with the rows beside x and y: sensitive attributes, domains, weights, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedloom.data.arrow import is_string
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

FEW = 20  # values, at most, of a column of whole numbers that are looked upon as names
Columns = dict[str, torch.Tensor]


def columns_beside(
    data: str, train: pa.Table, test: pa.Table, names: Sequence[str]
) -> tuple[tuple[Columns, Columns], dict[str, tuple[str, ...]]]:
    """Both splits' columns [N] by name, and the values that have names, by column, in the order of their numbers.

    Strings are numbered, int64, in their order over both splits: nothing is learned from that. Whole numbers and truth
    values stay what they are, int64, with names where they are few and count from 0; others are float32. Raises
    UsageError for what is none of these.
    """
    beside: tuple[Columns, Columns] = ({}, {})
    levels: dict[str, tuple[str, ...]] = {}
    for name in names:
        parts = [table.column(name) for table in (train, test)]
        if is_string(parts[0].type):
            found = sorted({value for part in parts for value in part.unique().to_pylist()})
            place = {value: number for number, value in enumerate(found)}
            arrays = [np.array([place[value] for value in part.to_pylist()], dtype=np.int64) for part in parts]
            levels[name] = tuple(found)
        else:
            arrays = [numbers_of(data, name, part) for part in parts]
            if arrays[0].dtype.kind == "i":
                values = np.unique(np.concatenate(arrays))
                if len(values) <= FEW and values[0] >= 0 and values[-1] < FEW:
                    levels[name] = tuple(map(str, range(values[-1] + 1)))
        for split, array in zip(beside, arrays, strict=True):
            split[name] = torch.from_numpy(array)
    return beside, levels


def known(beside: Columns, levels: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """What new rows' columns are read by, as plain JSON: the values that have names, and whether numbers are whole."""
    return {
        name: {"values": list(levels.get(name, ())), "whole": not column.is_floating_point()}
        for name, column in beside.items()
    }


def numbers_of(data: str, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers, int64 [N] where all are whole, else float32; raises UsageError for what is none."""
    import pyarrow as pa

    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return column.cast(pa.int64()).to_numpy()
    if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        values: np.ndarray = column.cast(pa.float64(), safe=False).to_numpy()
        whole = bool(np.all(values == np.round(values))) and bool(np.all(np.abs(values) < 2**53))
        return values.astype(np.int64 if whole else np.float32)
    raise UsageError(f"metadata={name}: the column {name!r} of {data} is {column.type}; expected numbers or strings")
