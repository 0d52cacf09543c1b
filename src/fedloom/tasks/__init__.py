"""Kinds of problems: one file each, which is the registry. Its function `build(spec, ...)` reads a run's settings."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.errors import UsageError, unknown
from fedloom.fields import named

if TYPE_CHECKING:
    from fedloom.spec import Spec
    from fedloom.task import Task


def build(spec: Spec) -> Task:
    """The task that a spec describes: `problem` is its kind with options, `classification` or `partial:0.1`."""
    kind, positional, options = named(spec.problem)
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "toy"))
    if kind not in known:
        raise unknown("problem", kind, known)
    function = importlib.import_module(f"fedloom.tasks.{kind}").build
    try:
        inspect.signature(function).bind(spec, *positional, **options)
    except TypeError as error:
        takes = ", ".join(str(p) for p in list(inspect.signature(function).parameters.values())[1:]) or "no options"
        raise UsageError(f"problem {spec.problem!r}: {error}; {kind} takes {takes}") from None
    task: Task = function(spec, *positional, **options)
    return task
