"""The files of a run's folder: lines are added and files replaced so that a kill at any moment leaves them readable."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedloom.errors import UsageError
from fedloom.runs.reading import lines_of, object_of, readable
from fedloom.runs.writing import NOFOLLOW, disk, hold, sync_folder, write_all, write_aside


class Folder:
    """A folder whose files are replaced whole or grow by lines, one process at a time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.ends: dict[str, int] = {}  # open files, by name: opening one takes longer than adding a line
        self.loose: set[str] = set()  # files that may not have reached the disk yet
        weakref.finalize(self, _closed, self.ends)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from going on with this run; the system forgets it with the process."""
        with hold(self.path):
            yield

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The whole lines of a `.jsonl` file; the torn last line that a kill may leave is left out."""
        yield from lines_of(self.path / name, having=("round",))  # which keeps a temporary record as long as it is read

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object of a file; empty if it is not there."""
        path = self.path / name
        if not path.exists():
            return {}
        with readable(path):
            return object_of(path, path.read_bytes())

    def append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join([json.dumps(line) + "\n" for line in lines]).encode()
        with disk(self.path):
            end = self._end(self.path / name)
            write_all(end, text)
        self.loose.add(name)

    def write(self, name: str, fill: Callable[[Any], object], durable: bool = True, private: bool = False) -> None:
        """A file as `write_aside` writes it; `private`: its folder, too, is for this user only."""
        with disk(self.path):
            target = self.path / name
            if target.parent != self.path:
                target.parent.mkdir(exist_ok=True)
                if target.parent.is_symlink():
                    raise UsageError(f"{target.parent} is a link; a run writes into its own folder only")
                if private:
                    target.parent.chmod(0o700)
            write_aside(target, fill, durable, private)
            if name in self.ends:
                os.close(self.ends.pop(name))
        if not durable:
            self.loose.add(name)

    def link(self, name: str, to: str) -> None:
        """Another name for a file, at no bytes where the system can; else a copy."""
        with disk(self.path):
            aside = self.path / f".{name}.partial"
            aside.unlink(missing_ok=True)
            try:
                os.link(self.path / to, aside)
            except (OSError, NotImplementedError):
                shutil.copyfile(self.path / to, aside)
            aside.replace(self.path / name)
            aside.unlink(missing_ok=True)  # is left where both are one file already

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self.write(name, lambda file: file.write((json.dumps(content) + "\n").encode()), durable=False)

    def truncate_after(self, name: str, after: int) -> None:
        """Drops the lines of rounds later than `after`, which a resumed run writes again."""
        if (self.path / name).exists():
            self.write(name, lambda file: file.writelines(self._kept(name, after)))

    def _kept(self, name: str, after: int) -> Iterator[bytes]:
        for line in self.lines(name):
            if line["round"] <= after:
                yield (json.dumps(line) + "\n").encode()

    def sync(self) -> None:
        """Waits until all that was written has reached the disk: before a checkpoint that relies on it."""
        with disk(self.path):
            for name in sorted(self.loose):
                with suppress(FileNotFoundError):
                    file = os.open(self.path / name, os.O_RDONLY)
                    try:
                        os.fsync(file)
                    finally:
                        os.close(file)
            sync_folder(self.path)
        self.loose.clear()

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of lines."""
        return {file.name: file.stat().st_size for file in sorted(self.path.glob("*.jsonl"))}

    def _end(self, path: Path) -> int:
        """A file, open for adding to it: anew where it was moved or removed meanwhile."""
        end = self.ends.get(path.name)
        if end is not None:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(end), path.stat()):
                    return end
            os.close(self.ends.pop(path.name))
        self.ends[path.name] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NOFOLLOW, 0o666)
        return self.ends[path.name]

    def close(self) -> None:
        """Lets go of the files that lines were added to; the next line opens them again."""
        while self.ends:
            os.close(self.ends.popitem()[1])


def _closed(ends: dict[str, int]) -> None:
    for end in ends.values():
        os.close(end)
