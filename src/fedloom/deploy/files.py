"""Keys and certificates on the disk: read only where nobody else may, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedloom.errors import UsageError
from fedloom.runs.writing import sync_folder, write_aside

LARGEST = 1 << 16  # bytes of a key, a request or a bundle


def read(path: Path, what: str) -> bytes:
    """The bytes of a small file; raises UsageError if there is none such."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise UsageError(f"{path} is not there: no {what}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > LARGEST:
        raise UsageError(f"{path} has more than {LARGEST} bytes: it is no {what}")
    return content


def read_private(path: Path, what: str) -> bytes:
    """`read`, for a file that nobody but its owner may read, in a folder that nobody but its owner may change."""
    content = read(path, what)
    require_private(path)
    return content


def require_private(path: Path) -> None:
    """Raises UsageError if others than the owner may read a file, or may write to its folder."""
    if os.name != "posix":  # whose modes say nothing about who may read
        return
    mode, folder = path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777
    if mode & 0o077:
        raise UsageError(
            f"{path} may be read by others (mode {mode:04o}); close it: chmod 600 {path} - and if others have read it, "
            "make a new key"
        )
    if folder & 0o022:
        raise UsageError(
            f"others may write to {path.parent} (mode {folder:04o}), where a key lies; close it: "
            f"chmod 700 {path.parent}"
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writing: an error of the system becomes a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error


def write(path: Path, content: bytes, private: bool = False) -> None:
    """A file that is the old one or the new one, through a loss of power too."""
    with writing(path):
        write_aside(path, lambda file: file.write(content), durable=True, private=private)


def require_new(path: Path) -> None:
    """Raises UsageError if there is something at a path but an empty folder."""
    if path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UsageError(f"{path} is there already, and nothing is overwritten; move it away, or choose another place")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder of mode 0700 to be filled in the block, aside: it is at its place when the block ends, or not at all.

    Raises UsageError if there is something at the target but an empty folder.
    """
    with writing(target):
        require_new(target)
        place = target.resolve()
        if not place.parent.exists():
            place.parent.mkdir(parents=True, mode=0o700)
        aside = place.parent / f".{place.name}.partial"
        if aside.exists():  # what a kill left
            shutil.rmtree(aside)
        aside.mkdir(mode=0o700)
        try:
            yield aside
            if os.name != "posix" and place.exists():
                place.rmdir()  # which only POSIX replaces
            aside.rename(place)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        sync_folder(place.parent)
