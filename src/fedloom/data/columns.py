"""From Arrow columns to tensors: the one path of every file, image folder, hub data set and embedded data set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedloom.data import cells
from fedloom.data.gaps import closed
from fedloom.data.images import images
from fedloom.data.roles import FEW, LABELS, MOST_CATEGORIES, Wanted, is_string, roles
from fedloom.data.source import FEATURES, Source, Table, listed, require_columns
from fedloom.data.text import Encode, words
from fedloom.errors import UsageError
from fedloom.random import numpy_stream

if TYPE_CHECKING:
    import pyarrow as pa

MOST_CODES = 100  # classes that whole numbers may be without counting from 0 or 1
REGRESSION = (
    "a number to be predicted is regression, for which there is no problem here: cut it into classes, or give a Task "
    "in Python with its own criterion"
)
FEW_ROWS = 10  # of a class, on average: fewer, and whole numbers are amounts


@dataclass(frozen=True)
class Read:
    """The tables of a data set's splits as they were read; `separator` is that of cells which are text still (CSV)."""

    train: pa.Table
    test: pa.Table | None = None
    separator: str = ""


def from_arrow(
    data: str,
    read: Read,
    label: str | None,
    seed: int,
    share: float,
    client: str | None = None,
    exclude: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
    missing: str = "refuse",
    encode: Encode = words,
) -> Source:
    """The Source of Arrow tables, with everything fitted (classes, categories, vocabulary) on the training rows.

    One image column makes it image data; else text columns alone make it text, several of them joined by a blank; else
    it is tabular: numbers as they are, strings one-hot over the training rows' categories (an unseen one is all
    zeros). What each column is comes from the whole training table, whatever the seed (`data.roles`). Without a test
    split, `share` of the rows of each class is held out, and no client's last row.
    """
    label = _label_column(data, read.train.column_names, label)
    wanted = _wanted(data, read.train.column_names, Wanted(label, client, exclude, keep))
    splits = {"train": _whole(data, read.train, label)}
    if read.test is not None:
        splits["test"] = _aligned(data, _whole(data, read.test, label), splits["train"])
    splits, marks = _valued(data, splits, wanted, read.separator)
    splits = {split: _labelled(data, table, wanted) for split, table in splits.items()}
    _no_amount(data, splits["train"], wanted)
    found = roles(data, splits["train"], wanted)
    splits, found = closed(data, splits, found, missing, marks)
    train = splits["train"]
    train, test = (train, splits["test"]) if "test" in splits else _hold_out(data, train, label, client, seed, share)
    classes, y_train, y_test = _labels(data, train, test, label)
    features = {column.name: column.role for column in found if column.role in FEATURES}
    kinds = set(features.values())
    vocabulary: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    if kinds == {"image"}:
        kind, used = "image", {label, *features}
        x_train, x_test = images(data, next(iter(features)), train, test)
    elif kinds == {"text"}:
        kind, used = "text", {label, *features}
        x_train, x_test, vocabulary = encode(_sentences(train, features), _sentences(test, features))
    else:
        kind, used = "tabular", set()
        x_train, x_test, widths, categories = _tabular(data, features, train, test)
        found = tuple(replace(column, values=categories.get(column.name, ())) for column in found)
    return Source(
        name=data,
        kind=kind,
        classes=classes,
        train=Table(x_train, y_train, _raw(train, used)),
        test=Table(x_test, y_test, _raw(test, used)),
        vocabulary=vocabulary,
        widths=widths,
        roles=found,
        fill=missing if missing in ("mean", "most_frequent") else "",
    )


def _label_column(data: str, names: list[str], label: str | None) -> str:
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


def _wanted(data: str, names: list[str], wanted: Wanted) -> Wanted:
    """The same, once its columns are known to be there and to be asked for one thing only."""
    require_columns(data, (*wanted.exclude, *wanted.keep), names)
    for name in wanted.exclude:
        use = "the label" if name == wanted.label else "kept" if name in wanted.keep else ""
        if use:
            raise UsageError(f"column {name!r} of {data} is {use} and excluded; leave one of the two out")
    return wanted


def _whole(data: str, table: pa.Table, label: str) -> pa.Table:
    """A split with rows, and columns of plain values: none dictionary-encoded, lists of equal length arrays."""
    import pyarrow as pa

    names = table.column_names
    require_columns(data, [label], names)
    if table.num_rows == 0:
        raise UsageError(f"{data} has a split without rows; give files that have some")
    for position, name in enumerate(names):
        kind = table.schema.field(name).type
        if pa.types.is_dictionary(kind):
            table = table.set_column(position, name, table.column(name).cast(kind.value_type))
        elif (array := _stacked(table.column(name))) is not None:
            table = table.set_column(position, name, pa.FixedShapeTensorArray.from_numpy_ndarray(array))
    return table


