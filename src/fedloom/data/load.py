"""What data there is and where it lies: embedded sets, files, folders and the hub."""

import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from fedloom.data import cells
from fedloom.data.arrow import table_of_arrays
from fedloom.data.columns import Read, from_arrow
from fedloom.data.given import Given, of_splits_by_name
from fedloom.data.objects import table_of
from fedloom.data.source import Source, Table, listed
from fedloom.data.targets import TARGETS
from fedloom.data.text import CHARACTERS, Encode, Reading, characters, words
from fedloom.errors import UsageError, unknown

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["EMBEDDED", "Source", "Table", "load"]

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# What numpy and zipfile raise for bytes that are no arrays, or claim more than there is room for
NOT_ARRAYS = (OSError, ValueError, TypeError, EOFError, BadZipFile, zlib.error, struct.error, RuntimeError, MemoryError,
              OverflowError, SyntaxError, KeyError)  # fmt: skip
_SPLIT = re.compile(r"(train|test|val|dev)(ing|id|idation)?(?![a-z])", re.IGNORECASE)


def load(
    data: str,
    label: str | None = None,
    seed: int = 0,
    test: float = 0.2,
    client: str | None = None,
    exclude: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
    missing: str = "refuse",
    encode: Encode = words,
    reading: Reading = CHARACTERS,
    metadata: tuple[str, ...] = (),
    target: str = "class",
) -> Source:
    """Reads a data set.

    `data` is what Python has (a `Given`); or `digits`, `breast_cancer` or `diabetes` (embedded); a .parquet, .csv, .npz
    or .txt file; a folder of such files, whose names (train-00000-of-00002.parquet) or folders (train/a.parquet) tell
    the split; a folder of images, a sub-folder a class, with train/ and test/ above them or not; or `hf:NAME`,
    `hf:NAME:CONFIG` or `hf:FOLDER`, by the `datasets` library. Plain text is read for next-character prediction. Where
    a folder has a training split, only it and the test split are read: validation rows are a share of each client's
    training rows.

    `label` names the label column (default: the first of label, labels, target, targets, y, class, intent, income) and
    `client` the one that names the clients. `exclude` names columns that are ignored; `keep` some that are taken as
    they stand, whatever they look like. `missing` says what becomes of gaps: refuse, drop (the rows), mean or
    most_frequent (of training rows; such gaps are NaN in x still). `test` is the share of each class that is held out,
    with `seed`, where there is no test split. `metadata` names columns that go with the rows beside x and y, and
    `target` says what the label is: a class, or an amount. `encode` makes tokens of texts, and `reading` rows of plain
    text. Raises UsageError for what cannot be read or used, and for columns that cannot be told apart.
    """
    path = Path(data).expanduser()

    def made(read: Read) -> Source:
        wanted = (client, exclude, keep, missing, encode, metadata, TARGETS[target])
        return from_arrow(data, read, label, seed, test, *wanted)

    if isinstance(data, Given):
        return replace(made(data.read), told=data.told)
    if data in EMBEDDED:
        return made(Read(EMBEDDED[data]()))
    if data.startswith("hf:"):
        return made(_hub(data))
    if not path.exists():
        if os.sep in data or path.suffix:
            raise UsageError(
                f"no file or folder {data!r} (looked in {Path.cwd()}); give one that exists, hf:NAME, "
                f"or one of {', '.join(EMBEDDED)}"
            )
        raise unknown("data set", data, EMBEDDED)
    splits, kind = _files(data, path)
    if kind == ".txt":
        if label is not None:
            raise UsageError(f"{data} is plain text, whose label is the next character; leave the label {label!r} out")
        if target != "class":
            raise UsageError(f"{data} is plain text, whose next character is a class; take problem=classification")
        train, held = _texts(splits["train"]), _texts(splits["test"]) if "test" in splits else None
        source = characters(data, train, held, test, reading)
        named = {"exclude": exclude, "keep": keep, "metadata": metadata}
        for name, value in (*((name, ",".join(columns)) for name, columns in named.items()), ("missing", missing)):
            if value not in ("", "refuse"):
                raise UsageError(f"{data} is plain text and has no columns; leave {name}={value} out")
        return source
    separator = ""
    if kind == "image":
        tables = {split: image_table(files) for split, files in splits.items()}
    elif kind == ".npz":
        tables = _npz(data, splits)
    else:
        found = {split: _table(files, kind) for split, files in splits.items()}
        tables = {split: table for split, (table, _) in found.items()}
        separator = max(mark for _, mark in found.values())
    return made(Read(tables["train"], tables.get("test"), separator))


