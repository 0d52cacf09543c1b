"""Before the first round: what a method does at some stage, found by playing it on a small problem.

Which fields a method sends in which phase stands in its text only. So where a stage asks for it (`Stage.on`: privacy),
the method is run for two rounds, setup, finish and `observe` included, on the problem on which its contract is checked.
What shows up on the real problem alone (in a later round, of a client without a class) is found there, as it happens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedloom.boundary.boundary import Boundary
from fedloom.boundary.pipeline import Pipeline
from fedloom.boundary.stage import Refused
from fedloom.cohort import Cohort
from fedloom.engines.serial import Serial
from fedloom.errors import RunError, UsageError
from fedloom.node import Server
from fedloom.runs.act import acting
from fedloom.site import Site
from fedloom.tasks.toy import toy_for
from fedloom.world import World

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.boundary.stage import Stage
    from fedloom.method import Method
    from fedloom.task import Task

ROUNDS = 2


def rehearsed(method: Method, pipeline: Pipeline) -> Pipeline:
    """The pipeline whose stages know what a method does to them; raises UsageError for one that they refuse."""

    if not pipeline.with_hook("on"):
        return pipeline
    task = toy_for(method.needs)

    def known(stage: Stage) -> Stage:
        copy = stage.on(task)
        return stage if copy is None else stage.after_rehearsal(played(method, task, copy))

    return replace(pipeline, stages=tuple(map(known, pipeline.stages)))


def played(method: Method, task: Task, stage: Stage) -> Books:
    """The books of a small run with one stage; raises Refused for what the stage refuses in it."""
    pipeline = Pipeline((stage,))
    site, engine = Site(task, 0, layers=pipeline.layers), Serial()
    boundary = Boundary(method, site, World(task.population), engine, pipeline)
    server, everybody = Server(site, task.population), Cohort(range(task.population), boundary)
    engine.start(method, site, {})

    try:
        with acting(boundary, server, "setup", 0):
            method.setup(server, everybody)
        for round in range(1, ROUNDS + 1):
            with acting(boundary, server, "train", round):
                chosen = method.select(server, everybody)
                method.round(server, everybody if chosen is None else chosen)
        with acting(boundary, server, "finish", ROUNDS):
            method.finish(server, everybody)
        with acting(boundary, server, "evaluate", ROUNDS):
            pipeline.observe(boundary.books, server, lambda: method.observe(server, everybody))
    except (UsageError, RunError) as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, Refused):
            cause = cause.__cause__
        if cause:
            raise cause from None
        # Too small a problem for this method: what was seen until now counts.
    except Exception:  # noqa: BLE001  a method's own mistake is told where it is run
        pass
    return boundary.books
