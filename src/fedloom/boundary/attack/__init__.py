"""Who misbehaves, and how: `sign_flip:0.2`, or several kinds on disjoint shares, `label_flip:0.2+alie:0.1,z=1.5`.

An attack wraps the malicious clients in one of three places: on their data, inside their function, on their reply, in
rounds and in a method's `finish`; in `setup` and evaluation they are honest.
Methods know nothing of it. Who is malicious depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from fedloom.boundary.attack import collusion, data, inside, reply
from fedloom.boundary.attack.collusion import Colluding, Collusion, Nan, Poisoned
from fedloom.boundary.attack.data import Backdoor
from fedloom.boundary.attack.numbers import Updates
from fedloom.boundary.attack.part import Part
from fedloom.boundary.layer import Layer, Reply, Transit
from fedloom.errors import UsageError, unknown
from fedloom.parsing import Term, bound, chain
from fedloom.random import numpy_stream

if TYPE_CHECKING:
    from fedloom.boundary import Boundary
    from fedloom.engines import Call
    from fedloom.node import Client, Server
    from fedloom.task import Task


@cache
def catalogue() -> dict[str, type[Part]]:
    """Every kind of attacker, by name."""
    made = (data.LabelFlip, data.FeatureNoise, data.Backdoor, inside.ModelReplacement)
    sent = (reply.SignFlip, reply.Gaussian, reply.Zero, reply.FreeRider, collusion.Nan)
    agreed = (collusion.Alie, collusion.Ipm, collusion.Mimic, collusion.Dmpa)
    return {kind.name(): kind for kind in (*made, *sent, *agreed)}


@dataclass(frozen=True)
class Attack(Layer):
    """The malicious clients of a run."""

    parts: tuple[Part, ...]
    population: int
    seed: int
    updates: Updates = Updates()

    kinds = frozenset({"train", "finish"})

    @staticmethod
    def of(text: str, task: Task, seed: int, updates: Updates | None = None) -> Attack:
        """What a text asks for; raises UsageError with what is wrong in it, or with this task."""
        parts = tuple(part(term.text).fit(task) for term in chain(text))
        attack = Attack(parts, task.population, seed, updates or Updates())
        total = sum(part.count(task.population) for part in attack.parts)
        if total > task.population:
            raise UsageError(f"attack={text} needs {total} clients, and there are {task.population}")
        for one in attack.parts:
            if isinstance(one, Colluding) and one.reverses and attack.updates.kept:
                raise UsageError(
                    f"attack={text}: {one.name()} reverses updates, and those of {attack.updates.kept[0]!r} begin from "
                    "what lies in each client's state, where colluders do not see it; take sign_flip, or alie"
                )
        return attack

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
        return any(isinstance(part, Nan) for part in self.parts)

    def part_of(self, client: int) -> Part | None:
        """What a client does; None: it is honest."""
        place = self.members.get(client)
        return None if place is None else self.parts[place]

    def around(self, client: Client, call: Call, message: Mapping[str, Any], inner: Callable[[], Reply]) -> Reply:
        part = self.part_of(client.id)
        if part is None:
            return inner()
        return part.act(client, call, self.updates.sent(message, client.state, client.initial), inner)

    def transits(self) -> list[Transit]:
        """What happens on the way: attackers that need others' replies, or send what no client can."""
        found: list[Transit] = []
        for part in self.parts:
            if isinstance(part, Colluding):
                found.append(Collusion(self, part))
            elif isinstance(part, Nan):
                found.append(Poisoned(self, part))
        return found

    def measured(self, server: Server, model: Any) -> dict[str, float | None]:
        """The attack success rate of a model: of the first backdoor there is."""
        doors = [part for part in self.parts if isinstance(part, Backdoor)]
        return {"attack_success_rate": doors[0].success(server, model)} if doors else {}

    def detected(self, boundary: Boundary, server: Server) -> dict[str, float | None]:
        """How well the round told the malicious from the honest, among the clients whose replies came.

        Flagged is who was turned away at the door, who got weight zero from the rule, and whom the method lists in
        the server value `flagged`. None where there is nothing to divide by.
        """
        came = set(boundary.judged)
        guilty = came & self.malicious
        flagged = {client for client, weight in boundary.judged.items() if weight == 0}
        flagged |= came & set(server.values.get("flagged", ()))
        right = len(flagged & guilty)
        return {
            "attack/malicious": len(guilty),
            "attack/flagged": len(flagged),
            "attack/precision": right / len(flagged) if flagged else None,
            "attack/recall": right / len(guilty) if guilty else None,
        }


def part(text: str) -> Part:
    """One kind of attacker from its text."""
    term = Term(text)
    if term.name not in catalogue():
        raise unknown("attack", term.name, catalogue())
    kind = catalogue()[term.name]
    given = bound(term, kind, besides=kind.hidden)
    if "share" not in given:
        raise UsageError(f"{term.name} needs the share of the clients that are such: {term.name}:0.2")
    return kind(**given)


@lru_cache(maxsize=8)
def _dealt(seed: int, population: int, counts: tuple[int, ...]) -> Mapping[int, int]:
    order = numpy_stream(seed, "world", "malicious").permutation(population)[: sum(counts)].tolist()
    places = [place for place, count in enumerate(counts) for _ in range(count)]
    return dict(zip(order, places, strict=True))


__all__ = ["Attack", "Part", "catalogue", "part"]