def _digits() -> "pa.Table":
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return table_of_arrays({"image": (bunch.images / 16).astype(np.float32), "label": bunch.target})


def _breast_cancer() -> "pa.Table":
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    columns = {name.replace(" ", "_"): column for name, column in zip(bunch.feature_names, bunch.data.T, strict=True)}
    return table_of_arrays({**columns, "label": bunch.target_names[bunch.target].astype(str)})


def _diabetes() -> "pa.Table":
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    columns = dict(zip(bunch.feature_names, bunch.data.T, strict=True))
    return table_of_arrays({**columns, "target": bunch.target})


EMBEDDED: "dict[str, Callable[[], pa.Table]]" = {
    "digits": _digits,
    "breast_cancer": _breast_cancer,
    "diabetes": _diabetes,
}


def _files(data: str, path: Path) -> tuple[dict[str, list[Path]], str]:
    """The files of each split, "train" and perhaps "test", and what they are: a suffix or "image"."""
    if path.is_file():
        if path.suffix.lower() not in (".parquet", ".csv", ".npz", ".txt"):
            raise UsageError(f"{data}: unknown kind of file {path.suffix!r}; expected .parquet, .csv, .npz or .txt")
        return {"train": [path]}, path.suffix.lower()
    below = sorted(p for p in path.rglob("*") if p.is_file() and "/." not in f"/{p.relative_to(path).as_posix()}")
    for kind in (".parquet", ".csv", ".npz", "image", ".txt"):
        files = [p for p in below if p.suffix.lower() == kind or (kind == "image" and p.suffix.lower() in IMAGES)]
        if files:
            break
    else:
        raise UsageError(f"the folder {data} has no .parquet, .csv, .npz, .txt or image files; give one that has")
    parts = [p.relative_to(path).parts for p in files]
    if kind == "image":
        named = all(_SPLIT.fullmatch(part[0]) for part in parts)  # else a class may be called "train", as in CIFAR-100
        names = [_split_name(part[:1]) if named else None for part in parts]
        if min(map(len, parts)) < (3 if named else 2):
            raise UsageError(
                f"the folder {data} has images outside a class's folder; expected CLASS/image.png or "
                "train/CLASS/image.png"
            )
    else:
        names = [_split_name(part) for part in parts]
    if not any(names):
        return {"train": files}, kind
    splits: dict[str, list[Path]] = {}
    for name, file in zip(names, files, strict=True):
        splits.setdefault(name or "", []).append(file)
    if "train" not in splits:
        raise UsageError(
            f"the folder {data} has no training split, only {listed(filter(None, splits))}; name one train"
        )
    return {name: splits[name] for name in ("train", "test") if name in splits}, kind


def _split_name(parts: tuple[str, ...]) -> str | None:
    return next((found[1].lower() for part in parts if (found := _SPLIT.match(part))), None)


def read_tables(path: Path) -> "tuple[pa.Table, str]":
    """The table of one file, and what separates its cells if they are text still (.csv)."""
    splits, kind = _files(str(path), path)
    if kind == ".txt":
        raise UsageError(f"{path} is plain text, and no table; give a .csv, .parquet or .npz file")
    return (_npz(str(path), splits)["train"], "") if kind == ".npz" else _table(splits["train"], kind)


