"""Before the first round: what a method does at some stage, found by playing it on a small problem.

Which fields a method sends in which phase stands in its text only, and so does what a plug-in's changes at the clients
come to. So where a stage asks for it (`Stage.on`: privacy), or a plug-in acts at the clients, the method is run for two
rounds, or two of each of its phases, setup, finish and `observe` included, on the problem on which its contract is
checked. What shows up on the real problem alone (in a later round, of a client without a class) is found there, as it
happens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedloom.boundary.boundary import Boundary
from fedloom.boundary.pipeline import Pipeline
from fedloom.cohort import Cohort
from fedloom.engines.perform import without_effect
from fedloom.engines.serial import Serial
from fedloom.errors import Refused, RunError, UsageError
from fedloom.node import Server
from fedloom.phases import one_of_each
from fedloom.plugin import plugins_of
from fedloom.runs.act import acting
from fedloom.site import Site
from fedloom.tasks.toy import toy_for
from fedloom.world import World

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.boundary.stage import Stage
    from fedloom.method import Method
    from fedloom.task import Task


@dataclass(frozen=True)
class Play:
    """What a small run leaves, and whether it came to its end."""

    books: Books
    site: Site
    whole: bool


def rehearsed(method: Method, pipeline: Pipeline, planned: int | None = None) -> Pipeline:
    """The pipeline whose stages know what a method does to them; raises UsageError for one that they refuse.

    And for a plug-in that would act at the clients, where nothing would come of it.
    """
    if not pipeline.with_hook("on") and not plugins_of(method, "around"):
        return pipeline
    task = toy_for(method.needs)
    effective(method, task, planned)

    def known(stage: Stage) -> Stage:
        copy = stage.on(task)
        if copy is None:
            return stage
        play = played(method, task, planned, copy)
        return stage.after_rehearsal(play.books, play.whole)

    return replace(pipeline, stages=tuple(map(known, pipeline.stages)))


def effective(method: Method, task: Task, planned: int | None) -> None:
    """Raises Refused for a plug-in that acts at the clients, and whose changes there the method inside never asks for.

    A function of a method that does not train need not: somewhere in the rounds it must be asked for.
    """
    plugins = plugins_of(method, "around")
    if not plugins:
        return
    play = played(method, task, planned)
    changes = play.site.changes if play.whole else {}
    for plugin in plugins if play.whole else ():
        if (id(plugin), "") not in changes:
            raise Refused(
                f"{plugin.name()} acts where clients work for the method inside, and {plugin.inner.name()} asks "
                "nothing of them in its rounds; take one that trains at its clients"
            )
        for what in ("data", "loss"):
            if not changes.get((id(plugin), what), True):
                raise Refused(without_effect(plugin.name(), what))


def played(method: Method, task: Task, planned: int | None, stage: Stage | None = None) -> Play:
    """A small run, with one stage; raises Refused for what it, or a plug-in of the method, refuses in it."""
    pipeline = Pipeline() if stage is None else Pipeline((stage,))
    engine = Serial()
    try:
        site = Site(task, 0, layers=pipeline.layers, networks=method.networks, needs=method.needs)
    except UsageError:  # nor do its networks fit so small a one
        site = Site(task, 0, layers=pipeline.layers, needs=method.needs)
        return Play(Boundary(method, site, World(task.population), engine, pipeline).books, site, whole=False)
    boundary = Boundary(method, site, World(task.population), engine, pipeline)
    server, everybody = Server(site, task.population), Cohort(range(task.population), boundary)
    engine.start(method, site, {})
    server.plan_rounds(planned)
    rounds, whole = one_of_each(method.phases(server)), False
    try:
        with acting(boundary, server, "setup", 0):
            method.setup(server, everybody)
        for round in rounds:
            with acting(boundary, server, "train", round):
                chosen = method.select(server, everybody)
                method.round(server, everybody if chosen is None else chosen)
        with acting(boundary, server, "finish", rounds[-1]):
            method.finish(server, everybody)
        with acting(boundary, server, "evaluate", rounds[-1]):
            pipeline.observe(boundary.books, server, lambda: method.observe(server, everybody))
        whole = True
    except (UsageError, RunError) as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, Refused):
            cause = cause.__cause__
        if cause:
            raise cause from None
        # Too small a problem for this method: what was seen until now counts.
    except Exception:  # noqa: BLE001  a method's own mistake is told where it is run
        pass
    return Play(boundary.books, site, whole)
