"""What data there is and where it lies: embedded sets, files, folders and the hub."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedloom.data import cells
from fedloom.data.arrow import table_of_arrays
from fedloom.data.columns import Read, from_arrow
from fedloom.data.embedded import EMBEDDED
from fedloom.data.files import COLUMNS, PLAIN, Files
from fedloom.data.given import Given, of_splits_by_name
from fedloom.data.leaf import are_letters, leaf_table, letters
from fedloom.data.masks import IMAGES_IN, MASKS_IN, mask_folder
from fedloom.data.npz import NOT_ARRAYS, members
from fedloom.data.objects import table_of
from fedloom.data.owners import FILE, FOLDER, SPLIT, owners, with_owner
from fedloom.data.source import Source, Table, listed
from fedloom.data.targets import TARGETS
from fedloom.data.text import CHARACTERS, Encode, Reading, characters, words
from fedloom.errors import UsageError, unknown

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["EMBEDDED", "Source", "Table", "load"]

KINDS = (".parquet", ".csv", ".npz", ".json", ".txt")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def load(
    data: str,
    label: str | None = None,
    seed: int = 0,
    test: float | None = None,
    client: str | None = None,
    exclude: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
    missing: str = "refuse",
    encode: Encode = words,
    reading: Reading = CHARACTERS,
    metadata: tuple[str, ...] = (),
    target: str = "class",
    files: Files = PLAIN,
) -> Source:
    """Reads a data set.

    `data` is what Python has (a `Given`); or `digits`, `breast_cancer` or `diabetes` (embedded); a .parquet, .csv, .npz
    or .txt file; a folder of such files, whose names (train-00000-of-00002.parquet) or folders (train/a.parquet) tell
    the split; a folder of LEAF's .json files; a folder of images, a sub-folder a class, with train/ and test/ above
    them or not; where masks are the target, of `images/` and `masks/` with the same names; or `hf:NAME`,
    `hf:NAME:CONFIG` or `hf:FOLDER`, by the `datasets` library. `files` says how files are read; where `client` is
    `file` or `folder`, each file or folder is one. Plain text is read for next-character
    prediction. Where a folder has a training split, only it and the test split are read: validation rows are a share of
    each client's training rows.

    `label` names the label column (default: the first of label, labels, target, targets, y, class, intent, income) and
    `client` the one that names the clients. `exclude` names columns that are ignored; `keep` some that are taken as
    they stand, whatever they look like. `missing` says what becomes of gaps: refuse, drop (the rows), mean or
    most_frequent (of training rows; such gaps are NaN in x still). `test` is the share of each class that is held
    out (None: `HELD_OUT`), with `seed`, where there is no test split; where there is one it is refused. `metadata`
    names columns that go with the rows beside x and y, and `target` says what the label is: a class, or an amount.
    `encode` makes tokens of texts, and `reading` rows of plain text. Raises UsageError for what cannot be read or used,
    and for columns that cannot be told apart.
    """
    path = Path(data).expanduser()
    if data.endswith(COLUMNS):
        raise UsageError(
            f"{data} says what rows mean, and has none; it is for fedloom server, whose clients have some of their own"
        )
    if test is not None and not 0 < test < 1:
        raise UsageError(f"got a test share of {test}; expected a number between 0 and 1, such as 0.2")

    def made(read: Read) -> Source:
        wanted = (client, exclude, keep, missing, encode, metadata, TARGETS[target], files)
        return from_arrow(data, read, label, seed, test, *wanted)

    def refuse(what: str, unit: str) -> None:
        """Raises UsageError for settings of columns, which texts have not."""
        if label is not None:
            raise UsageError(f"{data} is {what}, whose label is the next {unit}; leave the label {label!r} out")
        if target != "class":
            raise UsageError(f"{data} is {what}, whose next {unit} is a class; take problem=classification")
        named = {"exclude": exclude, "keep": keep, "metadata": metadata}
        for name, value in (*((name, ",".join(columns)) for name, columns in named.items()), ("missing", missing)):
            if value not in ("", "refuse"):
                raise UsageError(f"{data} is {what} and has no columns; leave {name}={value} out")

    if isinstance(data, Given):
        return replace(made(data.read), told=data.told)
    if data in EMBEDDED:
        return replace(made(Read(EMBEDDED[data]())), decisions=None)
    if data.startswith("hf:"):
        return made(_hub(data))
    if not path.exists():
        if os.sep in data or path.suffix:
            raise UsageError(
                f"no file or folder {data!r} (looked in {Path.cwd()}); give one that exists, hf:NAME, "
                f"or one of {', '.join(EMBEDDED)}"
            )
        raise unknown("data set", data, EMBEDDED)
    if target == "mask" and (pairs := _masked(data, path, client)):
        return made(pairs)
    splits, kind = _files(data, path)
    if kind == ".txt":
        refuse("plain text", "character")
        files.refuse_unread(data, ("encoding",))
        train, held = (_texts(splits[one], files.encoding) if one in splits else None for one in ("train", "test"))
        source = characters(data, train or [], held, test, reading)
        return replace(source, preprocessing=source.preprocessing and replace(source.preprocessing, files=files))
    read = _tables(data, path, splits, kind, client, files)
    if kind == ".json" and are_letters(read.train):
        label = None if label == "y" else label
        refuse("text of one length a row", "letter")
        files.refuse_unread(data, ())
        if reading.spell:
            raise UsageError(
                f"{data} is cut into letters already, and the model reads tokens; give it plain text (.txt)"
            )
        return letters(data, read.train, read.test, test)
    return made(read)


def _masked(data: str, path: Path, client: str | None) -> Read | None:
    """Images and their masks; None where no folder has masks."""
    if not path.is_dir() or not (pairs := mask_folder(data, path, IMAGES, client)):
        return None
    return Read(pairs["train"], pairs.get("test"), decisions=("masks go with the images of their names",))


def read_splits(data: str, target: str, how: Files) -> Read | str:
    """The tables of a file's or a folder's splits as they stand there, before rows are made of them; or a plain text.

    Raises UsageError for what cannot be read.
    """
    path = Path(data)
    if target == "mask" and (pairs := _masked(data, path, None)):
        return pairs
    splits, kind = _files(data, path)
    if kind != ".txt":
        return _tables(data, path, splits, kind, None, how)
    if len(splits["train"]) > 1 or len(splits) > 1:
        raise UsageError(f"{data} has several texts; give one")
    return _texts(splits["train"], how.encoding)[0][1]


def _tables(data: str, path: Path, splits: dict[str, list[Path]], kind: str, client: str | None, how: Files) -> Read:
    """The tables of files, each split's one below the other.

    Where `client` asks for it, and there is no such column, one has the names of the files or of their folders.
    """
    tables: dict[str, list[pa.Table]] = {}
    sources: dict[str, list[Path]] = {}  # of each row
    separators, told = {""}, list[str]()
    for split, files in splits.items():
        pieces = [files] if kind == "image" else [[file] for file in files]
        for piece in pieces:
            for name, table in _read(data, piece, kind, split, how, separators, told).items():
                tables.setdefault(name, []).append(table)
                rows = piece if kind == "image" else piece * table.num_rows
                sources.setdefault(name, []).extend(rows)
    whole = {name: _below(parts, splits["train"][0]) for name, parts in tables.items()}
    several = len(splits["train"]) > 1 and kind in (".csv", ".npz")
    if client in (FILE, FOLDER) and client not in whole["train"].column_names:
        names = {split: owners(data, path, rows, client, kind == "image") for split, rows in sources.items()}
        numbered = all(name.isdecimal() for rows in names.values() for name in rows)
        whole = {split: with_owner(table, client, names[split], numbered) for split, table in whole.items()}
    elif several and client is None:
        told.append(
            f"the rows of {len(splits['train'])} files stand one below the other (partition=column:{FILE} makes a "
            "client of each)"
        )
    return Read(whole["train"], whole.get("test"), max(separators), tuple(dict.fromkeys(told)))


def _read(
    data: str, files: list[Path], kind: str, split: str, how: Files, separators: set[str], told: list[str]
) -> "dict[str, pa.Table]":
    """The table of a file, or of all images, by its split."""
    if kind == "image":
        return {split: image_table(files)}
    if kind == ".json":
        return {split: leaf_table(files)}
    return _npz(files[0], split) if kind == ".npz" else {split: _table(files[0], kind, how, separators, told)}


def _files(data: str, path: Path) -> tuple[dict[str, list[Path]], str]:
    """The files of each split, "train" and perhaps "test", and what they are: a suffix or "image"."""
    if path.is_file():
        if path.suffix.lower() not in KINDS:
            raise UsageError(
                f"{data}: unknown kind of file {path.suffix!r}; expected .parquet, .csv, .npz, .txt or LEAF's .json"
            )
        return {"train": [path]}, path.suffix.lower()
    below = sorted(p for p in path.rglob("*") if p.is_file() and "/." not in f"/{p.relative_to(path).as_posix()}")
    for kind in (*KINDS[:3], "image", *KINDS[3:]):
        files = [p for p in below if p.suffix.lower() == kind or (kind == "image" and p.suffix.lower() in IMAGES)]
        if files:
            break
    else:
        raise UsageError(
            f"the folder {data} has no .parquet, .csv, .npz, .txt or image files, and no .json of LEAF; "
            "give one that has"
        )
    parts = [p.relative_to(path).parts for p in files]
    if kind == "image":
        named = all(SPLIT.fullmatch(part[0]) for part in parts)  # else a class may be called "train", as in CIFAR-100
        within = not named and all(len(part) > 3 and SPLIT.fullmatch(part[1]) for part in parts)  # CLIENT/train/CLASS
        names = [_split_name(part[int(within) :][:1]) if named or within else None for part in parts]
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
    return next((found[1].lower() for part in parts if (found := SPLIT.match(part))), None)


def read_tables(path: Path, how: Files = PLAIN) -> "tuple[pa.Table, str]":
    """The table of one file, and what separates its cells if they are text still (.csv)."""
    _, kind = _files(str(path), path)
    if kind == ".txt":
        raise UsageError(f"{path} is plain text, and no table; give a .csv, .parquet or .npz file")
    separators = {""}
    return _read(str(path), [path], kind, "train", how, separators, [])["train"], max(separators)


def _table(file: Path, kind: str, how: Files, separators: set[str], told: list[str]) -> "pa.Table":
    """The table of a .csv or .parquet file; adds what separates the cells of the former, and what was found out."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        if kind == ".csv":
            table, separator, found = cells.read_csv(file, how)
            separators.add(separator)
            told.extend(found)
        else:
            table = pyarrow.parquet.read_table(file)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from None
    if len(set(table.column_names)) < table.num_columns:
        raise UsageError(f"{file} has two columns of one name among {', '.join(table.column_names)}; rename one")
    return table


