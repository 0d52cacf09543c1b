"""Files of a record, read: what cannot be what was written raises an error that says so."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloom.errors import CodecError, RunError, UsageError


def lines_of(path: Path, having: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON objects, which have whole numbers under some names; none if it is not there."""
    if not path.exists():
        return
    with readable(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield object_of(path, line, f"line {number} ", having)


def object_of(path: Path, text: bytes, where: str = "", having: Iterable[str] = ()) -> dict[str, Any]:
    """The JSON object of a file or a line; whole numbers under the names it must have."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{where}is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise damaged(path, f"{where}is no JSON object")
    for name in having:
        if type(content.get(name)) is not int:
            raise damaged(path, f"{where}has no whole number {name!r}")
    return content


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around reading a file: where the system refuses it, UsageError is raised."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Around using what a record says: a value that cannot be used as what it stands for raises RunError."""
    try:
        yield
    except (UsageError, CodecError, OSError):
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        raise RunError(
            f"the record {path} is damaged, or another version wrote it ({textwrap.shorten(said, 200)}); "
            "run again with --debug for where"
        ) from error


def damaged(path: Path, why: object) -> RunError:
    """The error for a file of a record that cannot be what was written."""
    return RunError(f"{path} is damaged ({textwrap.shorten(str(why), 200)}); restore it from a copy, or run again")
