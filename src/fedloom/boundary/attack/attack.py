"""The malicious clients of a run, and how well they are found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedloom.boundary.attack.data import Backdoor
from fedloom.boundary.attack.numbers import Updates
from fedloom.boundary.attack.part import Part
from fedloom.boundary.stage import Stage
from fedloom.calls import Fields
from fedloom.random import numpy_stream

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.calls import Call
    from fedloom.node import Client, Server


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

    def part_of(self, client: int) -> Part | None:
        """What a client does; None: it is honest."""
        place = self.members.get(client)
        return None if place is None else self.parts[place]

    def around(self, client: Client, call: Call, message: Mapping[str, Any], inner: Callable[[], Fields]) -> Fields:
        part = self.part_of(client.id)
        if part is None:
            return inner()
        return part.act(client, call, self.updates.sent(message, client.state, client.initial), inner)

    def is_honest(self, client: int) -> bool:
        return self.part_of(client) is None

    def measure(self, server: Server) -> dict[str, float | None]:
        """The attack success rate of the global model: of the first backdoor there is."""
        doors = [part for part in self.parts if isinstance(part, Backdoor)]
        return {"attack_success_rate": doors[0].success(server, server.model)} if doors else {}

    def round_row(self, books: Books, server: Server) -> dict[str, float | None]:
        """How well the round told the malicious from the honest, among the clients whose replies came.

        Flagged is who was turned away at the door, who got weight zero from the rule, and whom the method lists in
        the server value `flagged`. None where there is nothing to divide by.
        """
        came = set(books.judged)
        guilty = came & self.malicious
        flagged = {client for client, weight in books.judged.items() if weight == 0}
        flagged |= came & set(server.values.get("flagged", ()))
        right = len(flagged & guilty)
        return {
            "attack/malicious": len(guilty),
            "attack/flagged": len(flagged),
            "attack/precision": right / len(flagged) if flagged else None,
            "attack/recall": right / len(guilty) if guilty else None,
        }


@lru_cache(maxsize=8)
def _dealt(seed: int, population: int, counts: tuple[int, ...]) -> Mapping[int, int]:
    order = numpy_stream(seed, "world", "malicious").permutation(population)[: sum(counts)].tolist()
    places = [place for place, count in enumerate(counts) for _ in range(count)]
    return dict(zip(order, places, strict=True))
