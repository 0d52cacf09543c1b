"""The steps of the server: setup, one round, finish."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np

from fedloom.cohort import Cohort
from fedloom.errors import NobodyReplied, UsageError
from fedloom.node import Server
from fedloom.ops.agreement import adjusted_rand
from fedloom.runs.act import acting
from fedloom.runs.evaluation import logged
from fedloom.runs.parts import Parts
from fedloom.runs.states import States


def once(parts: Parts, kind: str, round: int, act: Callable[[Server, Cohort], None]) -> None:
    """`setup` or `finish`, with everybody."""
    with acting(parts.boundary, parts.server, kind, round):
        act(parts.server, parts.everybody)


def train(parts: Parts, states: States, round: int) -> dict[str, Any]:
    """One round; gives its row of the record. If nobody replied, the server and the clients are as before it."""
    boundary, server, world, method = parts.boundary, parts.server, parts.world, parts.method_in(round)
    before, books = dict(server.values), boundary.books
    row: dict[str, Any] = {"cohort": 0}
    doubtful = world.has_failures or boundary.doubtful
    try:
        with states.undone_by(NobodyReplied) if doubtful else nullcontext(), acting(boundary, server, "train", round):
            cohort = _cohort(parts, round)
            if cohort is None:
                row["note"] = _wait_for_somebody(parts, round)
            else:
                row["cohort"] = len(cohort)
                method.round(server, cohort)
                if world.server_speed:
                    took = server.steps * world.step_seconds / world.server_speed
                    boundary.clock.reach(boundary.clock.now + took)
        row |= _logs(parts)
    except NobodyReplied as nobody:
        server.values.clear()
        server.values.update(before)
        row["note"] = f"{nobody}; the server kept its values"
    # Of a method with phases some may take no mean; that others do was read from its text.
    if not method.phases(server) and (unused := parts.pipeline.unused(books)):
        raise UsageError(
            f"{unused}={getattr(parts.spec, unused)} had nothing to do in round {round}: {method.name()} has "
            "taken no mean; leave it out, or take a method that does"
        )
    moved = server.values["model"] is not before["model"]
    books.version += moved or (not method.global_model and books.replies > 0)
    row |= _scored(parts)
    row |= {"replies": books.replies, "gradient_steps": books.steps + server.steps}
    parts.whose = _whose(parts, round)
    return row | parts.pipeline.collect("round_row", books, server) | books.notes


def _whose(parts: Parts, round: int) -> dict[str, Any]:
    """Whose replies came in a round, how stale they were, and whom the server turned away; nothing of no replies."""
    books, named = parts.boundary.books, parts.server.values.get("flagged")
    if not books.came and not books.judged:
        return {}
    came = sorted(books.came)
    line: dict[str, Any] = {"round": round, "replied": sorted({client for client, _ in came})}
    if books.submitted:  # then a client may have replied more than once
        line |= {"replied": [client for client, _ in came], "staleness": [staleness for _, staleness in came]}
    if books.judged or named is not None:
        line["judged"] = sorted(books.judged.keys() or set(line["replied"]))
        line["flagged"] = sorted(books.flagged(named or ()))
    if attacks := [*parts.pipeline.with_hook("attacks")]:
        asked_in = {client: books.asked_in.get(client, round) for client in line.get("judged", line["replied"])}
        line["attacking"] = [k for k, then in asked_in.items() if any(stage.attacks(k, then) for stage in attacks)]
    return line


def _scored(parts: Parts) -> dict[str, float]:
    """How well the clusters that a method lists in the server value `clusters` agree with the clients' known groups."""
    clusters = parts.server.values.get("clusters")
    if not isinstance(clusters, dict) or not clusters or "group" not in parts.boundary.info(next(iter(clusters))):
        return {}
    known = [parts.boundary.info(client)["group"] for client in clusters]
    return {"cluster_ari": adjusted_rand(list(clusters.values()), known)}


def _cohort(parts: Parts, round: int) -> Cohort | None:
    """Who is asked in a round; None if nobody can be."""
    world, books, present = parts.world, parts.boundary.books, parts.everybody
    now = parts.boundary.clock.now
    if world.reachable:
        present = Cohort(world.present(round, now), parts.boundary)
        if not present and not parts.boundary.busy:
            return None
    chosen = parts.method_in(round).select(parts.server, present)
    cohort = chosen
    if cohort is None:
        cohort = Cohort(world.choose(round, now, parts.knowledge), parts.boundary)
    if parts.sits_out:
        cohort = cohort.where(parts.server.task.present)
    if chosen is None:
        books.asked, books.drawn = len(cohort), cohort.clients
    return cohort


def _wait_for_somebody(parts: Parts, round: int) -> str:
    """Moves the clock on to when somebody can be reached again; returns the round's note."""
    clock, there = parts.boundary.clock, parts.world.reachable
    assert there is not None
    then = there.next(clock.now)
    if then is None:
        parts.deserted = f"availability={parts.world.availability}: after {clock.now:g} s nobody can ever be reached"
        return f"{parts.deserted}; the run ends"
    waited = f"; the server waited {then - clock.now:g} s" if then > clock.now else ""
    clock.reach(then)
    return f"nobody could be reached in round {round}{waited}"


def _logs(parts: Parts) -> dict[str, Any]:
    """What the clients, and the server, logged in the step under way."""
    books = sorted(parts.boundary.books.logs.items())
    logs = {
        name: float(np.mean([n for _, n in sorted(numbers)])) if len(numbers) > 1 else float(numbers[0][1])
        for name, numbers in books
    }
    row: dict[str, Any] = {"train_loss": logs.pop("loss")} if "loss" in logs else {}
    return row | {f"client/{name}": number for name, number in logs.items()} | logged(parts)
