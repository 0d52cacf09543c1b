"""Kinds of problems: one file each, which is the registry; installed packages may add some.

The function `build(spec, ...)` of a kind reads a run's settings. A kind that lies upon others is marked by `layer`, and
a kind that others may lie upon by `ground`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedloom.errors import UsageError
from fedloom.members import Registry
from fedloom.parsing import Term, called, chain
from fedloom.quality import ACCURACY, Quality

if TYPE_CHECKING:
    from fedloom.data.given import Given
    from fedloom.runs.spec import Spec
    from fedloom.task import Task

B = TypeVar("B", bound=Callable[..., Any])


def _folder() -> dict[str, str]:
    kinds = [path.stem for path in sorted(Path(__file__).parent.glob("[!_]*.py"))]
    return {kind: f"fedloom.tasks.{kind}:build" for kind in kinds if kind != "toy"}


KINDS: Registry[Callable[..., Task]] = Registry("problem", "fedloom.tasks", _folder)


def layer(rank: int) -> Callable[[B], B]:
    """Marks the `build(spec, inner, ...)` of a kind that lies upon another, which `inner()` reads: `stream:5`.

    Of several in a problem, that with the lower rank lies inside, in whatever order they are written.
    """

    def mark(build: B) -> B:
        build.__layer__ = rank  # type: ignore[attr-defined]
        return build

    return mark


def ground(build: B) -> B:
    """Marks the `build` of a kind upon which others may lie: every client has rows, and each row one label."""
    build.__ground__ = True  # type: ignore[attr-defined]
    return build


def stacked(terms: list[Term], where: str) -> list[tuple[Term, Callable[..., Task]]]:
    """The kinds of a problem, the innermost first; raises UsageError where they do not lie upon each other."""
    kinds = [(term, KINDS[term.name]) for term in terms]
    layers = sorted(
        (pair for pair in kinds if hasattr(pair[1], "__layer__")),
        key=lambda pair: (pair[1].__layer__, pair[0].name),  # type: ignore[attr-defined]
    )
    grounds = [pair for pair in kinds if not hasattr(pair[1], "__layer__")]
    names = [term.name for term in terms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{where} has {twice[0]} twice; keep one")
    if len(grounds) > 1:
        raise UsageError(
            f"{where}: {' and '.join(term.name for term, _ in grounds)} are both kinds of data; keep one of them"
        )
    lowest, build = grounds[0] if grounds else (Term("classification"), KINDS["classification"])
    if layers and not hasattr(build, "__ground__"):
        raise UsageError(
            f"{where}: {layers[0][0].name} lies upon a problem whose clients have rows with one label each, as "
            f"classification and finetune have, and not upon {lowest.name}; leave one of them out"
        )
    return [(lowest, build), *layers]


def qualities(problem: str) -> tuple[Quality, ...]:
    """The measures of a kind of problem, the main one first, without its data: QUALITIES beside its `build`."""
    _, lowest = stacked(chain(problem), f"problem {problem!r}")[0]
    return getattr(sys.modules[lowest.__module__], "QUALITIES", (ACCURACY,))


def build(spec: Spec, given: Given | None = None, ground: Callable[[], Task] | None = None) -> Task:
    """The task that a spec describes: `problem` is its kind with options, or a stack of kinds: `partial:0.1+stream:5`.

    What does not go together is refused before any data is read. `given` are data that Python has, in place of named
    ones, and `ground` makes the innermost problem in place of its kind.
    """
    spec = spec if given is None else replace(spec, data=given)
    where = f"problem {spec.problem!r}"
    (lowest, kind), *layers = stacked(chain(spec.problem), where)
    make = ground or functools.partial(called, lowest, kind, spec, where=where)
    for term, upper in layers:
        make = functools.partial(called, term, upper, spec, make, where=where)
    task: Task = make()
    if given is not None and "data" not in task.describe():
        raise UsageError(
            f"a problem of the kind {lowest.name} does not read {given}; leave the data out, or take "
            "problem=classification"
        )
    if spec.group and "group" not in task.info(0):
        raise UsageError(f"group={spec.group}: a problem of the kind {lowest.name} knows no groups; leave it out")
    if spec.embed and task.encoder is None:
        raise UsageError(
            f"embed={spec.embed}: a problem of the kind {lowest.name} takes its data as they are, and no features of "
            "an encoder; leave it out"
        )
    if spec.head and getattr(task, "head", None) != spec.head:
        raise UsageError(
            f"head={spec.head}: a problem of the kind {lowest.name} takes networks of its own; leave it out"
        )
    if spec.test_share is not None and getattr(task, "test_share", None) != spec.test_share:
        raise UsageError(
            f"test_share={spec.test_share:g}: a problem of the kind {lowest.name} has test samples of its own; leave "
            "it out"
        )
    if lacking := [name for name in spec.metadata if name not in task.data(0, "train").metadata]:
        raise UsageError(
            f"metadata={','.join(lacking)}: a problem of the kind {lowest.name} carries no columns beside x and y; "
            "leave it out"
        )
    return task
