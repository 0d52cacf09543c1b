"""What a run is made of, put together from its spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from fedloom import engines
from fedloom.boundary import Boundary
from fedloom.cohort import Cohort
from fedloom.data.given import Given
from fedloom.determinism import reproducible
from fedloom.engines import auto
from fedloom.engines.base import Engine
from fedloom.engines.blocks import cores
from fedloom.errors import UsageError
from fedloom.method import Method, has_rate, paced
from fedloom.node import Server
from fedloom.phases import missed
from fedloom.runs.fitted import Fitted, recipe_of
from fedloom.runs.spec import Spec
from fedloom.schedules import Schedule, schedule
from fedloom.task import Task
from fedloom.vector import Layout
from fedloom.world import World


class Parts(Fitted):
    """The parts of one run: method, task, world, stages, engine, server and clients; `engine` replaces the spec's."""

    def __init__(
        self,
        spec: Spec,
        task: Task | Given | None = None,
        method: Method | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(spec, task, method, *([engine.at_server] if engine else []))
        self.world = World.of(self.spec, self.task.population)
        self.pipeline = self.stages()
        self.schedule = self._schedule()
        self.why = None  # why this engine, where `auto` chose it
        with reproducible(self.spec.device, spec.threads):
            self.site = self.site_of(self.task, self.pipeline)
            if engine is None and spec.engine == "auto":
                chosen = auto.choose(self.method, self.site, self.world, spec.workers, cores(), spec.threads)
                self.spec = replace(self.spec, engine=chosen.engine, workers=chosen.workers)
                self.why = chosen.why
        self.engine = engine or engines.build(self.spec.engine, self.spec.workers, spec.threads)
        self.server = Server(self.site, self.task.population)
        self.server.plan_rounds(self.planned)
        self.missed = missed(self.method.phases(self.server), self.spec.rounds)  # told in words
        pace = self.pace if self.schedule else None
        self.boundary = Boundary(self.method, self.site, self.world, self.engine, self.pipeline, pace)
        self.everybody = Cohort(range(self.task.population), self.boundary)
        self.newcomers = Cohort(range(self.task.population, self.task.population + self.task.newcomers), self.boundary)
        self.deserted: str | None = None  # why nobody can ever be reached again
        self.whose: dict[str, Any] = {}  # replies came in the round that was trained last: a line of the record

    def _schedule(self) -> Schedule | None:
        """How the clients' learning rate changes over the rounds of this run."""
        text = self.spec.schedule
        if text and not has_rate(self.method):
            raise UsageError(f"schedule={text} changes the learning rate `lr`, and {self.method.name()} has none")
        return schedule(text, self.spec.rounds) if text else None

    def pace(self, round: int) -> float:
        """The factor on the method's learning rate in a round; before the first it is that of the first."""
        return self.schedule.factor(max(1, round), self.spec.rounds) if self.schedule else 1.0

    def method_in(self, round: int) -> Method:
        """The method with the learning rate of a round."""
        return paced(self.method, self.pace(round))

    def recipe_of(self, layout: Layout) -> Mapping[str, Any] | None:
        """What a network of a layout can be built of, in plain JSON; None if only this task, or method, can do so."""
        return recipe_of(self.site, layout)

    @cached_property
    def knowledge(self) -> Mapping[str, Any]:
        """What the choice of a cohort may go by: what clients registered."""
        needs = self.world.chooser.needs
        return {name: np.array([self.boundary.info(k)[name] for k in self.everybody]) for name in needs}
