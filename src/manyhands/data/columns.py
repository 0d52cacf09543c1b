"""From Arrow columns to tensors: the one path of every file, image folder, hub data set and embedded data set."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from manyhands.data.images import images
from manyhands.data.source import Source, Table, listed, require_columns
from manyhands.data.text import Encode, words
from manyhands.errors import UsageError
from manyhands.random import numpy_stream

if TYPE_CHECKING:
    import pyarrow as pa

LABELS = ("label", "labels", "target", "targets", "y", "class", "intent", "income")
MOST_CATEGORIES = 1000


def from_arrow(
    data: str,
    train: "pa.Table",
    test: "pa.Table | None",
    label: str | None,
    exclude: tuple[str, ...],
    seed: int,
    share: float,
    encode: Encode = words,
) -> Source:
    """The Source of Arrow tables, with everything fitted (classes, categories, vocabulary) on the training rows.

    One image column makes it image data; else string columns of sentences (mostly distinct, three words or more on
    average) make it text, several of them joined by a blank; else it is tabular: numbers as they are, strings one-hot
    over the training rows' categories (an unseen one is all zeros). Without a test split, `share` of the rows of each
    class is held out.
    """
    label = _label_column(data, train.column_names, label)
    require_columns(data, exclude, train.column_names)
    train = _checked(data, train, label)
    if test is None:
        train, test = _hold_out(data, train, label, seed, share)
    else:
        test = _aligned(data, _checked(data, test, label), train)
    classes, y_train, y_test = _labels(data, train, test, label)
    features = [name for name in train.column_names if name != label and name not in exclude]
    kinds = {name: _kind(train.column(name)) for name in features}
    pictures = [name for name in features if kinds[name] == "image"]
    texts = [name for name in features if kinds[name] == "text"]
    vocabulary: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    if pictures:
        if len(pictures) > 1:
            raise UsageError(f"{data} has several image columns ({listed(pictures)}); exclude or drop all but one")
        kind, used = "image", {label, *pictures}
        x_train, x_test = images(data, pictures[0], train, test)
    elif texts:
        kind, used = "text", {label, *texts}
        x_train, x_test, vocabulary = encode(_sentences(data, train, texts), _sentences(data, test, texts))
    elif features:
        kind, used = "tabular", set()
        x_train, x_test, widths = _tabular(data, kinds, train, test)
    else:
        raise UsageError(f"{data} has no feature columns beside {listed([label, *exclude])}; give a file that has some")
    return Source(
        name=data,
        kind=kind,
        classes=classes,
        train=Table(x_train, y_train, _raw(train, used)),
        test=Table(x_test, y_test, _raw(test, used)),
        vocabulary=vocabulary,
        widths=widths,
    )


def _label_column(data: str, names: list[str], label: str | None) -> str:
    if label is not None:
        require_columns(data, [label], names)
        return label
    for name in LABELS:
        if name in names:
            return name
    raise UsageError(
        f"{data} has no column named {', '.join(LABELS[:-1])} or {LABELS[-1]}; say which one is the label "
        f"(label=NAME) among: {', '.join(names)}"
    )


def _checked(data: str, table: "pa.Table", label: str) -> "pa.Table":
    """A split with rows, columns of plain values (none dictionary-encoded), and a label that is a class."""
    import pyarrow as pa

    names = table.column_names
    require_columns(data, [label], names)
    if table.num_rows == 0:
        raise UsageError(f"{data} has a split without rows; give files that have some")
    if len(set(names)) < len(names):
        raise UsageError(f"{data} has two columns of one name among {', '.join(names)}; rename one")
    for position, name in enumerate(names):
        kind = table.schema.field(name).type
        if pa.types.is_dictionary(kind):
            table = table.set_column(position, name, table.column(name).cast(kind.value_type))
    labels = table.column(label)
    kind = labels.type
    if labels.null_count:
        raise UsageError(f"label column {label!r} of {data} has {labels.null_count} missing values; drop those rows")
    if pa.types.is_floating(kind):
        try:
            return table.set_column(names.index(label), label, labels.cast(pa.int64()))
        except pa.ArrowInvalid:
            raise UsageError(
                f"label column {label!r} of {data} holds fractions or NaN; expected whole numbers or strings"
            ) from None
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_string(kind)):
        raise UsageError(f"label column {label!r} of {data} is {kind}; expected whole numbers or strings")
    return table


def _aligned(data: str, test: "pa.Table", train: "pa.Table") -> "pa.Table":
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


def _hold_out(data: str, table: "pa.Table", label: str, seed: int, share: float) -> "tuple[pa.Table, pa.Table]":
    """A seeded, stratified split: `share` of the rows of each class, at least one, is the test split."""
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
    return table.filter(pa.array(~held)), table.filter(pa.array(held))


def _labels(
    data: str, train: "pa.Table", test: "pa.Table", label: str
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


def _class_names(table: "pa.Table", label: str) -> list[str]:
    """The names that a hub data set (or a Parquet file written from one) gives to integer labels, if any."""
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(label, {})
    return list(feature.get("names", ())) if isinstance(feature, dict) else []


def _kind(column: "pa.ChunkedArray") -> str:
    """What a feature column holds: "image", "number", "numbers", "category", "text", or its type if none of these."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if isinstance(kind, pa.FixedShapeTensorType):
        return "numbers" if len(kind.shape) == 1 else "image"
    if pa.types.is_struct(kind):
        return "image" if {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)} else str(kind)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "image"
    if _is_string(kind):
        many = len(pc.unique(column)) > len(column) / 2
        blanks = pc.mean(pc.count_substring(column, " ")).as_py() or 0
        return "text" if many and blanks >= 2 else "category"
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
    return "number" if any(is_number(kind) for is_number in numbers) else str(kind)


