"""Arrow's types by what they hold, and its columns as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


def is_string(kind: pa.DataType) -> bool:
    """Whether a type is one of strings."""
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_number(kind: pa.DataType) -> bool:
    """Whether a type is one of numbers or of truth values."""
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is one of lists."""
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def raw_values(column: pa.ChunkedArray) -> np.ndarray:
    """The raw values `[N]` of a column of numbers, booleans or strings (None where one is missing)."""
    values = column.to_numpy()
    return values.astype(str) if is_string(column.type) and not column.null_count else values


def table_of_arrays(arrays: dict[str, np.ndarray]) -> pa.Table:
    """Arrays `[N]` and `[N, ...]` as the columns of one table."""
    import pyarrow as pa

    def column(array: np.ndarray) -> Any:
        if not len(array):
            return pa.nulls(0)  # whoever reads the columns asks for rows
        if array.ndim == 1:
            return pa.array(array.tolist() if array.dtype.kind in "US" else array)
        array = array.astype(np.uint8) if array.dtype == bool else array
        # A copy, in which an axis of one entry has a stride like any other.
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.array(array, order="C"))

    return pa.table({name: column(array) for name, array in arrays.items()})
