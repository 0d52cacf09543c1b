"""What a method sends and keeps, measured: two rounds of it on the contract's small problem, read off the ledger."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from fedloom.errors import UsageError
from fedloom.method import Method
from fedloom.registry import Entry
from fedloom.testing import Lab

ROUNDS = 2
DIRECTIONS = {"down": "down", "up": "up", "peer": "to a peer"}
WHEN = {"setup": "once, before", "train": "in a round", "finish": "once, after"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """`rows`: (when, function, verb, direction, {field: bytes}, bytes of a message)."""

    numbers: int  # in the global model
    clients: int
    rows: list[tuple[str, str, str, str, dict[str, str], str]]
    rounds: dict[str, float]  # bytes of a client and a round, by direction
    kept: dict[str, tuple[str, ...]]  # values in the clients' state, and those of the server


def measured(entry: Entry) -> Traffic | str:
    """The traffic of a method with its defaults, or why it cannot be measured here (an extra that is not installed)."""
    try:
        lab = Lab(entry.load(Method))
        made = lab.experiment(rounds=ROUNDS, eval_every=ROUNDS)
    except UsageError as error:
        return str(error)
    lines = [line for line in made.record.ledger if line["kind"] != "evaluate"]
    population = made.task.population
    spent = dict.fromkeys(DIRECTIONS, 0)
    for line in lines:
        if line["kind"] == "train":
            spent[line["direction"]] += line["bytes"] * len(parties(line))
    rounds = max(1, len(made.record.metrics))
    return Traffic(
        numbers=made.server.model.flat.numel(),
        clients=population,
        rows=messages(lines),
        rounds={name: total / rounds / population for name, total in spent.items()},
        kept={
            "client": tuple(sorted({name for state in made.engine.states.values() for name in state})),
            "server": tuple(sorted(made.server.values)),
        },
    )


def parties(line: Mapping[str, Any]) -> list[Any]:
    """Whom a line of the ledger is about: clients, or edges between them."""
    return list(line.get("clients", line.get("edges", ())))


def messages(lines: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str, str, dict[str, str], str]]:
    """The kinds of messages among the lines of a ledger, in the order in which they first travel."""
    found: dict[tuple[str, ...], dict[str, list[int]]] = {}
    whole: dict[tuple[str, ...], dict[Any, int]] = {}
    for line in sorted(lines, key=lambda one: list(WHEN).index(one["kind"]) if one["kind"] in WHEN else 1):
        kind = (line["kind"], line["function"], line["verb"], line["direction"])
        found.setdefault(kind, {}).setdefault(line["field"], []).append(line["bytes"])
        for party in parties(line):
            message = (line["round"], str(party))
            sizes = whole.setdefault(kind, {})
            sizes[message] = sizes.get(message, 0) + line["bytes"]
    rows = []
    for kind, fields in found.items():
        shown = {name: span(sizes) for name, sizes in fields.items() if name != "envelope"}
        when, function, verb, direction = kind
        rows.append((WHEN.get(when, when), function, verb, DIRECTIONS[direction], shown, span(whole[kind].values())))
    return rows


def span(sizes: Iterable[int]) -> str:
    """The sizes in words: one, or from the least to the greatest."""
    low, high = min(sizes := list(sizes)), max(sizes)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
