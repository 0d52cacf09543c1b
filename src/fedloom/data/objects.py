"""One table that Python has, of whatever library, as a table of Arrow. No library is imported to know its objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from fedloom.data.arrow import table_of_arrays
from fedloom.data.images import GREY
from fedloom.errors import UsageError
from fedloom.letters import with_article

if TYPE_CHECKING:
    import pyarrow as pa

LABEL = "label"  # the column of y beside a table of inputs
SINGLE = (str, bytes, int, float, bool, type(None))
NOT_TABLES = {  # by its type's name, what to give in the place of what is no data or not all of it
    "ndarray": "an array alone has no labels: give (x, y)",
    "Tensor": "a tensor alone has no labels: give (x, y)",
    "Series": "a column alone has no features: give the whole DataFrame",
    "DataLoader": "clients draw their own batches: give its dataset, as in loader.dataset",
    "IterableDataset": "rows are dealt by their numbers: give a Dataset that has a length, such as list(...) of its "
    "items in one",
    "IterableDatasetDict": "rows are dealt by their numbers: load it with streaming=False",
    "generator": "rows are dealt by their numbers: give all of them, as arrays (x, y) or as a Dataset",
    "csr_matrix": "sparse rows are not read: give matrix.toarray() and the labels, (x, y)",
    "csr_array": "sparse rows are not read: give array.toarray() and the labels, (x, y)",
    "Bunch": "give its arrays: (bunch.data, bunch.target)",
}


def kind_of(data: object) -> str:
    """What an object is called: the name of its type, or of a parent of it that is known better."""
    known = ("DataLoader", "IterableDataset", "IterableDatasetDict", "DatasetDict", "Tensor")
    names = [parent.__name__ for parent in type(data).__mro__]
    return next((name for name in names if name in known), names[0])


def is_table(data: object) -> bool:
    """Whether this is one table: a DataFrame, a Dataset, or x and y."""
    if kind_of(data) in NOT_TABLES:
        return False
    return _is_frame(data) or isinstance(data, Dataset) or _of(data, "datasets", "Dataset") or _is_x_and_y(data)


def table_of(data: Any) -> pa.Table:
    """One table (`is_table`) as Arrow has it: the same columns, or `x` and `y`; raises UsageError if it cannot."""
    if not is_table(data):
        kind = kind_of(data)
        raise UsageError(
            f"{with_article(kind)} is no table of rows; {NOT_TABLES.get(kind, 'give a DataFrame or (x, y)')}"
        )
    if _is_frame(data):
        return _frame(data)
    if isinstance(data, tuple):
        return _x_and_y(*data)
    return _hub(data) if _of(data, "datasets", "Dataset") else _items(data)


def table_of_columns(columns: Mapping[str, Any]) -> pa.Table:
    """Columns by name, arrays or sequences of one length, as a table."""
    import pyarrow as pa

    made = {name: _column(values, name) for name, values in columns.items()}
    lengths = {name: len(values) for name, values in made.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UsageError(f"the columns differ in length ({told}); expected one entry a row in each")
    return pa.table(made)


def _of(data: object, package: str, name: str) -> bool:
    """Whether an object is of a class of a package, which need not be installed."""
    return any(one.__name__ == name and one.__module__.partition(".")[0] == package for one in type(data).__mro__)


def _is_frame(data: object) -> bool:
    """Whether this is a table with named columns: of pandas, of Arrow, or of a library that hands out Arrow's."""
    return _of(data, "pandas", "DataFrame") or (hasattr(data, "__arrow_c_stream__") and hasattr(data, "columns"))


def _is_array(data: object) -> bool:
    return isinstance(data, np.ndarray | torch.Tensor)


def _is_values(data: object) -> bool:
    """Whether this may be y: an array, a column, or a list of single values."""
    listed = isinstance(data, list) and bool(data) and all(isinstance(one, SINGLE) for one in data)
    return _is_array(data) or _of(data, "pandas", "Series") or listed


def _is_x_and_y(data: object) -> bool:
    if not isinstance(data, tuple) or len(data) != 2 or not _is_values(data[1]):
        return False
    return _is_values(data[0]) or _is_frame(data[0]) or (isinstance(data[0], list) and bool(data[0]))


def _frame(data: Any) -> pa.Table:
    """A table with named columns; the index is a column where it has a name."""
    import pyarrow as pa

    if _of(data, "pandas", "DataFrame"):
        names = [str(name) for name in data.columns]
        if data.columns.nlevels > 1:
            raise UsageError(
                f"the DataFrame's columns have {data.columns.nlevels} levels; give it one: "
                "table.columns = ['_'.join(names) for names in table.columns]"
            )
        indexed = [name for name in data.index.names if name is not None]
        data = data.reset_index(level=indexed) if indexed and not {*map(str, indexed)} & {*names} else data
        names = [str(name) for name in data.columns]
    else:
        names = list(data.column_names if isinstance(data, pa.Table) else data.columns)
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UsageError(f"the table has two columns named {twice[0]!r}; rename one")
    try:
        if _of(data, "pandas", "DataFrame"):
            return _plain(pa.Table.from_pandas(data.set_axis(names, axis=1), preserve_index=False))
        return _plain(pa.table(data))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        told = " ".join(str(error).split())[:200].rstrip(".")
        raise UsageError(
            f"the table has a column whose values have no common type ({told}); convert it, as by "
            "table[name] = table[name].astype(str)"
        ) from None


