"""A call as bytes, for one client that lives elsewhere; what it is known by; and what comes back.

    head    what is asked: function, kind, round, ..., small fields, the names of the others, the state to begin from
    id      BLAKE2b of the head: the same question has the same id for ever, and another question another one
    blobs   fields of a kilobyte and more, one message each, by BLAKE2b of its bytes: who holds one need not get it
    note    what is no part of the question: of which round the server has a checkpoint, and which states are in it
    answer  the reply, what was logged and counted, and the names by which the server speaks of the client's new state

A client's state has the id of the call that left it. The server keeps such a reference where an engine with clients of
its own keeps the state itself: so whatever is undone, held back or taken up again there is so at the client.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedloom import encoding
from fedloom.calls import ASKED, ONCE, Call, Outcome
from fedloom.encoding import Pieces, encode
from fedloom.message import Value

AT = "_at"  # in the server's reference: the id of the call that left the state
SMALL = 1024  # bytes of a field that travels in the head
ID = 32  # bytes of an id, and of a blob's name
LIMIT = 1 << 62  # bytes of a message: what a reply may have is looked at before it is read

Key = tuple[str, int, int]  # kind, round and number of a call
Reference = Mapping[str, Any]  # AT, and under ONCE and ASKED what the server must know of a state


def key_of(call: Call) -> Key:
    """Where a call stands among those of a run."""
    return call.kind, call.round, call.nth


def digest() -> hashlib.blake2b:
    """What gives the name of the bytes that it is fed."""
    return hashlib.blake2b(digest_size=ID)


def name_of(data: bytes | memoryview | Pieces) -> bytes:
    """What bytes are called."""
    found = digest()
    for piece in data if isinstance(data, Pieces) else (data,):
        found.update(piece)
    return found.digest()


def decode(data: bytes | memoryview) -> dict[str, Any]:
    """A message whose length was looked at before; raises CodecError."""
    return encoding.decode(data, limit=LIMIT, expanded=LIMIT, parts=max(1 << 20, len(data)))


@dataclass(frozen=True, eq=False)
class Request:
    """What one client is asked."""

    client: int
    id: bytes
    head: bytes
    note: Mapping[str, Value]
    blobs: Mapping[bytes, Pieces]  # by name
    key: Key
    verb: str
    function: str


@dataclass(eq=False)
class Packed:
    """What all clients of a call are sent, made once."""

    small: dict[str, Value] = field(default_factory=dict)
    named: dict[str, bytes] = field(default_factory=dict)  # field -> the blob that it is
    blobs: dict[bytes, Pieces] = field(default_factory=dict)

    @staticmethod
    def of(fields: Mapping[str, Value]) -> Packed:
        made = Packed()
        for name, value in fields.items():
            if sum(encoding.sizes({name: value}).values()) <= SMALL:
                made.small[name] = value
            else:
                data = Pieces({name: value})
                made.named[name] = blob = name_of(data)
                made.blobs[blob] = data
        return made


def requests(
    run: bytes, call: Call, clients: Iterable[int], states: Mapping[int, Reference], notes: Mapping[int, Any]
) -> dict[int, Request]:
    """What each client is asked by a call of a run."""
    shared, key = Packed.of(call.shared), key_of(call)
    made = {}
    for client in clients:
        own = Packed.of(call.own[client]) if client in call.own else Packed()
        state = states.get(client, {})
        head = encode(
            {
                "run": run,
                "client": client,
                "verb": call.verb,
                "function": call.function,
                "at": [*key],
                "pace": call.pace,
                "fields": [*call.message(client)],
                "small": shared.small | own.small,
                "blobs": {**_without(shared.named, own.small), **own.named},
                "state": state.get(AT),
                "labels": state.get(ASKED),
            }
        )
        blobs = shared.blobs | own.blobs
        made[client] = Request(client, name_of(head), head, notes.get(client, {}), blobs, key, call.verb, call.function)
    return made


def _without(named: Mapping[str, bytes], own: Mapping[str, Value]) -> dict[str, bytes]:
    return {name: blob for name, blob in named.items() if name not in own}


def asked(head: Mapping[str, Any], blob: Callable[[bytes], bytes | memoryview]) -> tuple[Call, dict[str, Value]]:
    """The call of a head as its client sees it, and its message; `blob` gives the bytes of a name."""
    fields: dict[str, Value] = dict(head["small"])
    for name, place in head["blobs"].items():
        fields[name] = decode(blob(place))[name]
    message = {name: fields[name] for name in head["fields"]}
    client = head["client"]
    kind, round, nth = head["at"]
    call = Call(head["verb"], head["function"], (client,), message, {}, kind, round, nth, pace=head["pace"])
    return call, message


def answered(outcome: Outcome) -> Pieces:
    """What a client sends of an outcome; its state stays."""
    state: dict[str, Any] = outcome.state or {}
    return Pieces(
        {
            "reply": outcome.reply,
            "logs": dict(outcome.logs),
            "steps": outcome.steps,
            "labels": outcome.labels,
            "changed": outcome.state is not None,
            "once": {name: kept[0] for name, kept in state.get(ONCE, {}).items()},
            "asked": ASKED in state,
            "fault": None,
        }
    )


def failed(fault: str) -> Pieces:
    """What a client sends whose function failed: why, in a word that tells nothing of its data."""
    return Pieces({"fault": fault})


def reference(id: bytes, told: Mapping[str, Any]) -> dict[str, Value] | None:
    """What the server keeps of the state that a call left; None if it left none."""
    if not told["changed"]:
        return None
    kept: dict[str, Value] = {AT: id}
    if told["once"]:
        kept[ONCE] = {name: [value, None] for name, value in told["once"].items()}
    if told["asked"]:
        kept[ASKED] = id
    return kept
