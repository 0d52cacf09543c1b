"""The pictures of a run by name: those of its page, of `run.plot` and of `fedloom report --pictures`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from fedloom.data.picture import partition_figure
from fedloom.errors import unknown
from fedloom.quality import Quality, evaluated, main_of
from fedloom.report import words
from fedloom.report.clients import clients_figure, of_all, ranked
from fedloom.report.curves import Panel, panel_figure, panels
from fedloom.report.maps import by_round, map_figure
from fedloom.report.participants import flagged, participants, participation, staleness
from fedloom.report.picture import Picture
from fedloom.report.timeline import described, timeline_figure, window
from fedloom.runs.confusion import Confusion, kept
from fedloom.runs.continual import after_each
from fedloom.runs.shown import Shown

MOST_CLASSES = 200  # of a picture of which are taken for which


def pictures(run: Shown) -> dict[str, Picture]:
    """All that there is to draw, by name, in the order of the page."""
    metrics = run.metrics
    main = main_of(metrics)
    found = {_name(panel.title): _curves(panel) for panel in panels(run)}
    judged = (run.chosen_clients if any(map(evaluated, metrics)) else {}) or run.clients  # of the headline's round
    found |= _clients(judged.get("clients", ()), main)
    everybody = participants(run)
    found |= flagged(everybody) | participation(everybody, len(metrics))
    found |= {_name(panel.title): _curves(panel) for panel in staleness(run)}
    found |= _confusions(run)
    found |= _tasks(run)
    found |= _by_round(run, main)
    if shown := window(run):
        found["timeline"] = Picture("Who worked when", described(shown), partial(timeline_figure, shown))
    return found | _partition(run.partition)


def picture(run: Shown, name: str | None) -> Picture:
    """One of them, or the first; raises UsageError where there is none of that name."""
    found = pictures(run)
    if name is None and found:
        return next(iter(found.values()))
    if name not in found:
        raise unknown("picture of a run", str(name), found)
    return found[name]


def _name(title: str) -> str:
    """What a panel is called: `accuracy-for-bytes`."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in title.lower()).split())


def _curves(panel: Panel) -> Picture:
    ends = []
    for curve in panel.curves:
        value = words.percent(curve.y[-1]) if panel.shares else f"{curve.y[-1]:.4g}"
        ends.append(f"{curve.label} ends at {value}")
    alt = f"{panel.title} against {panel.across}: {'; '.join(ends)}."
    return Picture(panel.title, alt, partial(panel_figure, panel))


def _clients(judged: Iterable[Mapping[str, Any]], main: Quality) -> dict[str, Picture]:
    judged = [client for client in judged if main.name in client]  # a saddle point has another measure
    if not judged:
        return {}
    worst = ranked(judged, main)[0]
    mean, low = words.told(of_all(judged, main), main.unit), words.told(worst[main.name], main.unit)
    alt = f"Test {main.words} of {len(judged)} clients: mean {mean}, worst {low} (client {worst['id']})."
    return {"clients": Picture("Client by client", alt, partial(clients_figure, judged, main))}


def _confusions(run: Shown) -> dict[str, Picture]:
    """Which classes the model takes for which, in shares of the rows of each; that of clients where they have own."""
    found = {}
    for whose, name, said in (
        ("global", "confusion", "Which classes the global model takes for which"),
        ("personal", "personal-confusion", "Which classes clients' models take for which"),
    ):
        counts = kept(run, whose)
        if counts is not None and 1 < len(counts.classes) <= MOST_CLASSES and len(counts):
            found[name] = Picture(said, f"{said}: {_recalls(counts)}.", partial(confusion_figure, counts))
    return found


def confusion_figure(counts: Confusion) -> Any:
    """A row for each true class: which share of its rows is said to be of which; empty where there are no rows."""
    rows = counts.matrix.sum(1)
    shares = [
        [float(count / total) if total and count else None for count in line]
        for line, total in zip(counts.matrix, rows, strict=True)
    ]
    return map_figure(shares, "share", "high", ("true", counts.classes), ("said, % of those", counts.classes))


def _recalls(counts: Confusion) -> str:
    each = [one for one in counts.per_class() if one["recall"] is not None]
    if len(each) > 20:
        low = min(each, key=lambda one: one["recall"])
        return f"{len(each)} classes, of the worst ({low['class']}) {words.percent(low['recall'])} right"
    return ", ".join(f"of {one['class']} {words.percent(one['recall'])} right" for one in each)


def _tasks(run: Shown) -> dict[str, Picture]:
    tasks = after_each(run)
    if not any(one is not None for row in tasks for one in row):
        return {}
    numbers = range(1, len(tasks) + 1)
    draw = partial(map_figure, tasks, "share", "high", ("after task", numbers), ("accuracy on task, %", numbers))
    last = [words.percent(one) for one in tasks[-1]]
    alt = f"Accuracy on each task after each task; after the last one: {', '.join(last)}."
    return {"tasks": Picture("Task by task", alt, draw)}


def _by_round(run: Shown, main: Quality) -> dict[str, Picture]:
    ids, rounds, cells = by_round(list(run.lines("clients.jsonl")), main)
    if len(ids) < 2 or len(rounds) < 2:
        return {}
    draw = partial(map_figure, cells, main.unit, main.better, ("client", ids), ("round", rounds))
    alt = f"Test {main.words} of {words.counted(len(ids), 'client')} in {words.counted(len(rounds), 'round')}."
    return {"clients-by-round": Picture(f"Test {main.words} of clients, round by round", alt, draw)}


def _partition(partition: Mapping[str, Any]) -> dict[str, Picture]:
    clients = partition.get("clients")
    if not clients or not partition["classes"]:
        return {}
    one, many = ("range of the target", "targets") if "target" in partition else ("class", "classes")
    alt = f"Rows of each of {len(clients)} clients, and their training rows by {one}."
    draw = partial(partition_figure, dict(partition))
    return {"partition": Picture(f"Rows of every client, and their {many}", alt, draw, themed=False)}
