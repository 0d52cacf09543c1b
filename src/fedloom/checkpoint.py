"""All that a run needs to go on: server values, clients' states, work under way. One file, nothing pickled.

It is MAGIC, frames (a length, then a message) and the digest of all before it, so that no altered byte is taken for a
number. It has what clients keep to themselves: nobody else on the machine may read it.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from fedloom import encoding, message
from fedloom.errors import CodecError, RunError, UsageError
from fedloom.record import Run
from fedloom.spec import Spec

if TYPE_CHECKING:
    from fedloom.boundary import Boundary
    from fedloom.node import Server
    from fedloom.states import States

FILE = "checkpoint/state.bin"
MAGIC = b"MHSTATE1"  # of an older file these bytes are a length
FRAME = struct.Struct("<Q")
DIGEST = 32  # bytes
PIECE = 1 << 20  # bytes that are read at a time for the digest


def save(run: Run, spec: Spec, round: int, server: Server, states: States, boundary: Boundary) -> None:
    """Writes the state after `round` aside and renames it; frame by frame, so that no second copy is in memory.

    The record up to this round reaches the disk first.
    """
    run.sync()
    clients = sorted(states)
    head: dict[str, Any] = {
        "round": round,
        "lines": run.sizes(),
        "spec": spec.text(""),
        "verbs": boundary.verbs,
        "memory": boundary.memory,
        "clients": clients,
        "now": boundary.clock.now,
        "version": boundary.version,
        "there": boundary.world.there.memory() if boundary.world.there else {},
        "tickets": boundary.flights.tickets,
        "flights": len(boundary.flights.waiting) + len(boundary.flights.queue),
    }

    def frames() -> Iterator[bytes]:
        yield encoding.encode(head)
        yield encoding.encode(server.values)
        yield from map(states.encoded, clients)
        yield from map(encoding.encode, boundary.flights.frames())

    def fill(file: Any) -> None:
        digest = hashlib.blake2b(MAGIC, digest_size=DIGEST)
        file.write(MAGIC)
        for frame in frames():
            for part in (FRAME.pack(len(frame)), frame):
                digest.update(part)
                file.write(part)
        file.write(digest.digest())

    run.write(FILE, fill, private=True)


def load(run: Run, spec: Spec, server: Server, states: States, boundary: Boundary) -> int:
    """Takes up the state of the last checkpoint and gives its round; 0 if there is none yet."""
    path = run.path / FILE
    if not path.exists():
        return 0
    try:
        with path.open("rb") as file:
            _whole(file)
            head: Any = _frame(file)
            there = Spec.parsed(head["spec"], f"the spec in {path}")
            differing = spec.differences(there)
            if differing:
                raise UsageError(f"{path} is a checkpoint of another spec ({'; '.join(differing)}); restore spec.yaml")
            for name, size in head["lines"].items():
                there_now = (run.path / name).stat().st_size if (run.path / name).exists() else 0
                if there_now < size:
                    raise RunError(
                        f"{run.path / name} has {there_now} bytes, but {size} when the checkpoint of round "
                        f"{head['round']} was made: rounds are missing; restore it, or delete {path} to start again"
                    )
            values = _frame(file)
            for client in head["clients"]:
                state: Any = _frame(file)["state"]
                states[client] = message.moved(state, server.site.device)
            boundary.flights.take_up((_frame(file) for _ in range(head["flights"])), server.site.device)
    except (CodecError, struct.error, KeyError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it to start the run again") from error
    server.values.clear()
    for name, value in values.items():
        server.values[name] = message.moved(value, server.site.device)
    boundary.verbs = head["verbs"]
    boundary.memory = {part: message.moved(kept, server.site.device) for part, kept in head["memory"].items()}
    boundary.flights.tickets = head["tickets"]
    boundary.clock.now = head["now"]
    boundary.version = head["version"]
    if boundary.world.there:
        boundary.world.there.remember(message.moved(head["there"], torch.device("cpu")))
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
