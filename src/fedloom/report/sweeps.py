"""What a comparison is of, and where its methods are one with other fields: what was tried, and what was chosen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fedloom.comparison.measures import about
from fedloom.quality import chooser_of
from fedloom.report import words
from fedloom.report.maps import map_figure, two_fields
from fedloom.report.picture import Picture

if TYPE_CHECKING:
    from fedloom.comparison.results import Results
    from fedloom.comparison.table import Table
    from fedloom.runs.record import Run

Tried = tuple[str, list[str], list[list[str]]]  # whose trials, the heads of their columns, their cells


def subject(results: Results, runs: Sequence[Run | None]) -> list[str]:
    """What the runs are of, each once: data, clients, networks, as far as runs have begun or settings say it."""
    specs = [run.spec for run in runs if run is not None]
    specs = specs or [results.spec.spec(setting, results.methods[0], results.seeds[0]) for setting in results.settings]
    each = [results.spec.base | one for one in results.spec.settings.values()]
    data = dict.fromkeys(words.brief(str(one.get("data", specs[0].data))) for one in each)
    clients = dict.fromkeys(words.counted(one.clients, "client") for one in specs if one.clients)
    networks = dict.fromkeys(str(one.get("model") or spec.model) for one in each for spec in specs)
    return [" and ".join(data), " or ".join(clients), " or ".join(one for one in networks if one != "None")]


def one_method(results: Results) -> str | None:
    """The method of a sweep: that of all of several labels."""
    names = {str(one["name"]) for one in results.spec.methods.values()}
    return words.brief(next(iter(names))) if len(names) == 1 and len(results.methods) > 1 else None


def chosen(results: Results) -> list[str]:
    """What validation chose under each setting of a sweep, in sentences."""
    told = []
    for setting in results.settings if one_method(results) else ():
        if found := results.chosen(setting):
            method, score, by = found
            fields = ", ".join(f"{name}={_short(v)}" for name, v in results.tuned(setting, method).items())
            whose = f" ({fields})" if fields else ""
            told.append(f"{setting}: {method}{whose}, validation {by.words} {words.told(score, by.unit)}")
    return told


def searched(results: Results) -> list[Tried]:
    """The trials of each search, the best by validation first."""
    found = []
    for setting, method in itertools.product(results.settings, results.methods):
        if tried := results.trials(setting, method):
            by, names = chooser_of(tried), list(dict.fromkeys(name for one in tried for name in one["fields"]))
            scores = [one.get(f"validation_{by.name}") for one in tried]
            ranks = [math.inf if score is None else -by.score(score) for score in scores]
            rows = [
                [
                    str(tried[k]["number"]),
                    *(_short(tried[k]["fields"].get(name)) for name in names),
                    tried[k]["error"] or words.told(scores[k], by.unit),
                ]
                for k in sorted(range(len(tried)), key=ranks.__getitem__)
            ]
            found.append((f"{setting}, {method}", ["trial", *names, f"validation {by.words}"], rows))
    return found


def pictures(results: Results, made: Table, setting: str) -> dict[str, Picture]:
    """What a sweep or a search has to show by name, before all else; nothing of any other comparison."""
    return dict(zip(("fields",), field_map(results, made, setting), strict=False))


def field_map(results: Results, made: Table, setting: str) -> list[Picture]:
    """The scores of a sweep over two fields, as a map; of any other comparison there is none."""
    labelled = {m: {n: v for n, v in one.items() if n != "name"} for m, one in results.spec.methods.items()}
    moving = two_fields(labelled) if one_method(results) else None
    if moving is None:
        return []
    first, second = moving
    down, across = (list(dict.fromkeys(one.get(name) for one in labelled.values())) for name in moving)
    means = {(labelled[row.method].get(first), labelled[row.method].get(second)): row.score.mean
             for row in made.of(setting)}  # fmt: skip
    measure = about(made.metric, made.qualities)
    cells = [[means.get((y, x)) for x in across] for y in down]
    draw = partial(map_figure, cells, measure.unit, measure.better, (first, down), (second, across))
    each = (f"{first}={y}, {second}={x}: {words.told(v, measure.unit)}" for (y, x), v in means.items())
    title = f"{setting}: {measure.words} by {first} and {second}"
    return [Picture(title, f"{title}: {'; '.join(each)}", draw)]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
