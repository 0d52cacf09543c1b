"""What a comparison is of, and where its methods are one with other fields: what was tried, and what was chosen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fedloom.comparison.layout import folder
from fedloom.comparison.measures import about
from fedloom.comparison.tuning import space
from fedloom.quality import chooser_of
from fedloom.report import words
from fedloom.report.maps import map_figure, two_fields
from fedloom.report.page import network
from fedloom.report.picture import Picture
from fedloom.report.trials import Tried

if TYPE_CHECKING:
    from fedloom.comparison.results import Results
    from fedloom.comparison.table import Table
    from fedloom.runs.record import Run

Listed = tuple[str, list[str], list[list[str]]]  # whose trials, the heads of their columns, their cells
LOG = "log"  # the scale of a range, where it has one


def subject(results: Results, runs: Sequence[Run | None]) -> list[str]:
    """What the runs are of, each once: data, clients, networks, as far as runs have begun or settings say it."""
    specs = [run.spec for run in runs if run is not None]
    specs = specs or [results.spec.spec(setting, results.methods[0], results.seeds[0]) for setting in results.settings]
    each = [results.spec.base | one for one in results.spec.settings.values()]
    data = dict.fromkeys(words.brief(str(one.get("data", specs[0].data))) for one in each)
    clients = dict.fromkeys(words.counted(one.clients, "client") for one in specs if one.clients)
    usual = [network(run) for run in runs if run is not None]
    asked = [[words.brief(str(one["model"]))] if one.get("model") else usual for one in each]
    networks = dict.fromkeys(itertools.chain(*asked))
    return [" and ".join(data), " or ".join(clients), " or ".join(filter(None, networks))]


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


def on_logs(ranges: Mapping[str, Sequence[Any]]) -> set[str]:
    """The fields whose range is on a log scale."""
    return {name for name, r in ranges.items() if len(r) == 3 and r[2] == LOG}


def searched(results: Results) -> list[Listed]:
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
    found = dict(zip(("fields",), field_map(results, made, setting), strict=False))
    for whose, tried in attempts(results, setting):
        drawn = {name: one for name, one in tried.pictures().items() if name != "two" or not found}  # which is a map
        found |= {f"{name}-{folder(whose)}" if whose else name: one for name, one in drawn.items()}
    return found


def attempts(results: Results, setting: str) -> list[tuple[str, Tried]]:
    """What was tried under a setting: the trials of each search, or the grid of a sweep, by validation.

    With each the label of its method, where a comparison has several.
    """
    found = []
    for method in results.methods:
        if trials := results.trials(setting, method):
            by = chooser_of(trials)
            scores = [one.get(f"validation_{by.name}") for one in trials]
            logs = on_logs(space(results.spec, method))
            title = setting if len(results.methods) == 1 else f"{setting}, {method}"
            tried = Tried.of(title, [one["fields"] for one in trials], scores, by, logs)
            found.append((method if len(results.methods) > 1 else "", tried))
    if not found and one_method(results) and (means := results.validated(setting)):
        fields = [{n: v for n, v in results.spec.methods[m].items() if n != "name"} for m in means]
        logs = on_logs(results.spec.kind(results.methods[0]).search_space())
        found.append(("", Tried.of(setting, fields, [*means.values()], results.mains[0], logs)))
    return found


def field_map(results: Results, made: Table, setting: str) -> list[Picture]:
    """The scores of a sweep over two fields, as a map; of any other comparison there is none."""
    labelled = {m: {n: v for n, v in one.items() if n != "name"} for m, one in results.spec.methods.items()}
    moving = two_fields(labelled) if one_method(results) and not results.spec.tune else None
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