def _table(files: list[Path], kind: str) -> "tuple[pa.Table, str]":
    """The shards of one split, one below the other, and what separates the cells of a .csv file."""
    import pyarrow as pa
    import pyarrow.parquet

    tables, separators = [], {""}
    for file in files:
        try:
            if kind == ".csv":
                table, separator = cells.read_csv(file)
                separators.add(separator)
            else:
                table = pyarrow.parquet.read_table(file)
            if len(set(table.column_names)) < table.num_columns:
                raise UsageError(
                    f"{file} has two columns of one name among {', '.join(table.column_names)}; rename one"
                )
            tables.append(table)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _unreadable(file, error) from None
    try:
        return pa.concat_tables(tables, promote_options="default"), max(separators)
    except pa.ArrowException as error:
        raise UsageError(f"{files[0]} and the files beside it have different columns: {_first_line(error)}") from None


def _npz(data: str, splits: dict[str, list[Path]]) -> "dict[str, pa.Table]":
    """Arrays of equal length are columns; names that end in _train and _test make one file both splits."""
    tables: dict[str, Any] = {}
    for split, files in splits.items():
        if len(files) > 1:
            raise UsageError(f"{data} has {len(files)} .npz files for its {split} split; expected one")
        try:
            with np.load(files[0], allow_pickle=False) as archive:
                members = {name: archive[name] for name in archive.files}
                for name, member in members.items():
                    if not isinstance(member, np.ndarray):
                        raise ValueError(f"{name} in it is no array")
                arrays = {name: array for name, array in members.items() if array.ndim}
        except NOT_ARRAYS as error:
            raise _unreadable(files[0], error) from None
        for name, array in arrays.items():
            if array.dtype.kind not in "biufUSM":
                raise UsageError(
                    f"the array {name} of {files[0]} is of {array.dtype}; expected numbers, truth values or strings"
                )
        arrays = {name: a[:, 0] if a.ndim == 2 and a.shape[1] == 1 else a for name, a in arrays.items()}
        both = {end: _ending(arrays, f"_{end}") for end in ("train", "test")}
        for name, columns in (both if all(both.values()) else {split: arrays}).items():
            lengths = {array: len(values) for array, values in columns.items()}
            if len(set(lengths.values())) != 1:
                sizes = ", ".join(f"{array} {length}" for array, length in lengths.items()) or "none"
                raise UsageError(
                    f"the arrays of {files[0]} differ in length ({sizes}); expected one entry a row in each"
                )
            tables[name] = table_of_arrays(columns)
    return tables


def _ending(arrays: dict[str, np.ndarray], end: str) -> dict[str, np.ndarray]:
    return {name.removesuffix(end): array for name, array in arrays.items() if name.endswith(end)}


def image_table(files: list[Path], name: str = "image") -> "pa.Table":
    """A row an image: where it lies and the name of its folder, in the layout of a hub image column."""
    import pyarrow as pa

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": str(file)} for file in files], type=kind)
    return pa.table({name: images, "label": [file.parent.name for file in files]})


def _texts(files: list[Path]) -> list[tuple[str, str]]:
    try:
        return [(file.stem, file.read_text(encoding="utf-8")) for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read a text of {files[0].parent}: {_first_line(error)}; expected UTF-8") from None


def _hub(data: str) -> Read:
    """The training and test split of a data set of the hub, or of a local folder that `datasets` reads."""
    name, _, config = data.removeprefix("hf:").partition(":")
    # The library counts downloads and reports its users unless told not to before it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    try:
        import datasets
    except ImportError:
        raise UsageError(f'{data} needs the datasets library: pip install "fedloom[hub]"') from None
    folder = Path(name).expanduser()
    saved = any((folder / mark).exists() for mark in ("dataset_dict.json", "dataset_info.json"))
    try:
        found = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(name, config or None)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"the datasets library cannot load {name!r}: {_first_line(error)}") from None
    if isinstance(found, datasets.Dataset):
        return Read(table_of(found))
    return of_splits_by_name(data, found)


def _unreadable(file: Path, error: Exception) -> UsageError:
    return UsageError(f"cannot read {file}: {_first_line(error)}; give a whole {file.suffix} file")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
