"""One method over a grid or by search: a comparison whose methods are the same one with other fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedloom.comparison.grid import Comparison
from fedloom.comparison.reading import class_of, combinations, entry_from, fields_of, inside, placed, settings_label
from fedloom.errors import UsageError, unknown
from fedloom.method import Method
from fedloom.runs.spec import KNOWN

if TYPE_CHECKING:
    pass


def sweep_comparison(settings: Mapping[str, Any]) -> Comparison:
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
    kind = class_of(entry)
    known = {prefix + name for prefix, its, _ in inside(kind, entry) for name in fields_of(its)}
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
        given["methods"] = [placed(kind, entry, one) | {"label": settings_label(one)} for one in combinations(axes)]
    elif search:
        given["methods"] = {"default": placed(kind, entry, _defaults(kind, entry)), "search": entry}
    else:
        given["methods"] = [entry]
    if circumstances:
        given["settings"] = combinations(circumstances)
    return Comparison.of(given | {"tune": search})


def _defaults(kind: type[Method], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a search moves, at their defaults: given, they stay there."""
    return {
        prefix + f.name: f.default
        for prefix, its, given in inside(kind, entry)
        for f in dataclasses.fields(its)
        if f.name in its.search_space() and f.name not in given
    }
