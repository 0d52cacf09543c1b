"""Raw rows, as they stand in a file or in Python, made into the inputs of a network that is trained already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedloom.data import cells, dates
from fedloom.data.anew import SHOWN, numbers, points, sequence
from fedloom.data.arrow import is_string
from fedloom.data.columns import stacked, unnested
from fedloom.data.images import images
from fedloom.data.load import IMAGES, image_files, image_table, read_tables
from fedloom.data.objects import SINGLE, is_table, table_of, table_of_columns
from fedloom.data.preprocessing import Feature, Preprocessing
from fedloom.data.source import listed
from fedloom.data.tabular import as_numbers, one_hot
from fedloom.data.text import having, tokens, words_of
from fedloom.data.windows import among_series, as_channels, from_channels, unfolded
from fedloom.encoders.features import AT_ONCE, Features
from fedloom.errors import UsageError
from fedloom.nets.pretrained import tokenised

if TYPE_CHECKING:
    import pyarrow as pa

GIVEN = "the table given"
CONTINUED = ("characters", "spelled")  # ways of reading a text that goes on


def inputs(rows: Any, how: Preprocessing) -> tuple[Tensor, list[str]]:
    """Inputs [N, ...] of raw rows, as the training rows were made into some, and what is to be told of them.

    Of rows of several series of windows, those that too few of their series precede have NaN alone.

    `rows` are a table (a DataFrame, columns by name, a list of dicts, an Arrow table, the path of a .csv, .parquet or
    .npz file); an array, as the inputs were before they were scaled, without a table's categories; images (an array,
    pictures, the path of one or of a folder); texts. Raises UsageError for what the network has not learned to read.
    """
    told: list[str] = []
    return inputs_of(*as_table(rows, how), how, told), told


def inputs_of(where: str, table: pa.Table, separator: str, how: Preprocessing, told: list[str]) -> Tensor:
    """The same of a table of Arrow, in errors called `where`; `separator` is that of cells which are text still."""
    read = dict.fromkeys(column.name for column in (*how.columns, *how.sequence))
    lacking = [name for name in read if name not in table.column_names]
    if lacking:
        there = ", ".join(table.column_names) or "none"
        raise UsageError(f"{where} lacks the column {listed(lacking)}, which the model reads; its columns are: {there}")
    if not table.num_rows:
        raise UsageError(f"{where} has no rows; give at least one")
    if how.kind == "image":
        x = _pictures(where, table.column(how.columns[0].name), how)
    elif how.kind == "text":
        return _spoken(where, _texts(where, table, how), how)
    else:
        x = _numbers(where, table, separator, how, told)
    if tuple(x.shape[1:]) != how.shape:
        raise UsageError(
            f"{where} has rows of shape {list(x.shape[1:])}, and the model reads {list(how.shape)}; give rows like "
            "those it was trained on"
        )
    x = _scaled(x, how)
    if how.files.ready:
        return from_channels(x)
    if how.sequence and how.files.windows:
        return among_series(x, how.files.windows, where, sequence(where, table, separator, how), told)
    return unfolded(x, how.files.windows, where) if how.files.windows else x


def _scaled(x: Tensor, how: Preprocessing) -> Tensor:
    """Inputs with what is done to all numbers: an encoder's features, or less the mean and over the deviation."""
    if how.encoder:
        encoder = Features.restored(dict(how.encoder))
        return torch.cat([encoder(part) for part in x.split(AT_ONCE)])
    if not how.mean:
        return x
    mean, deviation = (torch.tensor(each).view(-1, *[1] * (x.dim() - 2)) for each in (how.mean, how.deviation))
    return x.sub_(mean).div_(deviation)


