"""All that a run needs to go on: server values, clients' states, work under way. One file, nothing pickled.

It is MAGIC, frames (a length, then a message) and the digest of all before it, so that no altered byte is taken for a
number. It has what clients keep to themselves: nobody else on the machine may read it.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from fedloom import encoding
from fedloom.errors import CodecError, RunError, UsageError
from fedloom.runs.record import Run
from fedloom.runs.spec import FREE, Spec

FILE = "checkpoint/state.bin"
MAGIC = b"MHSTATE1"  # of an older file these bytes are a length
FRAME = struct.Struct("<Q")
DIGEST = 32  # bytes
PIECE = 1 << 20  # bytes that are read at a time for the digest
SHARE = 0.05  # of the time, at most, goes into checkpoints


class Stateful(Protocol):
    """A part of a run that has a state: a message beside the others' in one head, and then a message for each frame."""

    def state(self) -> dict[str, Any]:
        """What of it stands in the head, under names that no other part has."""

    def frames(self) -> Iterator[bytes]:
        """Encoded messages, one after the other, so that no second copy of all is in memory."""

    def restore(self, state: Mapping[str, Any], frames: Iterator[dict[str, Any]]) -> None:
        """Takes up the head and, from the front, as many frames as it once gave."""


class Checkpoints:
    """Those of one run, made as often as time allows: one takes the place of that before."""

    def __init__(self, run: Run, spec: Spec, parts: Sequence[Stateful], free: frozenset[str] = FREE) -> None:
        self.run, self.spec, self.parts, self.free = run, spec, parts, free
        self.saved_at, self.cost = time.perf_counter(), 0.0

    def due(self, last: bool) -> bool:
        """Whether it is time for the next one: after the last round it always is."""
        return last or self.cost <= SHARE * (time.perf_counter() - self.saved_at)

    def save(self, round: int) -> None:
        """Writes the state after a round."""
        began = time.perf_counter()
        save(self.run, self.spec, round, self.parts)
        self.saved_at = time.perf_counter()
        self.cost = self.saved_at - began

    def load(self) -> int:
        """Takes up the last one's state and gives its round; 0 if there is none yet."""
        return load(self.run, self.spec, self.parts, self.free)


def save(run: Run, spec: Spec, round: int, parts: Sequence[Stateful]) -> None:
    """Writes the state after `round` aside and renames it; frame by frame, so that no second copy is in memory.

    The record up to this round reaches the disk first.
    """
    run.sync()
    head: dict[str, Any] = {"round": round, "lines": run.sizes(), "spec": spec.text("")}
    for part in parts:
        head |= part.state()

    def frames() -> Iterator[bytes]:
        yield encoding.encode(head)
        for part in parts:
            yield from part.frames()

    def fill(file: Any) -> None:
        digest = hashlib.blake2b(MAGIC, digest_size=DIGEST)
        file.write(MAGIC)
        for frame in frames():
            for part in (FRAME.pack(len(frame)), frame):
                digest.update(part)
                file.write(part)
        file.write(digest.digest())

    run.write(FILE, fill, private=True)


def load(run: Run, spec: Spec, parts: Sequence[Stateful], free: frozenset[str] = FREE) -> int:
    """Takes up the state of the last checkpoint and gives its round; 0 if there is none yet.

    Settings that are `free` may have changed since.
    """
    path = run.path / FILE
    if not path.exists():
        return 0
    try:
        with path.open("rb") as file:
            _whole(file)
            head: Any = _frame(file)
            before = Spec.parsed(head["spec"], f"the spec in {path}")
            if "rounds" not in free and spec.rounds != before.rounds:
                raise UsageError(
                    f"{spec.method['name']} or its schedule goes by the rounds the run was planned for, and these were "
                    f"rounds={before.rounds}; spec.yaml says rounds={spec.rounds} now: restore it, or begin another run"
                )
            if differing := spec.differences(before):
                raise UsageError(f"{path} is a checkpoint of another spec ({'; '.join(differing)}); restore spec.yaml")
            for name, size in head["lines"].items():
                found = (run.path / name).stat().st_size if (run.path / name).exists() else 0
                if found < size:
                    raise RunError(
                        f"{run.path / name} has {found} bytes, but {size} when the checkpoint of round "
                        f"{head['round']} was made: rounds are missing; restore it, or delete {path} to start again"
                    )
            frames = iter(partial(_frame, file), None)
            for part in parts:
                part.restore(head, frames)
    except (CodecError, struct.error, KeyError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it to start the run again") from error
    round: int = head["round"]
    return round


def _whole(file: Any) -> None:
    """Raises CodecError unless the file is what was written, and leaves it at the first frame."""
    if file.read(len(MAGIC)) != MAGIC:
        raise CodecError("it is not the checkpoint of this version of fedloom")
    left = os.fstat(file.fileno()).st_size - len(MAGIC) - DIGEST
    digest = hashlib.blake2b(MAGIC, digest_size=DIGEST)
    while left > 0:
        piece = file.read(min(left, PIECE))
        digest.update(piece)
        left -= len(piece)
    if file.read() != digest.digest():
        raise CodecError("its digest is of other bytes")
    file.seek(len(MAGIC))


def _frame(file: Any) -> dict[str, Any]:
    (length,) = FRAME.unpack(file.read(FRAME.size))
    left = os.fstat(file.fileno()).st_size - file.tell()
    if length > left:
        raise CodecError(f"a frame of {length} bytes is announced, {left} are left")
    return encoding.decode(file.read(length), limit=length, parts=length)