def _plain(table: pa.Table) -> pa.Table:
    """The same with one type for strings, whatever library it comes from."""
    import pyarrow as pa

    for place, field in enumerate(table.schema):
        if pa.types.is_large_string(field.type) or pa.types.is_string_view(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(pa.string()))
    return table


def _x_and_y(x: Any, y: Any) -> pa.Table:
    """Inputs and labels: columns `x` and `y`, or those of a table of inputs and `label`."""
    if not _is_frame(x):
        return table_of_columns({"x": x, "y": y})
    table, labels = _frame(x), table_of_columns({LABEL: y}).column(0)
    if LABEL in table.column_names:
        raise UsageError(f"the table of inputs has a column {LABEL!r} already; leave it out, or give the table alone")
    if len(labels) != table.num_rows:
        raise UsageError(f"there are {table.num_rows} rows of inputs and {len(labels)} labels; expected one a row")
    return table.append_column(LABEL, labels)


def _hub(data: Any) -> pa.Table:
    """A data set of the `datasets` library, its features as they are stored."""
    if (data.format or {}).get("type") == "custom":
        raise UsageError(
            "the Dataset has a transform, which makes its rows when they are asked for; apply it once: "
            "dataset.map(...), or take it off: dataset.with_format(None)"
        )
    table: pa.Table = data.with_format("arrow")[:]
    return _plain(table)


def _items(data: Any) -> pa.Table:
    """A data set of PyTorch, each item asked for once."""
    if type(data) is TensorDataset and len(data.tensors) == 2:
        return table_of_columns({"x": data.tensors[0], "y": data.tensors[1]})
    try:
        count = len(data)
    except (TypeError, NotImplementedError):
        raise UsageError(f"{with_article(type(data).__name__)} has no length; give a Dataset with __len__") from None
    if not count:
        raise UsageError(f"{with_article(type(data).__name__)} has no items; give one that has")
    items = [data[place] for place in range(count)]
    first = items[0]
    if isinstance(first, Mapping):
        names = [str(name) for name in first]
        rows = [[item.get(name) for name in first] for item in items]
    elif isinstance(first, Sequence) and not isinstance(first, str) and len(first) == 2:
        names, rows = ["x", "y"], items
    else:
        parts = f" of {len(first)} parts" if isinstance(first, tuple | list) else ""
        raise UsageError(
            f"an item of the {type(data).__name__} is {with_article(type(first).__name__)}{parts}; expected (x, y), or "
            "a dict of values by name"
        )
    return table_of_columns({name: [row[place] for row in rows] for place, name in enumerate(names)})


def _column(values: Any, name: str) -> pa.ChunkedArray | pa.Array:
    """Values of one row each as a column."""
    import pyarrow as pa

    if _of(values, "pandas", "Series"):
        return _frame(values.to_frame(name)).column(0)
    if _is_array(values):
        array = _numpy(values)
        if not array.ndim:
            raise UsageError(f"the column {name!r} is a single number; expected one entry a row")
        if array.dtype != object:
            if array.dtype.kind not in "biufUSM":
                raise UsageError(
                    f"the column {name!r} is of {array.dtype}; expected numbers, truth values or strings: convert it"
                )
            array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
            return table_of_arrays({name: array}).column(0)
        values = array.tolist()
    if all(isinstance(one, SINGLE) for one in values):
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            told = " ".join(str(error).split())[:200].rstrip(".")
            raise UsageError(f"the column {name!r} has values of no common type ({told}); convert them") from None
    rows = [_numpy(one) for one in values]
    shapes = {row.shape for row in rows}
    if len(shapes) > 1:
        raise UsageError(
            f"the column {name!r} has rows of {len(shapes)} shapes, such as {list(min(shapes))} and "
            f"{list(max(shapes))}; give all one shape: pad, cut or resize them"
        )
    if rows[0].dtype == object:
        raise UsageError(
            f"a row of the column {name!r} is {with_article(type(values[0]).__name__)}; expected a number, a string, "
            "an array or a picture"
        )
    return _column(np.stack(rows), name)


def _numpy(one: Any) -> np.ndarray:
    """An array, a tensor, a picture of Pillow or a list of numbers as an array."""
    if isinstance(one, torch.Tensor):
        one = one.detach().cpu()
        one = (one.float() if one.dtype == torch.bfloat16 else one).numpy()
    elif _of(one, "PIL", "Image"):
        one = one.convert("L" if one.mode in GREY else "RGB")
    return np.asarray(one)