def as_table(rows: Any, how: Preprocessing) -> tuple[str, pa.Table, str]:
    """What the rows are called, their columns, and what separates the cells that are text still."""
    if isinstance(rows, Path) or (isinstance(rows, str) and (how.kind != "text" or Path(rows).suffix == ".csv")):
        return _read(Path(rows).expanduser(), how)
    if isinstance(rows, str) or hasattr(rows, "convert"):  # one text, one picture
        rows = [rows]
    if is_table(rows) and not isinstance(rows, tuple):
        table = table_of(rows)
    elif isinstance(rows, Mapping):
        alone = all(isinstance(value, SINGLE) for value in rows.values())
        table = table_of_columns({str(name): [value] if alone else value for name, value in rows.items()})
    elif isinstance(rows, Sequence) and rows and all(isinstance(row, Mapping) for row in rows):
        names = dict.fromkeys(name for row in rows for name in row)
        table = table_of_columns({str(name): [_none(row.get(name)) for row in rows] for name in names})
    elif how.kind == "image" and _are_paths(rows):
        table = image_table([*map(Path, rows)], how.columns[0].name)
    else:
        table = table_of_columns(_unnamed(rows, how))
    return GIVEN, unnested(table), ""


def _none(value: Any) -> Any:
    """A value of a row; None for a NaN, which stands for nothing among words too."""
    return None if isinstance(value, float) and value != value else value


def _are_paths(rows: Any) -> bool:
    return isinstance(rows, Sequence) and len(rows) > 0 and all(isinstance(row, str | Path) for row in rows)


def _read(path: Path, how: Preprocessing) -> tuple[str, pa.Table, str]:
    """The rows of a file, or the images of a folder."""
    if not path.exists():
        raise UsageError(f"no file or folder {str(path)!r} (looked in {Path.cwd()}); give one that exists")
    if how.kind == "image" and (path.is_dir() or path.suffix.lower() in IMAGES):
        files = image_files(path)
        if not files:
            raise UsageError(f"the folder {path} has no images; give one that has")
        return str(path), image_table(files, how.columns[0].name), ""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; the model reads rows of a {how.kind} file: give a .csv or .parquet file")
    if how.kind == "text" and path.suffix == ".txt":
        text = path.read_text(encoding=how.files.encoding or "utf-8")
        return (
            str(path),
            _text_table([text] if how.tokens.partition(":")[0] in CONTINUED else text.splitlines(), how),
            "",
        )
    table, separator = read_tables(path, how.files)
    return str(path), unnested(table), separator


def _text_table(texts: Sequence[str], how: Preprocessing) -> pa.Table:
    import pyarrow as pa

    return pa.table({how.columns[0].name: list(texts)})


def _unnamed(rows: Any, how: Preprocessing) -> dict[str, Any]:
    """Columns of rows without names: an array [N, D], images, texts."""
    several = [column.name for column in how.columns]
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu().numpy()
    if how.kind == "text":
        if not isinstance(rows, Sequence | np.ndarray) or not all(isinstance(row, str) for row in rows):
            raise UsageError(f"the model reads texts; got {_called(rows)}: give a list of strings, or {_by_name(how)}")
        if len(several) > 1:
            raise UsageError(f"the model reads the texts of {len(several)} columns; give {_by_name(how)}")
        return {several[0]: list(rows)}
    if how.kind == "image":
        if isinstance(rows, Sequence):
            rows = [np.asarray(row) for row in rows]
            if len({row.shape for row in rows}) > 1:
                raise UsageError("the images given differ in size; resize all to one")
        array = np.asarray(rows)
        colours, *size = how.shape
        if how.files.ready:
            return {several[0]: array[None] if array.ndim == 2 else array}  # one window alone
        if array.shape in (how.shape, (*size, colours)) or (array.ndim == 2 and colours == 1):
            array = array[None]  # one image alone
        return {several[0]: array}
    array = _array(rows, how)
    widths = [column.width for column in how.columns]
    if strings := {column.role for column in how.columns} & {"category", "date", "text"}:
        read = " and ".join(sorted({"category": "categories"}.get(role, f"{role}s") for role in strings))
        raise UsageError(f"the model reads {read}, which an array has no place for; give {_by_name(how)}")
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != sum(widths):
        raise UsageError(
            f"the array has the shape {list(array.shape)}, and the model reads [N, {sum(widths)}]: give "
            f"{_by_name(how)}, or these numbers in this order"
        )
    parts = np.split(array, np.cumsum(widths)[:-1], axis=1)
    return {name: part[:, 0] if part.shape[1] == 1 else part for name, part in zip(several, parts, strict=True)}