def _below(tables: "list[pa.Table]", file: Path) -> "pa.Table":
    """Tables one below the other."""
    import pyarrow as pa

    try:
        return pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise UsageError(f"{file} and the files beside it have different columns: {_first_line(error)}") from None


def _npz(file: Path, split: str) -> "dict[str, pa.Table]":
    """Arrays of equal length are columns; names that end in _train and _test make one file both splits."""
    try:
        arrays = {name: array for name, array in members(file).items() if array.ndim}
    except NOT_ARRAYS as error:
        if isinstance(error, UsageError):
            raise
        raise _unreadable(file, error) from None
    for name, array in arrays.items():
        if array.dtype.kind not in "biufUSM":
            raise UsageError(
                f"the array {name} of {file} is of {array.dtype}; expected numbers, truth values or strings"
            )
    arrays = {name: a[:, 0] if a.ndim == 2 and a.shape[1] == 1 else a for name, a in arrays.items()}
    both = {end: _ending(arrays, f"_{end}") for end in ("train", "test")}
    tables = {}
    for name, columns in (both if all(both.values()) else {split: arrays}).items():
        lengths = {array: len(values) for array, values in columns.items()}
        if len(set(lengths.values())) != 1:
            sizes = ", ".join(f"{array} {length}" for array, length in lengths.items()) or "none"
            raise UsageError(f"the arrays of {file} differ in length ({sizes}); expected one entry a row in each")
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


def image_files(path: Path) -> list[Path]:
    """The images of a path, in the order of their rows; beside masks those alone that lie in `images`."""
    if path.is_file():
        return [path] if path.suffix.lower() in IMAGES else []
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES)
    within = {file: {part.lower() for part in file.relative_to(path).parts[:-1]} for file in files}
    masked = {IMAGES_IN, MASKS_IN} <= {part for parts in within.values() for part in parts}
    return [file for file in files if IMAGES_IN in within[file]] if masked else files


def _texts(files: list[Path], encoding: str) -> list[tuple[str, str]]:
    try:
        return [(file.stem, file.read_text(encoding=encoding or "utf-8")) for file in files]
    except (OSError, UnicodeError) as error:
        expected = f"expected {encoding or 'UTF-8'}; another is set by encoding=latin-1"
        raise UsageError(f"cannot read a text of {files[0].parent}: {_first_line(error)}; {expected}") from None


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
