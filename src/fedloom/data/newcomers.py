"""Clients that are held out of training altogether: who comes when it is over."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedloom.errors import UsageError, unknown
from fedloom.random import stream


def held_out(wanted: float | str | None, names: Sequence[str] | None, clients: int, seed: int) -> list[int]:
    """The newcomers among `clients` dealt, ascending: a share of them, so many, or those of these `names` (`a,b`).

    `names` are the values of the column that names the clients; None: there is none. Raises UsageError where nobody
    would be left.
    """
    if not wanted:
        return []
    if isinstance(wanted, str):
        late = [_place(name, names) for name in ([wanted] if wanted in (names or ()) else _parts(wanted))]
    else:
        count = max(1, round(wanted * clients)) if wanted < 1 else int(wanted)
        late = torch.randperm(clients, generator=stream(seed, "data", "newcomers"))[:count].tolist()
        if count >= clients:
            late = [*range(clients)]
    if len(set(late)) == clients:
        raise UsageError(f"newcomers={wanted} are all of the {clients} clients; leave at least one that trains")
    return sorted(set(late))


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _place(name: str, names: Sequence[str] | None) -> int:
    if names is None:
        raise UsageError(
            f"newcomers={name!r} names clients, which have names where a column does it: set partition=column:COLUMN, "
            "or give a share or a number"
        )
    if name not in names:
        raise unknown("client among newcomers", name, names)
    return list(names).index(name)
