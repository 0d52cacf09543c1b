"""Who was heard in which call of a deployed run, line by line in its folder: what a restart, or a replay, goes by."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedloom.calls import Call, Outcome
from fedloom.engines.remote import Fates, turned_away
from fedloom.engines.serial import Serial
from fedloom.engines.wired import Key, key_of
from fedloom.errors import RunError
from fedloom.runs.reading import lines_of
from fedloom.runs.writing import disk, write_all

FILE = "fates.jsonl"
AGAIN = "start fedloom server as before"  # after a full disk


class Written(Fates):
    """Fates that were written down before, in the folder of a run: the next one is asked for, then noted."""

    def __init__(self, folder: Path, lines: Iterable[dict[str, Any]]) -> None:
        self.folder, self.path = folder, folder / FILE
        self.known = deque(lines)

    @property
    def settled(self) -> bool:  # type: ignore[override]
        return bool(self.known)

    def heard(self, key: Key) -> list[int] | None:
        if not self.known:
            return None
        line = self._next("heard", key)
        return list(line["heard"])

    def landed(self) -> tuple[Key, int, bool] | None:
        if not self.known:
            return None
        line = self._next("landed", None)
        kind, round, nth = line["at"]
        return (kind, round, nth), line["landed"], line["counts"]

    def note_heard(self, key: Key, clients: list[int]) -> None:
        self.take({"at": list(key), "heard": clients})

    def note_landed(self, key: Key, client: int, counts: bool) -> None:
        self.take({"at": list(key), "landed": client, "counts": counts})

    def take(self, line: dict[str, Any]) -> None:
        """A fate is settled: it is the next of those that are known."""
        self.known.popleft()

    def _next(self, what: str, key: Key | None) -> dict[str, Any]:
        line = self.known[0]
        if what not in line or (key is not None and tuple(line["at"]) != key):
            raise RunError(
                f"{self.path} has {line}, and the run asks for {what} of {key}: it is the journal of another run, or "
                "of another version of it"
            )
        return line


class Journal(Written):
    """The fates of a run, written down when they are known; those that a restart finds hold as they were written.

    `after` is the round of the checkpoint from which a run goes on: what is written behind it is carried out again.
    """

    def __init__(self, folder: Path, after: int = 0) -> None:
        _mend(folder / FILE)
        lines = read(folder)
        past = [line["lines"] for line in lines if line.get("saved") == after]
        if after and not past:
            raise RunError(f"{folder / FILE} has no line of the checkpoint of round {after}; restore it")
        self.lines = past[-1] if past else 0  # of fates that have been taken, or written
        super().__init__(folder, _fates(lines)[self.lines :])

    def note_saved(self, round: int) -> None:
        self._write({"saved": round, "lines": self.lines}, durable=True)

    def take(self, line: dict[str, Any]) -> None:
        self.lines += 1
        if self.known:
            super().take(line)
        else:
            self._write(line)

    def _write(self, line: dict[str, Any], durable: bool = False) -> None:
        with disk(self.folder, again=AGAIN):
            end = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                write_all(end, json.dumps(line).encode() + b"\n")
                if durable:
                    os.fsync(end)
            finally:
                os.close(end)


def _fates(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that are no mark of a checkpoint."""
    return [line for line in lines if "saved" not in line]


def read(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run's journal."""
    path = folder / FILE
    return [*lines_of(path, having=())] if path.exists() else []


def _mend(path: Path) -> None:
    """Cuts off a torn last line, as a kill leaves it: what it was of has not happened."""
    if path.exists():
        whole = path.read_bytes()
        torn = len(whole) - (whole.rfind(b"\n") + 1)
        if torn:
            os.truncate(path, len(whole) - torn)


class Replayed(Serial):
    """Carries out a deployed run on one machine: whoever was heard then is heard, and nobody else."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.fates = Written(folder, _fates(read(folder)))
        if not self.fates.settled:
            raise RunError(f"{folder} has no {FILE}: only runs of `fedloom server` can be replayed")

    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        key = key_of(call)
        heard = self.fates.heard(key)
        if heard is None:
            raise RunError(f"{self.fates.path} ends before call {key}: the run was stopped there")
        self.fates.note_heard(key, heard)
        yield from super().run(call, [client for client in clients if client in heard])

    def land(self, patience: float | None = None) -> tuple[Call, Outcome] | None:
        if not self.launched:
            return None
        found = self.fates.landed()
        if found is None:
            raise RunError(f"{self.fates.path} ends before all work has landed: the run was stopped there")
        key, client, counts = found
        self.fates.note_landed(*found)
        place = next(at for at, (call, who) in enumerate(self.launched) if (key_of(call), who) == (key, client))
        call, _ = self.launched[place]
        del self.launched[place]
        if not counts:
            return call, turned_away(client, "it did not count")
        return call, next(iter(super().run(call, [client])))
