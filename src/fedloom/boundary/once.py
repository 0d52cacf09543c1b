"""Values that a client is sent once: `Once`. Whoever holds one gets its name in its place.

A client keeps the last such value of each message field in its state, under `_once`, with its name: 16 bytes, BLAKE2b
of the encoded value. It holds it when its reply has counted, for only then is its state kept; who was silent, or whose
reply was lost, is sent the value in full again, and so is everybody once the field has another value. A resumed run has
the states, and so what clients hold. Where no reply tells the server that a value arrived (`tell`, `exchange`), and in
evaluation, names stand for what is held already, and nothing is kept.

The names travel in the message field `_once`, and are booked there; a value of at most 64 bytes is sent as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from fedloom.boundary.cache import weigh
from fedloom.calls import ONCE
from fedloom.cohort import Once

States = Mapping[int, Mapping[str, Any]]


def settle(
    shared: MutableMapping[str, Any], own: MutableMapping[int, dict[str, Any]], asked: Sequence[int], states: States
) -> None:
    """Puts the value, or its name, in the place of each `Once` in a message: what all get, and each its own."""
    names: dict[str, bytes] = {}
    for field in [field for field, value in shared.items() if isinstance(value, Once)]:
        value, name = _named(field, shared.pop(field))
        lacking = [client for client in asked if name is None or not _holds(states, client, field, name)]
        if name is not None:
            names[field] = name
        if len(lacking) == len(asked):
            shared[field] = value
        else:
            for client in lacking:
                own.setdefault(client, {})[field] = value
    apart: dict[int, dict[str, bytes]] = {}
    for client, fields in own.items():
        for field in [field for field, value in fields.items() if isinstance(value, Once)]:
            fields[field], name = _named(field, fields[field])
            if name is not None:
                apart.setdefault(client, {})[field] = name
                if _holds(states, client, field, name):
                    del fields[field]
    if apart:
        for client in asked:
            if its := names | apart.get(client, {}):
                own.setdefault(client, {})[ONCE] = its
    elif names:
        shared[ONCE] = names


def _named(field: str, once: Once) -> tuple[Any, bytes | None]:
    """The value, and its name unless it is small."""
    _, _, name = weigh(field, once.value)
    return once.value, name or None


def _holds(states: States, client: int, field: str, name: bytes) -> bool:
    """Whether a client keeps the value of that name for a field."""
    kept = states[client].get(ONCE, {}) if client in states else {}
    return field in kept and kept[field][0] == name