def _array(rows: Any, how: Preprocessing) -> np.ndarray:
    try:
        array = np.asarray(rows)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "biuf":
        raise UsageError(f"the rows given are {_called(rows)}, and no numbers; give {_by_name(how)}")
    return array


def _by_name(how: Preprocessing) -> str:
    return f"columns by name ({listed(column.name for column in how.columns)})"


def _called(rows: Any) -> str:
    return f"of type {type(rows).__name__}"


def _numbers(where: str, table: pa.Table, separator: str, how: Preprocessing, told: list[str]) -> Tensor:
    """The features [N, D] of a table, its gaps filled in, before they are scaled."""
    blocks: list[np.ndarray] = []
    problems, gaps = [], {}
    for feature in how.columns:
        column = table.column(feature.name)
        block: np.ndarray
        if feature.role == "category":
            block = _categories(where, feature, column, told)
        elif feature.role == "text":
            block = having(_strings(where, feature, column).to_pylist(), feature.values)
        else:
            dated = feature.role == "date"
            parsed = points(feature, column) if dated else numbers(feature, column, separator, how.files.decimal)
            if isinstance(parsed, str):
                problems.append(parsed)
                continue
            block = dates.places(parsed, feature.width > dates.DAYS) if dated else as_numbers(parsed)
            if infinite := int(np.isinf(block).any(axis=1).sum()):
                problems.append(f"column {feature.name!r} has {infinite} rows with infinite values")
            if block.shape[1] != feature.width:
                problems.append(f"column {feature.name!r} has {block.shape[1]} numbers a row, not {feature.width}")
        empty: np.ndarray = np.isnan(block).any(axis=1)
        if empty.any():
            gaps[feature.name] = empty
            if feature.fill:
                block = np.where(empty[:, None], np.array(feature.fill, dtype=np.float32), block)
        blocks.append(block)
    if problems:
        raise UsageError(f"{where}: {'; '.join(problems)}; repair them")
    if lacking := {column.name: gaps[column.name] for column in how.columns if column.name in gaps and not column.fill}:
        parts = [f"{name!r} in row {listed(empty.nonzero()[0], SHOWN)}" for name, empty in lacking.items()]
        raise UsageError(
            f"{where} has gaps, of {', '.join(parts)} (rows count from 0), and the model was trained with "
            f"missing={how.missing}: it knows nothing to fill them in with; leave those rows out, or train with "
            "missing=mean"
        )
    return torch.from_numpy(np.concatenate(blocks, axis=1))


def _categories(where: str, feature: Feature, column: pa.ChunkedArray, told: list[str]) -> np.ndarray:
    """A column as `one_hot` gives it; of values that training did not see is told."""
    column = _strings(where, feature, column)
    strange = sorted(set(column.drop_null().unique().to_pylist()).difference(feature.values))
    if strange:
        told.append(
            f"{where}: column {feature.name!r} has the value {listed(strange)}, which no training row had; it counts "
            f"as none of {listed(feature.values)}"
        )
    return one_hot(column, feature.values)


