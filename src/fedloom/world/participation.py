"""How the clients of a round are chosen among those that can be reached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedloom.random import stream

Array = np.ndarray[Any, np.dtype[Any]]


class Participation(ABC):
    """One way to choose.

    `there` tells who can be reached, bool [population] (None: everybody); `wanted` is how many clients a round is to
    have (None: all there are); `knowledge` is what the server has learned of the clients, by name.
    """

    seed: int
    needs: tuple[
        str, ...
    ] = ()  # of the knowledge: `n`, every client's number of training samples, float64 [population]

    def __init__(self, seed: int, population: int) -> None:
        self.seed = seed
        self.population = population

    @abstractmethod
    def choose(
        self, round: int, there: Array | None, wanted: int | None, knowledge: Mapping[str, Any]
    ) -> Sequence[int]:
        """Ids in ascending order: `wanted` of those that are there, or fewer if there are fewer."""

    def everybody(self, there: Array | None) -> Sequence[int]:
        """All that can be reached."""
        if there is None:
            return range(self.population)
        everybody: list[int] = np.flatnonzero(there).tolist()
        return everybody


class Uniform(Participation):
    """So many without replacement, each set as likely as any other."""

    def choose(
        self, round: int, there: Array | None, wanted: int | None, knowledge: Mapping[str, Any]
    ) -> Sequence[int]:
        if wanted is None or wanted >= self.population:
            return self.everybody(there)
        order = torch.randperm(self.population, generator=stream(self.seed, "world", "cohort", round))
        if there is not None:
            order = order[torch.from_numpy(there)[order]]
        chosen: list[int] = order[:wanted].sort().values.tolist()
        return chosen


class Poisson(Participation):
    """Each client on its own, so that `wanted` of the population are only expected."""

    def choose(
        self, round: int, there: Array | None, wanted: int | None, knowledge: Mapping[str, Any]
    ) -> Sequence[int]:
        if wanted is None or wanted >= self.population:
            return self.everybody(there)
        generator = stream(self.seed, "world", "poisson", round)
        drawn = torch.rand(self.population, generator=generator, dtype=torch.float64) < wanted / self.population
        if there is not None:
            drawn &= torch.from_numpy(there)
        chosen: list[int] = drawn.nonzero().flatten().tolist()
        return chosen


class Weighted(Participation):
    """So many without replacement, one after the other with chances in proportion to their samples."""

    needs = ("n",)

    def choose(
        self, round: int, there: Array | None, wanted: int | None, knowledge: Mapping[str, Any]
    ) -> Sequence[int]:
        if wanted is None or wanted >= self.population:
            return self.everybody(there)
        # The first of exponential clocks that run at the clients' rates are that draw.
        generator = stream(self.seed, "world", "weighted", round)
        drawn = torch.rand(self.population, generator=generator, dtype=torch.float64)
        moments = -torch.log1p(-drawn).numpy() / np.maximum(np.asarray(knowledge["n"], dtype=np.float64), 1e-300)
        ids = np.arange(self.population) if there is None else np.flatnonzero(there)
        chosen: list[int] = np.sort(ids[np.argsort(moments[ids], kind="stable")[:wanted]]).tolist()
        return chosen


FORMS: dict[str, type[Participation]] = {"uniform": Uniform, "poisson": Poisson, "weighted": Weighted}
