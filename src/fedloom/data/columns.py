"""From Arrow columns to tensors: the one path of every file, image folder, hub data set and embedded data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedloom.data.arrow import is_list, is_number, is_string, raw_values
from fedloom.data.dates import is_date
from fedloom.data.files import PLAIN, Files
from fedloom.data.gaps import resolve_gaps
from fedloom.data.holdout import HELD_OUT, hold_out, percent, refuse_share
from fedloom.data.images import eight_bit, images, unrolled
from fedloom.data.metadata import columns_beside
from fedloom.data.preprocessing import Feature, Preprocessing
from fedloom.data.roles import Wanted, roles
from fedloom.data.source import FEATURES, Column, Source, Table, listed, require_columns
from fedloom.data.tabular import tabular
from fedloom.data.targets import TARGETS, Target
from fedloom.data.text import Encode, words
from fedloom.data.values import parse_values
from fedloom.data.windows import as_channels, check_sequence, hold_last_out, in_order, told_of_time
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Read:
    """The tables of a data set's splits as they were read; `separator` is that of cells which are text still (CSV).

    `decisions` are sentences on what was found out as they were read.
    """

    train: pa.Table
    test: pa.Table | None = None
    separator: str = ""
    decisions: tuple[str, ...] = ()


def from_arrow(
    data: str,
    read: Read,
    label: str | None,
    seed: int,
    share: float | None,
    client: str | None = None,
    exclude: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
    missing: str = "refuse",
    encode: Encode = words,
    metadata: tuple[str, ...] = (),
    target: Target = TARGETS["class"],
    how: Files = PLAIN,
) -> Source:
    """The Source of Arrow tables, with everything fitted (classes, categories, vocabulary) on the training rows.

    One image column makes it image data; else text columns alone make it text, several of them joined by a blank; else
    it is tabular: numbers as they are, strings one-hot over the training rows' categories (an unseen one is all
    zeros), dates as their places in time (`dates.places`), texts by which frequent words they have. What each column is
    comes from the whole training table, whatever the seed (`data.roles`). Without a test split, `share` of the rows of
    each class (None: `HELD_OUT`) is held out, and no client's last row; with one, a share is refused. Columns named in
    `metadata` go with the rows beside x and y, and are features only if they are kept too.
    """
    read = replace(read, train=unnested(read.train), test=read.test and unnested(read.test))
    train, test = target.joined(data, read.train, label), read.test and target.joined(data, read.test, label)
    named = label
    read, label = replace(read, train=train, test=test), target.column(data, train.column_names, label)
    cut = how.windows
    sequence = (cut.series, cut.time) if cut else ()
    asked = Wanted(label, client, exclude, keep, metadata, target.kind, how.resize, *sequence)
    wanted = _wanted(data, read.train.column_names, asked)
    splits = {"train": _whole(data, read.train, label)}
    if read.test is not None:
        splits["test"] = _aligned(data, _whole(data, read.test, label), splits["train"])
    if how.resize:
        splits = {split: unrolled(table, how.resize) for split, table in splits.items()}
    splits, marks, notes, written = parse_values(data, splits, wanted, read.separator, how.decimal)
    if cut:
        check_sequence(data, splits["train"], cut)
    splits = {split: target.cast(data, table, wanted) for split, table in splits.items()}
    target.check(data, splits["train"], wanted)
    found = noted(roles(data, splits["train"], wanted), notes)
    splits, found = resolve_gaps(data, splits, found, missing, marks)
    if cut:
        splits = {split: in_order(data, table, client, cut) for split, table in splits.items()}
    train, decisions = splits["train"], [*read.decisions]
    if named is None:
        decisions.append(f"{label!r} is the label, for its name (label= names another)")
    if "test" in splits:
        test = splits["test"]
        refuse_share(data, share, test.num_rows)
        decisions += told_of_time(train, test, client, cut) if cut else []
    elif cut:
        train, test = hold_last_out(data, train, client, share or HELD_OUT, cut.series)
        whose = "series'" if cut.series else "client's"
        decisions.append(
            f"the last {percent(share or HELD_OUT)} of each {whose} rows are held out "
            f"as test rows, {test.num_rows} in all"
        )
    else:
        train, test = hold_out(data, train, label, client, seed, share or HELD_OUT, target.strata(train, label))
        decisions.append(
            f"{test.num_rows} of {train.num_rows + test.num_rows} rows, {percent(share or HELD_OUT)} of each "
            f"{'class' if target.kind == 'class' else 'stratum'}, are held out as test rows, drawn by the seed {seed}"
        )
    encoded = target.encode(data, train, test, label)
    decisions += encoded.told
    beside, levels = columns_beside(data, train, test, metadata)
    features = {column.name: column.role for column in found if column.role in FEATURES}
    kinds = set(features.values())
    vocabulary: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    if kinds == {"image"}:
        kind, used = "image", {label, *features}
        name = next(iter(features))
        x_train, x_test = images(data, name, train.column(name), test.column(name), size=how.resize)
        if how.series and not (how.ready or how.resize) and flat(train.column(name)):
            how = replace(how, ready=True)
            decisions.append(
                f"arrays [T, C] a row are windows of series, since {how.series} reads these (windows=given)"
            )
        if how.ready:
            kind, (x_train, x_test) = "windows", (as_channels(data, x) for x in (x_train, x_test))
        if how.resize:
            decisions.append("images are resized to {} x {} pixels".format(*how.resize))
    elif kinds == {"text"}:
        kind, used = "text", {label, *features}
        x_train, x_test, vocabulary = encode(_sentences(train, features), _sentences(test, features))
        decisions.append(f"texts are read word by word: {len(vocabulary):,} words of the training rows are known")
    else:
        kind, used = "tabular", set()
        x_train, x_test, widths, known = tabular(data, features, train, test)
        found = tuple(replace(one, written=written.get(one.name, "")) for one in found)
        found = tuple(with_values(one, known[one.name]) if one.name in known else one for one in found)
    how.refuse_unread(data, read_settings(kind, read))
    read_as = [
        Feature(one.name, one.role, values=one.values, kept=one.name in keep, written=one.written)
        for one in found
        if one.role in FEATURES
    ]
    if kind == "tabular":
        read_as = [replace(feature, width=width) for feature, width in zip(read_as, widths, strict=True)]
    preprocessing = Preprocessing(
        "image" if how.ready else kind,
        tuple(read_as),
        tuple(x_train.shape[1:]),
        missing=missing,
        eight_bit=kind in ("image", "windows") and eight_bit(train.column(read_as[0].name)),
        tokens="words" if kind == "text" else "",
        vocabulary=vocabulary,
        files=how,
        sequence=_sequence(train, wanted, written),
    )
    return Source(
        name=data,
        kind=kind,
        classes=encoded.classes,
        train=Table(x_train, encoded.train, _raw(train, used), beside[0], encoded.strata[0]),
        test=Table(x_test, encoded.test, _raw(test, used), beside[1], encoded.strata[1]),
        vocabulary=vocabulary,
        widths=widths,
        roles=found,
        fill=missing if missing in ("mean", "most_frequent") else "",
        levels=levels,
        labels=encoded.labels,
        preprocessing=preprocessing,
        decisions=tuple(decisions),
        test_share=share,
    )


def read_settings(kind: str, read: Read) -> tuple[str, ...]:
    """The settings of files that have an effect on what was read."""
    of_kind = {"image": ("resize",), "tabular": ("windows",), "windows": ("ready",)}
    return (("sep", "encoding", "decimal") if read.separator else ()) + of_kind.get(kind, ())


def with_values(column: Column, values: tuple[str, ...]) -> Column:
    """The column with the categories, or the words, that it is read by."""
    told = f"as which of {len(values)} frequent words a row has" if column.role == "text" else ""
    return replace(column, values=values, note=", ".join(filter(None, (told, column.note))))


def noted(found: tuple[Column, ...], notes: Mapping[str, str]) -> tuple[Column, ...]:
    """The columns with what else is to be told of some."""
    return tuple(
        replace(one, note=", ".join(filter(None, (one.note, notes[one.name])))) if one.name in notes else one
        for one in found
    )


def unnested(table: pa.Table) -> pa.Table:
    """The fields of a column of records as columns of their own, `record.field`; pictures stay what they are."""
    import pyarrow as pa

    columns: dict[str, pa.ChunkedArray] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        fields = [field.name for field in column.type] if pa.types.is_struct(column.type) else []
        if fields and not {"bytes", "path"} <= {*fields}:
            columns |= {f"{name}.{field}": part for field, part in zip(fields, column.flatten(), strict=True)}
        else:
            columns[name] = column
    return table if [*columns] == table.column_names else unnested(pa.table(columns, metadata=table.schema.metadata))


def _wanted(data: str, names: list[str], wanted: Wanted) -> Wanted:
    """The same, once its columns are known to be there and to be asked for one thing only."""
    require_columns(data, (*wanted.exclude, *wanted.keep, *wanted.metadata), names)
    for name in wanted.metadata:
        if name in (wanted.label, wanted.client):
            use = "is what is predicted, as batch.y" if name == wanted.label else "names the clients of the partition"
            raise UsageError(f"metadata={name}: that column of {data} {use}; leave it out of metadata")
        if name in wanted.exclude:
            raise UsageError(
                f"column {name!r} of {data} is metadata and excluded; metadata is no feature anyhow, so leave it out "
                "of exclude"
            )
        if wanted.metadata.count(name) > 1:
            raise UsageError(f"metadata names the column {name!r} twice; once is enough")
    for option, name in (("series", wanted.series), ("time", wanted.time)):
        if not name:
            continue
        require_columns(data, [name], names)
        taken: dict[str | None, str] = {
            **dict.fromkeys(wanted.exclude, "is excluded, and is no feature anyhow"),
            wanted.client: "names the clients, whose rows are series of their own anyhow",
            wanted.label: "is what is predicted",
        }
        if name in taken:
            told = f"that column of {data} {taken[name]}; name another, or leave it out"
            raise UsageError(f"windows: {option}={name}: {told}")
    for name in wanted.exclude:
        use = "the label" if name == wanted.label else "kept" if name in wanted.keep else ""
        if use:
            raise UsageError(f"column {name!r} of {data} is {use} and excluded; leave one of the two out")
    return wanted


def _sequence(table: pa.Table, wanted: Wanted, written: Mapping[str, str]) -> tuple[Feature, ...]:
    """The columns that say where in which series a row is, as those of new rows are to be read."""
    found = []
    if name := wanted.series:
        found.append(Feature(name, "series"))
    if name := wanted.time:
        role = "date" if is_date(table.column(name).type) else "number"
        found.append(Feature(name, role, written=written.get(name, "")))
    return tuple(found)


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
        elif (array := stacked(table.column(name))) is not None:
            table = table.set_column(position, name, pa.FixedShapeTensorArray.from_numpy_ndarray(array))
    return table


def flat(column: pa.ChunkedArray) -> bool:
    """Whether a column has an array of two dimensions in every row, and no picture."""
    import pyarrow as pa

    return isinstance(column.type, pa.FixedShapeTensorType) and len(column.type.shape) == 2


def _storage(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def stacked(column: pa.ChunkedArray) -> np.ndarray | None:
    """Lists of numbers of one length (lists of lists too) as an array `[N, ...]`, NaN for what is missing, or None."""
    import pyarrow as pa

    kind, shape = _storage(column.type), []
    if isinstance(column.type, pa.FixedShapeTensorType) or not is_list(kind):
        return None
    while is_list(kind):
        kind = kind.value_type
    if not is_number(kind):
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


def _raw(table: pa.Table, without: set[str]) -> dict[str, np.ndarray]:
    """The columns that may name natural clients, as they stand in the file."""
    import pyarrow as pa

    return {
        name: raw_values(table.column(name))
        for name in table.column_names
        if name not in without and (pa.types.is_primitive(kind := table.schema.field(name).type) or is_string(kind))
    }


def _sentences(table: pa.Table, names: Mapping[str, str]) -> list[str]:
    return [" ".join(row) for row in zip(*(table.column(name).to_pylist() for name in names), strict=True)]
