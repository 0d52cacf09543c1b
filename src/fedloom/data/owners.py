"""Whose rows are in which file: a client for each file, or for each folder, by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

FILE, FOLDER = "file", "folder"  # the columns that files get where a partition asks for them
SPLIT = re.compile(r"(train|test|val|dev)(ing|id|idation)?(?![a-z])", re.IGNORECASE)


def owners(data: str, path: Path, files: Sequence[Path], column: str, classes: bool) -> list[str]:
    """The client of each file: the file's name without its ending, or that of the upmost folder below `path`.

    Folders that name splits are none of a client, nor are the lowest ones where they are the `classes` of images.
    """
    if path.is_file():
        raise UsageError(f"{data} is one file, and partition=column:{column} makes a client of each of several")
    if column == FILE:
        if classes:
            raise UsageError(
                f"partition=column:{FILE} would make a client of each image of {data}; take column:{FOLDER}"
            )
        return [file.stem for file in files]
    names = []
    for file in files:
        above = file.relative_to(path).parts[:-1]
        above = tuple(part for part in (above[:-1] if classes else above) if not SPLIT.fullmatch(part))
        if not above:
            expected = "CLIENT/CLASS/image.png" if classes else "CLIENT/file.csv"
            raise UsageError(
                f"{file} lies in no client's folder, and partition=column:{FOLDER} goes by these; expected {expected}"
            )
        names.append(above[0])
    return names


def with_owner(table: pa.Table, column: str, names: Sequence[str], numbered: bool) -> pa.Table:
    """A table with a column of its rows' clients, numbers where all are."""
    import pyarrow as pa

    kind = pa.int64() if numbered else pa.string()
    return table.append_column(column, pa.array([int(name) if numbered else name for name in names], kind))
