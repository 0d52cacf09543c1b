"""What a call in Python asks for: its method, its data and its settings, as the spec of an experiment."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fedloom.data.given import Given
from fedloom.data.roles import EXCLUDED
from fedloom.errors import UsageError, nearest, unknown
from fedloom.letters import with_article
from fedloom.method import Method
from fedloom.parsing import named
from fedloom.registry import entry_of
from fedloom.runs.experiment import Experiment
from fedloom.runs.fitted import named_as
from fedloom.runs.record import Run
from fedloom.runs.spec import KNOWN, Spec
from fedloom.task import Task
from fedloom.user_files import reread

if TYPE_CHECKING:
    from fedloom.settings import RunSettings

Named: TypeAlias = str | Path | Method | type[Method]  # as what a method may be given


def begun(
    method: Named,
    task: Task | Any,
    fields: Mapping[str, Any] | None,
    out: str | Path | None,
    settings: RunSettings,
) -> Experiment:
    """An experiment with its record, told in Python."""
    reread()
    given: dict[str, Any] = dict(settings)
    instance = _take_method(method, fields or {}, given)
    own = name_data(task, given)
    spec = Spec.of(given)
    Run.require_absent(out)  # told before the data are read
    made = Experiment(spec, own, instance).begin(out)
    columns = made.record.partition.get("columns", ())
    unused = [f"{c['name']} ({c['note']})" for c in columns if c["role"] == "ignored" and c["note"] != EXCLUDED]
    if unused and not any(c["role"] == "image" for c in columns):
        warnings.warn(f"{spec.data}: ignored is {', '.join(unused)}; exclude= says so, keep= uses it", stacklevel=3)
    return made


def _take_method(method: Named, fields: Mapping[str, Any], given: dict[str, Any]) -> Method | None:
    """Writes the method into the settings, with those of them that are its fields; returns it if Python has made it."""
    if isinstance(method, Method):
        if fields:
            raise UsageError(f"{method} has its fields; give {min(fields)}=... where it is made, and not in fields")
        _refuse_unknown(given, (), f"; a field is given where {type(method).__name__}(...) is made")
        given["method"] = method.to_spec()
        return method
    kind = method if isinstance(method, type) else None
    own = {"name": kind.name()} if kind else named(str(method))
    names = {f.name for f in dataclasses.fields(kind)} if kind else {f[0] for f in entry_of(own["name"]).fields()}
    _refuse_unknown(given, names, f"; fields of {own['name']} are {', '.join(sorted(names)) or 'none'}")
    direct = {name: given.pop(name) for name in (names - {*KNOWN}) & given.keys()}
    ways = (own, fields, direct)
    if twice := [name for name in names if sum(name in way for way in ways) > 1]:
        raise UsageError(f"the field {min(twice)} of {own['name']} is given twice, by itself and in fields; keep one")
    if kind:
        instance = _made(kind, {**fields, **direct})
        given["method"] = instance.to_spec()
        return instance
    given["method"] = {**own, **fields, **direct}
    return None


def _made(kind: type[Method], fields: Mapping[str, Any]) -> Method:
    known = [field.name for field in dataclasses.fields(kind)]
    for name in fields:
        if name not in known:
            raise unknown(f"field of {kind.name()}", name, known)
    return kind(**fields)


def _refuse_unknown(given: Mapping[str, Any], fields: Collection[str], told: str) -> None:
    """Raises UsageError for what is neither a setting nor a field of the method."""
    for name in given:
        if name not in KNOWN and name not in fields:
            raise UsageError(f"unknown setting {name!r}{nearest(name, [*KNOWN, *fields])}{told}")


def name_data(task: Any, settings: dict[str, Any]) -> Task | Given | None:
    """Writes into the settings what the data are; returns what only Python has of them, a task or data."""
    if task is None:
        task = settings.pop("data", None)
    elif settings.get("data") is not None:
        raise UsageError(f"the data are given twice, as {with_article(type(task).__name__)} and as data=; keep one")
    if task is None:
        return None
    if isinstance(task, str | os.PathLike):
        settings["data"] = os.fspath(task)
        return None
    if isinstance(task, Task):
        settings["data"] = named_as(task)
        settings.setdefault("partition", "given")
        return task
    given = Given.of(task)
    settings["data"] = str(given)
    if given.client is not None:
        settings.setdefault("partition", f"column:{given.client}")
    return given