def _is_string(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _numpy(column: "pa.ChunkedArray") -> np.ndarray:
    """The raw values `[N]` of a column of numbers, booleans or strings (None where one is missing)."""
    values = column.to_numpy()
    return values.astype(str) if _is_string(column.type) and not column.null_count else values


def _raw(table: "pa.Table", without: set[str]) -> dict[str, np.ndarray]:
    """The columns that may name natural clients, as they stand in the file."""
    import pyarrow as pa

    return {
        name: _numpy(table.column(name))
        for name in table.column_names
        if name not in without and (pa.types.is_primitive(kind := table.schema.field(name).type) or _is_string(kind))
    }


def _sentences(data: str, table: "pa.Table", names: list[str]) -> list[str]:
    for name in names:
        if missing := table.column(name).null_count:
            raise UsageError(f"column {name!r} of {data} has {missing} missing texts; fill them in or drop those rows")
    return [" ".join(row) for row in zip(*(table.column(name).to_pylist() for name in names), strict=True)]


def _tabular(
    data: str, kinds: dict[str, str], train: "pa.Table", test: "pa.Table"
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Both splits' features `[N, D]`, in the order of the columns, and how many of D each column became."""
    blocks: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for name, kind in kinds.items():
        if kind not in ("number", "numbers", "category"):
            raise UsageError(
                f"column {name!r} of {data} is {kind}; expected numbers, strings or images: drop or convert it"
            )
        encode = _one_hot(data, name, train) if kind == "category" else _numbers
        for split, table, block in zip(("training", "test"), (train, test), blocks, strict=True):
            values = encode(table.column(name))
            bad = int((~np.isfinite(values)).any(axis=1).sum())
            if bad:
                raise UsageError(
                    f"column {name!r} of {data} has {bad} missing, NaN or infinite values in the {split} "
                    "split; fill them in or drop those rows"
                )
            block.append(values)
    x_train, x_test = (torch.from_numpy(np.concatenate(block, axis=1)) for block in blocks)
    return x_train, x_test, tuple(values.shape[1] for values in blocks[0])


def _numbers(column: "pa.ChunkedArray") -> np.ndarray:
    """A column of numbers as float32 `[N, 1]`, of rows of numbers as `[N, D]`; what is missing is NaN."""
    import pyarrow as pa

    if isinstance(column.type, pa.FixedShapeTensorType):
        values = column.combine_chunks().to_numpy_ndarray()
    else:
        values = column.cast(pa.float64(), safe=False).to_numpy()[:, None]
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _one_hot(data: str, name: str, train: "pa.Table") -> Callable[["pa.ChunkedArray"], np.ndarray]:
    """What encodes a string column over the categories of the training rows: `[N, categories]`, a missing value NaN."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = train.column(name)
    categories = sorted(pc.unique(column.drop_null()).to_pylist())
    if len(categories) > MOST_CATEGORIES:
        raise UsageError(
            f"column {name!r} of {data} has {len(categories)} distinct strings, over {MOST_CATEGORIES}; "
            "drop it or give it as numbers"
        )

    def encode(column: "pa.ChunkedArray") -> np.ndarray:
        index = pc.index_in(column, value_set=pa.array(categories, type=column.type))
        code = index.fill_null(len(categories)).to_numpy()
        rows = np.eye(len(categories) + 1, len(categories), dtype=np.float32)[code]
        rows[column.is_null().to_numpy()] = np.nan
        return rows

    return encode
