"""Kinds of problems: one file each, which is the registry. Its function `build(spec, ...)` reads a run's settings."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.errors import unknown
from fedloom.parsing import Term, called

if TYPE_CHECKING:
    from fedloom.spec import Spec
    from fedloom.task import Task


def build(spec: Spec) -> Task:
    """The task that a spec describes: `problem` is its kind with options, `classification` or `partial:0.1`."""
    term = Term(spec.problem)
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "toy"))
    if term.name not in known:
        raise unknown("problem", term.name, known)
    function = importlib.import_module(f"fedloom.tasks.{term.name}").build
    task: Task = called(term, function, spec, where=f"problem {spec.problem!r}")
    return task
