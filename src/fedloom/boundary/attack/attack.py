"""The malicious clients of a run, and how well they are found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedloom.boundary.attack.data import Backdoor
from fedloom.boundary.attack.numbers import Updates
from fedloom.boundary.attack.part import Inner, Part, Training
from fedloom.boundary.stage import Stage
from fedloom.calls import Fields
from fedloom.errors import Refused
from fedloom.random import numpy_stream

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.calls import Call
    from fedloom.node import Client, Server
    from fedloom.site import Site
    from fedloom.task import Task
    from fedloom.vector import Vector


@dataclass(frozen=True)
class Attack(Stage):
    """The malicious clients of a run."""

    parts: tuple[Part, ...]
    population: int
    seed: int
    updates: Updates = Updates()

    setting = "attack"
    kinds = frozenset({"train", "finish"})

    @property
    def members(self) -> Mapping[int, int]:
        """Client -> the place of its part, for all that are malicious."""
        return _dealt(self.seed, self.population, tuple(part.count(self.population) for part in self.parts))

    @property
    def malicious(self) -> frozenset[int]:
        """All malicious clients."""
        return frozenset(self.members)

    @property
    def sends_nan(self) -> bool:
        """Whether some send what is no number."""
        return any(part.sends_nan for part in self.parts)

    def part_of(self, client: int, round: int | None = None) -> Part | None:
        """What a client does in a round, or in some round; None: it is honest."""
        place = self.members.get(client)
        part = None if place is None else self.parts[place]
        return part if part is None or round is None or part.attacks_in(round) else None

    def check_network(self, site: Site) -> None:
        for part in self.parts:
            part.check_network(site)

    def around(self, client: Client, call: Call, message: Mapping[str, Any], inner: Callable[[], Fields]) -> Fields:
        part = self.part_of(client.id, call.round)
        if part is None:
            return inner()
        if part.trains:
            inner = training(part, client, inner)
        sent = self.updates.sent(message, client.state, client.initial, peer=call.verb == "exchange")
        return part.act(client, call, sent, inner)

    def on(self, task: Task) -> Attack | None:
        trained = [part for part in self.parts if part.trains]
        if not trained:
            return None
        probe = Probe(float(task.population), stands_for=trained[0].name())
        return replace(self, parts=(probe,), population=task.population)

    def after_rehearsal(self, books: Books, whole: bool) -> Attack:
        if whole and not any(met for (_, what), met in books.site.changes.items() if what == TRAINING):
            raise Refused(unmet(next(part for part in self.parts if part.trains).name()))
        return self

    def is_honest(self, client: int) -> bool:
        return self.part_of(client) is None

    def attacks(self, client: int, round: int) -> bool:
        return self.part_of(client, round) is not None

    def measure(self, server: Server) -> dict[str, float | None]:
        """The attack success rate of the global model: of each backdoor, from the second on with its number."""
        doors = [part for part in self.parts if isinstance(part, Backdoor)]
        return {
            f"attack_success_rate{f'@{number}' if number > 1 else ''}": door.success(server, server.model)
            for number, door in enumerate(doors, start=1)
        }

    def round_row(self, books: Books, server: Server) -> dict[str, float | None]:
        """How well the round told those who attack in it from the others, among the clients whose replies came.

        Flagged is who was turned away at the door, who got weight zero from the rule, and whom the method lists in
        the server value `flagged`. None where there is nothing to divide by.
        """
        came = set(books.judged)
        guilty = {client for client in came if self.attacks(client, books.asked_in.get(client, books.round))}
        flagged = books.flagged(server.values.get("flagged", ()))
        right = len(flagged & guilty)
        return {
            "attack/malicious": len(guilty),
            "attack/flagged": len(flagged),
            "attack/precision": right / len(flagged) if flagged else None,
            "attack/recall": right / len(guilty) if guilty else None,
        }


@dataclass(frozen=True)
class Probe(Part):
    """Trains honestly in place of an attack that trains: to see whether a method asks for it."""

    stands_for: str = ""

    def train(self, client: Client, honest: Training, w: Vector, lr: float, **options: Any) -> tuple[Vector, int]:
        return honest(w, lr, **options)


TRAINING = "training"  # that attackers put their own in place of, in a site's notes


def training(part: Part, client: Client, inner: Inner) -> Inner:
    """A client function in which the attack's `train` is what the client's descents come to.

    Raises Refused where the function takes steps and asks for none.
    """
    honest, signature, met = client.descend, inspect.signature(client.descend), False

    def descend(*args: Any, **options: Any) -> tuple[Vector, int]:
        nonlocal met
        met, given = True, signature.bind(*args, **options).arguments
        if isinstance(given["w"], Mapping):
            raise Refused(
                f"attack={part.stands_for if isinstance(part, Probe) else part.name()} trains one network in place of "
                f"client.descend, and this method's clients descend with {len(given['w'])} at once; take another attack"
            )
        return part.train(client, honest, **given)

    def watched() -> Fields:
        steps = client.steps
        reply = inner()
        client.site.note_change(part, TRAINING, met)
        if client.steps > steps and not met:
            raise Refused(unmet(part.stands_for if isinstance(part, Probe) else part.name()))
        return reply

    client.descend = descend  # type: ignore[method-assign, assignment]
    return watched


def unmet(name: str) -> str:
    """Why an attack that trains is refused: nothing would come of its training."""
    return (
        f"attack={name} trains in place of client.descend, and the method takes its steps without it, in a loop of its "
        "own; take a method that trains by client.descend, or another attack, such as backdoor"
    )


@lru_cache(maxsize=8)
def _dealt(seed: int, population: int, counts: tuple[int, ...]) -> Mapping[int, int]:
    order = numpy_stream(seed, "world", "malicious").permutation(population)[: sum(counts)].tolist()
    places = [place for place, count in enumerate(counts) for _ in range(count)]
    return dict(zip(order, places, strict=True))