def _storage(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _stacked(column: pa.ChunkedArray) -> np.ndarray | None:
    """Lists of numbers of one length (lists of lists too) as an array `[N, ...]`, NaN for what is missing, or None."""
    import pyarrow as pa

    kind, shape = _storage(column.type), []
    if isinstance(column.type, pa.FixedShapeTensorType) or not _is_list(kind):
        return None
    while _is_list(kind):
        kind = kind.value_type
    if not _is_number(kind):
        return None
    rows = column.to_pylist()
    there = next((row for row in rows if row is not None), None)
    while isinstance(there, list):
        shape.append(len(there))
        there = there[0] if there else None
    empty = np.full(shape, np.nan, dtype=np.float32).tolist()
    try:
        return np.ascontiguousarray([empty if row is None else row for row in rows], dtype=np.float32)
    except (ValueError, TypeError):  # lengths differ
        return None


def _is_number(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _valued(
    data: str, splits: dict[str, pa.Table], wanted: Wanted, separator: str
) -> tuple[dict[str, pa.Table], dict[str, str]]:
    """The splits with strings as numbers where nothing else is in them, null for gaps; and what marked these, by name.

    Strings that only a file's layout made so (`separator`) are numbers wherever they can be; those of a typed file as
    features only. Raises UsageError, for all columns at once, where numbers and other things are mixed.
    """
    import pyarrow as pa

    marks: dict[str, str] = {}
    problems: list[str] = []
    dotted: dict[str, str] = {}
    commas = False
    made = {split: dict(zip(table.column_names, table.columns, strict=True)) for split, table in splits.items()}
    for name, first in made["train"].items():
        if not is_string(first.type):
            continue
        parts = [cells.trimmed(columns[name]) for columns in made.values()]
        column = pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())
        kept = name in wanted.keep
        feature = not wanted.settled(name)
        european = separator not in ("", ",")
        bare, marks[name] = (column, "") if kept else cells.without(column)
        found = cells.numbers(bare, european) if separator or feature else None
        if found is None and (separator or feature) and not kept:
            sure, marked = cells.without(column, (cells.PYTHONS,))
            if (found := cells.numbers(sure, european)) is not None:
                bare, marks[name] = sure, marked
        if found is not None:
            column = found
            if european:
                commas = commas or cells.any_matches(bare, ",")
                dotted |= cells.thousands(name, bare)
        elif feature and (found := cells.times(bare)) is not None:
            column = found
        else:
            if feature and not kept and (problem := _mixed(name, bare)):
                problems.append(problem)
            column = bare
        start = 0
        for split, table in splits.items():
            made[split][name] = column.slice(start, table.num_rows)
            start += table.num_rows
    problems += [*dotted.values()] if commas else []
    if problems:
        raise UsageError(f"{data}: {'; '.join(problems)}")
    return {split: pa.table(columns, metadata=splits[split].schema.metadata) for split, columns in made.items()}, marks


def _mixed(name: str, column: pa.ChunkedArray) -> str:
    """What is wrong with strings of which at least half are numbers, or are written as numbers sometimes are."""
    values = column.drop_null()
    choices = f"exclude={name} leaves the column out, keep={name} takes every value for a category"
    others = cells.strangers(values)
    if not len(others):  # numbers too long to be any: names
        return ""
    if len(others) <= len(values) / 2:
        several = "value that is no number" if len(others) == 1 else "values that are no numbers"
        some = listed(others.unique().to_pylist(), 3)
        return f"column {name!r} holds {len(others)} {several}, such as {some}: {choices}"
    written = cells.share(values, cells.GROUPED) > 0.5
    if written or (len(values.unique()) > FEW and cells.share(values, cells.WITH_UNIT) > 0.5):
        some = listed(values.unique().to_pylist(), 3)
        return f"column {name!r} holds numbers written as text, such as {some}; write them as 1234.5: {choices}"
    return ""


def _labelled(data: str, table: pa.Table, wanted: Wanted) -> pa.Table:
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
        lists = isinstance(kind, pa.FixedShapeTensorType) or _is_list(kind)
        several = "; several labels a row are no classes" if lists else ""
        raise UsageError(f"label column {label!r} of {data} is {kind}; expected whole numbers or strings{several}")
    return table.set_column(names.index(label), label, column)


def _no_amount(data: str, table: pa.Table, wanted: Wanted) -> None:
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


def _aligned(data: str, test: pa.Table, train: pa.Table) -> pa.Table:
    """The test split with the training split's columns, in their order and of their types."""
    import pyarrow as pa

    missing = [name for name in train.column_names if name not in test.column_names]
    if missing:
        raise UsageError(f"the test split of {data} lacks the column {listed(missing)}; give both the same columns")
    test = test.select(train.column_names)
    for position, name in enumerate(train.column_names):
        have, want = test.schema.field(name).type, train.schema.field(name).type
        if have != want and not pa.types.is_struct(want):
            try:
                test = test.set_column(position, name, test.column(name).cast(want))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise UsageError(
                    f"column {name!r} of {data} is {want} in the training split but {have} in the test "
                    "split; give both the same type"
                ) from None
    return test


def _hold_out(
    data: str, table: pa.Table, label: str, client: str | None, seed: int, share: float
) -> tuple[pa.Table, pa.Table]:
    """A seeded, stratified split: `share` of the rows of each class, at least one, is the test split.

    A client that would be left without training rows gets one back, and a row of the same class of a client with rows
    to spare is held out for it.
    """
    import pyarrow as pa

    if not 0 < share < 1:
        raise UsageError(f"got a test share of {share}; expected a number between 0 and 1, such as 0.2")
    values, codes = np.unique(_numpy(table.column(label)).astype(str), return_inverse=True)
    counts = np.bincount(codes, minlength=len(values))
    if (counts == 1).any():
        raise UsageError(
            f"class {listed(values[counts == 1])} of {data} has one row, which cannot be in both splits; "
            f"drop it, add rows, or check that {label!r} is the label"
        )
    shuffled = numpy_stream(seed, "data", "test").permutation(len(codes))
    grouped = shuffled[np.argsort(codes[shuffled], kind="stable")]
    rank = np.empty(len(codes), dtype=np.int64)
    rank[grouped] = np.arange(len(codes)) - np.repeat(counts.cumsum() - counts, counts)
    held = rank < np.maximum(1, np.round(share * counts))[codes]
    if client is not None:
        _spare(data, held, grouped, codes, np.unique(_numpy(table.column(client)), return_inverse=True)[1])
    return table.filter(pa.array(~held)), table.filter(pa.array(held))


def _spare(data: str, held: np.ndarray, grouped: np.ndarray, codes: np.ndarray, owner: np.ndarray) -> None:
    """Gives, in place, every client a training row; `grouped` are the rows in the order in which they are held out."""
    left = np.bincount(owner[~held], minlength=owner.max() + 1)
    for client in np.flatnonzero(left == 0):
        for row in sorted(np.flatnonzero(owner == client), key=lambda row: -int(np.sum(codes == codes[row]))):
            others = grouped[codes[grouped] == codes[row]]
            free = others[~held[others] & (left[owner[others]] > 1)]
            if len(free):
                held[row], held[free[0]] = False, True
                left[client] += 1
                left[owner[free[0]]] -= 1
                break
        else:
            held[row] = False  # of the last class tried, one test row less
            left[client] += 1
    empty = np.setdiff1d(codes, codes[held])
    if len(empty):
        raise UsageError(
            f"{data} has too few rows to hold a test split out and leave every client one to train on; give the test "
            "rows in a file of their own"
        )


def _labels(
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


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    """The raw values `[N]` of a column of numbers, booleans or strings (None where one is missing)."""
    values = column.to_numpy()
    return values.astype(str) if is_string(column.type) and not column.null_count else values


def _raw(table: pa.Table, without: set[str]) -> dict[str, np.ndarray]:
    """The columns that may name natural clients, as they stand in the file."""
    import pyarrow as pa

    return {
        name: _numpy(table.column(name))
        for name in table.column_names
        if name not in without and (pa.types.is_primitive(kind := table.schema.field(name).type) or is_string(kind))
    }


def _sentences(table: pa.Table, names: Mapping[str, str]) -> list[str]:
    return [" ".join(row) for row in zip(*(table.column(name).to_pylist() for name in names), strict=True)]


def _tabular(
    data: str, features: Mapping[str, str], train: pa.Table, test: pa.Table
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...], dict[str, tuple[str, ...]]]:
    """Both splits' features `[N, D]`, in the order of the columns, NaN for gaps; how many of D each column became; and
    the categories of those that have some."""
    blocks: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    categories: dict[str, tuple[str, ...]] = {}
    problems = []
    for name, role in features.items():
        if role == "category":
            categories[name] = _categories(data, name, train)
        for table, block in zip((train, test), blocks, strict=True):
            column = table.column(name)
            values = _one_hot(column, categories[name]) if role == "category" else _numbers(column)
            if infinite := int(np.isinf(values).any(axis=1).sum()):
                problems.append(f"column {name!r} has {infinite} rows with infinite values, or too large for float32")
            block.append(values)
        if len({block[-1].shape[1] for block in blocks}) > 1:
            problems.append(f"column {name!r} has rows of another length in the test split")
    if problems:
        raise UsageError(f"{data}: {'; '.join(problems)}; repair or exclude them")
    x_train, x_test = (torch.from_numpy(np.concatenate(block, axis=1)) for block in blocks)
    return x_train, x_test, tuple(values.shape[1] for values in blocks[0]), categories


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
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


def _one_hot(column: pa.ChunkedArray, categories: tuple[str, ...]) -> np.ndarray:
    """Strings as `[N, categories]`: zeros for one that is none of these, NaN for a missing one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    index = pc.index_in(column, value_set=pa.array(categories, type=column.type))
    rows = np.eye(len(categories) + 1, len(categories), dtype=np.float32)[index.fill_null(len(categories)).to_numpy()]
    rows[column.is_null().to_numpy()] = np.nan
    return rows
