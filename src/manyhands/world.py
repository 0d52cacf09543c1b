"""The circumstances of an experiment: who takes part, and who fails to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from manyhands.errors import UsageError
from manyhands.random import seed_of, stream


@dataclass(frozen=True)
class World:
    """Who takes part in a round, and what happens to them on the way.

    `cohort`: clients asked in a round (None: everybody).
    `participation`: how they are chosen: `uniform`, so many without replacement; or `poisson`, each on its own with the
    probability cohort / population, so that `cohort` is only expected.
    Clients fail in training rounds only: who enrols in `setup` is there, and measuring is not disturbed.
    `dropout`: the share of clients that are silent in a call: they do no work and their state stays as it was.
    `lost`: the share of replies that get lost: the work is done, the state is kept, the server hears nothing.
    """

    population: int
    cohort: int | None = None
    dropout: float = 0.0
    lost: float = 0.0
    seed: int = 0
    participation: str = "uniform"

    def __post_init__(self) -> None:
        if self.cohort is not None and not 1 <= self.cohort <= self.population:
            raise UsageError(f"cohort is {self.cohort}; there are {self.population} clients to choose from")
        for name in ("dropout", "lost"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it is a share between 0 and 1")

    def choose(self, round: int) -> Sequence[int]:
        """The clients asked in a round."""
        if self.cohort is None or self.cohort == self.population:
            return range(self.population)
        if self.participation == "poisson":
            drawn = torch.rand(
                self.population, generator=stream(self.seed, "world", "poisson", round), dtype=torch.float64
            )
            present: list[int] = (drawn < self.cohort / self.population).nonzero().flatten().tolist()
            return present
        order = torch.randperm(self.population, generator=stream(self.seed, "world", "cohort", round))
        chosen: list[int] = order[: self.cohort].sort().values.tolist()
        return chosen

    def silent(self, round: int, nth: int, client: int) -> bool:
        """Whether a client does not react to the `nth` call of a round."""
        return self._happens(self.dropout, "dropout", round, nth, client)

    def loses(self, round: int, nth: int, client: int) -> bool:
        """Whether a client's reply to the `nth` call of a round gets lost."""
        return self._happens(self.lost, "lost", round, nth, client)

    def _happens(self, share: float, *key: int | str) -> bool:
        return share > 0 and seed_of(self.seed, "world", *key) < share * 2**63
