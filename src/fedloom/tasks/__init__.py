"""Kinds of problems: one file each, which is the registry; installed packages may add some.

The function `build(spec, ...)` of a kind reads a run's settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.errors import UsageError
from fedloom.members import Registry
from fedloom.parsing import Term, called

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedloom.runs.spec import Spec
    from fedloom.task import Task


def _folder() -> dict[str, str]:
    kinds = [path.stem for path in sorted(Path(__file__).parent.glob("*.py"))]
    return {kind: f"fedloom.tasks.{kind}:build" for kind in kinds if kind not in ("__init__", "toy")}


KINDS: Registry[Callable[..., Task]] = Registry("problem", "fedloom.tasks", _folder)


def build(spec: Spec) -> Task:
    """The task that a spec describes: `problem` is its kind with options, `classification` or `partial:0.1`."""
    term = Term(spec.problem)
    task = called(term, KINDS[term.name], spec, where=f"problem {spec.problem!r}")
    if spec.group and "group" not in task.info(0):
        raise UsageError(f"group={spec.group}: a problem of the kind {term.name} knows no groups; leave it out")
    if spec.embed and task.encoder is None:
        raise UsageError(
            f"embed={spec.embed}: a problem of the kind {term.name} takes its data as they are, and no features of an "
            "encoder; leave it out"
        )
    return task