def _strings(where: str, feature: Feature, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as strings, null where nothing stands."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        column = cells.trim(column)
    except pa.ArrowException:
        raise UsageError(
            f"{where}: column {feature.name!r} is {column.type}, and the model reads strings there, such as "
            f"{listed(feature.values, SHOWN)}"
        ) from None
    return column if feature.kept else cells.null_markers(column)[0]


def _texts(where: str, table: pa.Table, how: Preprocessing) -> list[str]:
    """The text of each row: its columns, joined by a blank."""
    columns = []
    for feature in how.columns:
        column = table.column(feature.name)
        if not is_string(column.type):
            raise UsageError(f"{where}: column {feature.name!r} is {column.type}, and the model reads texts there")
        if how.tokens.partition(":")[0] not in CONTINUED:
            column = cells.trim(column)
            column = column if feature.kept else cells.null_markers(column)[0]
        if column.null_count:
            empty = column.is_null().to_numpy().nonzero()[0]
            raise UsageError(
                f"{where} has no text in {feature.name!r} in row {listed(empty, SHOWN)} (rows count from 0); leave "
                "those rows out"
            )
        columns.append(column.to_pylist())
    return [" ".join(row) for row in zip(*columns, strict=True)]


def _spoken(where: str, texts: list[str], how: Preprocessing) -> Tensor:
    """Tokens [N, L] of texts, or an encoder's features."""
    length = how.shape[0]
    if how.encoder:
        encoder = Features.restored(dict(how.encoder))
        return torch.cat([encoder(texts[start : start + AT_ONCE]) for start in range(0, len(texts), AT_ONCE)])
    if how.tokens == "words":
        return tokens(words_of(texts), how.vocabulary, length)
    kind, _, model = how.tokens.partition(":")
    if kind == "characters":
        return tokens([_last(where, text, length) for text in texts], how.vocabulary, length)
    encode, padding, reading = tokenised(model, length)
    if kind == "spelled" and (spell := reading(length).spell):
        return torch.tensor([_last(where, spell(text), length) for text in texts])
    found = encode(texts, texts)[0]
    return torch.nn.functional.pad(found, (0, length - found.shape[1]), value=padding)


def _last(where: str, spelled: Sequence[Any], length: int) -> Sequence[Any]:
    """The characters or tokens before the one that is predicted."""
    if len(spelled) < length:
        raise UsageError(
            f"{where} has a text of {len(spelled)} characters or tokens; the model predicts what follows on {length}: "
            "give longer texts"
        )
    return spelled[-length:]


def _pictures(where: str, column: pa.ChunkedArray, how: Preprocessing) -> Tensor:
    """Images [N, C, H, W] with the pixels of those that were learned from."""
    import pyarrow as pa

    if is_string(column.type):
        column = pa.chunked_array([[{"bytes": None, "path": path} for path in column.to_pylist()]])
    if (arrays := stacked(column)) is not None:
        width, height = how.files.resize or (0, 0)
        arrays = arrays.reshape(-1, height, width) if arrays.ndim == 2 and arrays.shape[1] == width * height else arrays
        column = pa.chunked_array([pa.FixedShapeTensorArray.from_numpy_ndarray(arrays)])
    if isinstance(column.type, pa.FixedShapeTensorType):
        pixels = column.combine_chunks().to_numpy_ndarray()
        if how.eight_bit and pixels.dtype != np.uint8:
            whole = bool((pixels == np.round(pixels)).all()) and pixels.min() >= 0 and pixels.max() <= 255
            if pixels.max() > 1 and not whole:
                raise UsageError(
                    f"{where} has pixels from {pixels.min():g} to {pixels.max():g}; the model reads 8-bit ones, 0 to "
                    "255, or such divided by 255"
                )
            pixels = pixels.astype(np.uint8) if pixels.max() > 1 else pixels.astype(np.float32)
        elif not how.eight_bit and pixels.dtype == np.uint8:
            pixels = pixels.astype(np.float32)
        column = pa.chunked_array([pa.FixedShapeTensorArray.from_numpy_ndarray(np.array(pixels, order="C"))])
    elif not how.eight_bit:
        raise UsageError(
            f"{where} has image files, and the model was trained on arrays, whose pixels were taken as they were; give "
            "an array of such"
        )
    (x,) = images(where, how.columns[0].name, column, size=how.files.resize)
    if how.files.ready:
        return as_channels(where, x)
    if x.shape[1] == 1 and how.shape[0] == 3:
        x = x.expand(-1, 3, -1, -1).clone()
    return x
