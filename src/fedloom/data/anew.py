"""Columns of new rows, read as those of the training rows were: as numbers, points in time and names of series."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.data import cells, dates
from fedloom.data.arrow import is_number, is_string
from fedloom.data.columns import stacked
from fedloom.data.preprocessing import Feature, Preprocessing
from fedloom.data.source import listed
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

ISO = "2024-01-31"
SHOWN = 3  # rows, or values, of which an error tells


def numbers(feature: Feature, column: pa.ChunkedArray, separator: str, decimal: str) -> pa.ChunkedArray | str:
    """A column as numbers, null where there is none; or what is wrong with it."""
    import pyarrow as pa

    if is_string(column.type):
        column = cells.trim(column)
        if not feature.kept:
            column, _ = cells.null_markers(column, (cells.PYTHONS,))
        if (found := cells.numbers(column, cells.european(separator, decimal), decimal != ",")) is not None:
            return found
        others = cells.strangers(column.drop_null())
        some = listed(others.unique().to_pylist(), SHOWN)
        several = "value that is no number" if len(others) == 1 else "values that are no numbers"
        return f"column {feature.name!r} holds {len(others)} {several}, such as {some}"
    if isinstance(column.type, pa.FixedShapeTensorType) or is_number(column.type) or pa.types.is_decimal(column.type):
        return column
    if pa.types.is_null(column.type):
        return column.cast(pa.float64())
    if (rows := stacked(column)) is not None:
        return pa.chunked_array([pa.FixedShapeTensorArray.from_numpy_ndarray(rows)])
    return f"column {feature.name!r} is {column.type}, and the model reads numbers there"


def points(feature: Feature, column: pa.ChunkedArray) -> pa.ChunkedArray | str:
    """A column as points in time, null where there is none; or what is wrong with it."""
    if dates.is_date(column.type):
        return column
    if not is_string(column.type):
        return f"column {feature.name!r} is {column.type}, and the model reads dates there"
    column, _ = cells.null_markers(cells.trim(column), (cells.PYTHONS,))
    if column.null_count == len(column):
        return column.cast("timestamp[us]")
    if found := dates.parsed(column, (feature.written,)):
        return next(iter(found.values()))
    some = listed(column.drop_null().unique().to_pylist(), SHOWN)
    return f"column {feature.name!r} holds {some}, and the model reads dates there, written as {feature.written or ISO}"


def sequence(where: str, table: pa.Table, separator: str, how: Preprocessing) -> pa.Table:
    """The columns by which rows are put in their places in series, as names, numbers or points in time."""
    import pyarrow as pa

    for feature in how.sequence:
        column = table.column(feature.name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if feature.role == "series":
            read = cells.null_markers(cells.trim(column))[0] if is_string(column.type) else column
        else:
            dated = feature.role == "date"
            read = points(feature, column) if dated else numbers(feature, column, separator, how.files.decimal)
        if isinstance(read, str):
            raise UsageError(f"{where}: {read}; repair them")
        table = table.set_column(table.column_names.index(feature.name), feature.name, read)
    return table
