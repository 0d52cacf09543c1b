"""Before the first round: what a method would send unprotected, found by playing it on a small problem.

Which fields a method sends in which phase stands in its text only. So it is run for two rounds, setup, finish and
`observe` included, on the problem on which its contract is checked. What shows up on the real problem alone (in a later
round, of a client without a class) is found there, as it happens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedloom.errors import RunError, UsageError

if TYPE_CHECKING:
    from fedloom.boundary.privacy import Privacy
    from fedloom.method import Method

ROUNDS = 2


def rehearsed(method: Method, privacy: Privacy) -> tuple[str, ...]:
    """The unprotected things that leave the clients of a small problem; raises Unprotected for a method it refuses."""
    from fedloom.boundary import Boundary
    from fedloom.boundary.passage import Passage
    from fedloom.boundary.privacy import Unprotected
    from fedloom.cohort import Cohort
    from fedloom.engines.serial import Serial
    from fedloom.node import Server
    from fedloom.random import seeded
    from fedloom.site import Site
    from fedloom.testing.lab import Lab
    from fedloom.world import World

    task = Lab(method).toy()
    played = privacy.on(task)
    site, engine = Site(task, 0, layers=played.layers()), Serial()
    boundary = Boundary(method, site, World(task.population), engine, Passage(site.layers, privacy=played))
    server, everybody = Server(site, task.population), Cohort(range(task.population), boundary)
    engine.start(method, site, {})

    def step(kind: str, round: int, act: Callable[[], object]) -> None:
        boundary.begin(kind, round)
        server.begin(kind, round)
        with seeded(0, *server.key, "torch"):
            act()

    def training() -> None:
        chosen = method.select(server, everybody)
        method.round(server, everybody if chosen is None else chosen)

    try:
        step("setup", 0, lambda: method.setup(server, everybody))
        for round in range(1, ROUNDS + 1):
            step("train", round, training)
        step("finish", ROUNDS, lambda: method.finish(server, everybody))
        step("evaluate", ROUNDS, lambda: played.observed(boundary, server, lambda: method.observe(server, everybody)))
    except (UsageError, RunError) as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, Unprotected):
            cause = cause.__cause__
        if cause:
            raise cause from None
        # Too small a problem for this method: what was seen until now counts.
    except Exception:  # noqa: BLE001  a method's own mistake is told where it is run
        pass
    return tuple(played.memory(boundary)["leaks"])
