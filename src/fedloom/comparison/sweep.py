"""One method over a grid or by search: a comparison whose methods are the same one with other fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.comparison.conductor import Watcher
from fedloom.comparison.grid import Comparison
from fedloom.comparison.reading import crossed, entry_from, fields_of, mapping, titled
from fedloom.comparison.run import conduct
from fedloom.errors import UsageError, unknown
from fedloom.method import Method
from fedloom.registry import entry_of
from fedloom.spec import KNOWN

if TYPE_CHECKING:
    from fedloom.comparison.results import Results
    from fedloom.task import Task


def sweep(
    method: str | Mapping[str, Any] | Path,
    task: str | Task | None = None,
    *,
    over: Mapping[str, Sequence[Any]] | None = None,
    search: int = 0,
    out: str | Path | None = None,
    jobs: int = 0,
    watcher: Watcher | None = None,
    report: bool = True,
    **settings: Any,
) -> Results:
    """Runs one method with other fields at every seed: all combinations of `over`, or what `search` trials find.

    `method` is a name, a file, a mapping with fields, or the YAML file of a run, in which `over` and `search` may stand
    too. `over` maps fields of the method and settings of a run to the values to take. A search goes over the ranges
    that the method declares, of fields that are not given, on validation data. The rest is as in `compare`.
    """
    from fedloom.experiment import placed

    if isinstance(method, Path) or (isinstance(method, str) and method.endswith((".yaml", ".yml"))):
        given = mapping(method) | settings
    else:
        given = {"method": method} | settings
    given |= {"over": over} if over else {}
    given |= {"search": search} if search else {}
    placed(task, given)
    return conduct(swept(given), out, None if isinstance(task, str) else task, jobs, watcher, report)


def swept(settings: Mapping[str, Any]) -> Comparison:
    """The comparison that a sweep is, from the settings of a run with `over`, `search` and those of a comparison."""
    given = dict(settings)
    method, over, search = given.pop("method", None), dict(given.pop("over", None) or {}), given.pop("search", 0) or 0
    if "seed" in given:
        given.setdefault("seeds", [given["seed"]])
        del given["seed"]
    if not over and not search:
        raise UsageError("nothing to sweep over: give values, as --over lr=0.01,0.1, or trials, as --search 20")
    if "methods" in given or method is None:
        raise UsageError("a sweep is of one method: `method: {name: fedprox}`; compare takes several")
    entry = entry_from(method)
    known = fields_of(entry_of(entry["name"]).load(Method))
    axes: dict[str, Any] = {}
    circumstances: dict[str, Any] = {}
    for name, values in over.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise UsageError(f"over {name}: {values!r} is not a list of values; give some, such as [0.01, 0.1]")
        field = name.removeprefix("method.")
        if field in known:
            axes[field] = values
        elif name in KNOWN:
            circumstances[name] = values
        else:
            raise unknown(f"field of {entry['name']}, or setting,", name, [*known, *KNOWN])
    if axes:
        given["methods"] = [entry | one | {"label": titled(one)} for one in crossed(axes)]
    elif search:
        given["methods"] = {"default": entry | _defaults(entry), "search": entry}
    else:
        given["methods"] = [entry]
    if circumstances:
        given["settings"] = crossed(circumstances)
    return Comparison.of(given | {"tune": search})


def _defaults(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a search moves, at their defaults: given, they stay there."""
    kind = entry_of(entry["name"]).load(Method)
    searched = kind.searched()
    return {f.name: f.default for f in dataclasses.fields(kind) if f.name in searched and f.name not in entry}
