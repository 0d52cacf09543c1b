"""All that a run needs to go on: server values, clients' states, work under way. One file, nothing pickled."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from manyhands import encoding, message
from manyhands.errors import CodecError, RunError, UsageError
from manyhands.record import Run
from manyhands.spec import Spec

if TYPE_CHECKING:
    from manyhands.boundary import Boundary
    from manyhands.node import Server
    from manyhands.states import States

FILE = "checkpoint/state.bin"
FRAME = struct.Struct("<Q")


def save(run: Run, spec: Spec, round: int, server: Server, states: States, boundary: Boundary) -> None:
    """Writes the state after `round` aside and renames it; frame by frame, so that no second copy is in memory."""
    clients = sorted(states)
    head: dict[str, Any] = {
        "round": round,
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
        for frame in frames():
            file.write(FRAME.pack(len(frame)))
            file.write(frame)

    run.write(FILE, fill)


def load(run: Run, spec: Spec, server: Server, states: States, boundary: Boundary) -> int:
    """Takes up the state of the last checkpoint and gives its round; 0 if there is none yet."""
    path = run.path / FILE
    if not path.exists():
        return 0
    try:
        with path.open("rb") as file:
            head: Any = _frame(file)
            there = Spec.parsed(head["spec"], f"the spec in {path}")
            differing = spec.differences(there)
            if differing:
                raise UsageError(f"{path} is a checkpoint of another spec ({'; '.join(differing)}); restore spec.yaml")
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


def _frame(file: Any) -> dict[str, Any]:
    (length,) = FRAME.unpack(file.read(FRAME.size))
    left = os.fstat(file.fileno()).st_size - file.tell()
    if length > left:
        raise CodecError(f"a frame of {length} bytes is announced, {left} are left")
    return encoding.decode(file.read(length), limit=length)
