"""Files written so that a kill at any moment leaves the old one or the new one, and the errors where they cannot be."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloom.errors import RunError, UsageError

NO_PLACE = (
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,  # a link where a file of the run belongs: it is not followed
)

NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # not on every system


def write_aside(target: Path, fill: Callable[[Any], object], durable: bool = False, private: bool = False) -> None:
    """A file written aside and renamed: it is the old one or the new one, never a half, and no link is followed.

    `durable` also waits for the disk, so that this holds through a loss of power; `private`: nobody else may read it.
    """
    aside = target.with_name(f".{target.name}.partial")
    flags, mode = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW, 0o600 if private else 0o666
    try:
        end = os.open(aside, flags, mode)
    except FileExistsError:  # what a kill left, or a link that was put there: the link goes, not what it names
        aside.unlink()
        end = os.open(aside, flags, mode)
    try:
        with os.fdopen(end, "wb") as file:
            fill(file)
            if durable:
                file.flush()
                os.fsync(end)
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(target.parent)


def write_all(end: int, data: bytes | memoryview) -> None:
    """Writes all of the bytes to an open file, of which the system may take fewer at a time."""
    left = memoryview(data)
    while left:
        left = left[os.write(end, left) :]


def sync_folder(path: Path) -> None:
    """Waits until what was made or renamed in a folder has reached the disk."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def hold(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Keeps other processes out of a folder inside the block; `patience`: seconds to wait for one that is leaving."""
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise UsageError(f"{path} is still running in another process; stop that one first") from None
                time.sleep(0.05)
        yield
    finally:
        os.close(folder)


@contextmanager
def disk(path: Path, command: str = "resume", again: str | None = None) -> Iterator[None]:
    """Around writing to a folder: a full disk raises RunError, a folder that may not be written UsageError.

    `command` is the one that goes on with what the folder is of; `again` says it where that takes more.
    """
    on = again or f"fedloom {command} {path}"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"the disk of {path} is full; free some space, then: {on}") from error
        if error.errno == errno.EFBIG:
            raise RunError(f"a file of {path} is larger than this system allows (ulimit -f); then: {on}") from error
        if error.errno == errno.ENOENT:
            raise RunError(f"the folder {path} was removed or moved meanwhile; run again") from error
        if error.errno in NO_PLACE:
            raise UsageError(f"cannot write to {path}: {error.strerror}; choose another --out") from error
        raise


def remove(folder: Path, owner: int) -> None:
    """Removes a temporary folder, in the process that made it."""
    if os.getpid() == owner:  # and not in a worker that was forked and holds a copy of the run
        shutil.rmtree(folder, ignore_errors=True)
