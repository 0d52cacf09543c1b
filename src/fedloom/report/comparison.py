"""A comparison's report: the page, and its table as Markdown, CSV and LaTeX."""

from __future__ import annotations

import ast
import inspect
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.comparison import measures, statistics
from fedloom.comparison.layout import folder, put
from fedloom.comparison.measures import about
from fedloom.comparison.table import Table, table
from fedloom.report import contrasts, exports, html, sweeps, words
from fedloom.report.contrasts import Looks
from fedloom.report.picture import Picture
from fedloom.report.style import COLOURS, SERIES
from fedloom.report.trials import HOW
from fedloom.runs.reading import understood
from fedloom.runs.writing import disk

if TYPE_CHECKING:
    from fedloom.comparison.results import Results
    from fedloom.runs.record import Run

COSTS = (  # kind, across, caption
    ("round", "round", "against rounds"),
    ("bytes", "of training messages", "against bytes"),
    ("virtual", "virtual seconds", "against virtual time"),
)
WALL = ("wall", "seconds of wall time", "against wall time")
PRICE = ("round", "rounds", "rounds_to_target", "bytes_to_target", "virtual_seconds_to_target", "up_bytes",
         "down_bytes", "peer_bytes", "steps_per_client", "labels", "virtual_seconds", "seconds")  # fmt: skip


def write(results: Results) -> Path:
    """Writes report.html, .md, .csv and .tex into the comparison's folder, as far as it is; returns the page's path."""
    with understood(results.path):
        made = table(results)
        texts = {
            "report.md": exports.markdown(made, notes(results, made)),
            "report.csv": exports.rows_csv(made),
            "report.tex": exports.latex(made),
            "report.html": html.page(
                "comparison.html.j2", _facts(results, made), exports.score, exports.tested, exports.state
            ),
        }
    for name, text in texts.items():
        with disk(results.path, "compare"):
            put(results.path / name, text)
    return results.path / "report.html"


def notes(results: Results, made: Table) -> list[str]:
    """How the numbers came to be, in sentences: what is compared, by which test, and what could not be tested."""
    seeds = words.counted(len(results.seeds), "seed")
    default = "" if results.spec.metric else " (the default: every method has it, also one without a global model)"
    told = [
        f"Compared by {about(made.metric).words}{default}, in the round that validation data chose; mean ± half the"
        f" 95 % t interval over {seeds}. No test number had a say in the choice of a round or of tuned fields.",
        f"Tested by the {statistics.TESTS[made.test]}, paired by seed, against"
        f" {'the baseline' if results.spec.baseline else 'the method with the best mean'}; p with Holm's correction"
        " within a setting; effect: Hedges' g of the paired differences.",
    ]
    reasons = dict.fromkeys(
        f"{row.setting}, {row.method}: no p-value: {row.test.why}." for row in made.rows if row.test and row.test.why
    )
    whys = dict.fromkeys(row.test.why for row in made.rows if row.test and row.test.why)
    if len(whys) == 1 and len(reasons) > 1:
        told.append(f"No p-value and nothing in bold: {next(iter(whys))}.")
    else:
        told += reasons
    if any(row.leads for row in made.rows):
        worse = "above" if about(made.metric, made.qualities).better == "low" else "below"
        told.append(f"Bold: the best mean, and every method that the same test does not find {worse} it (p < 0.05).")
    for setting, target in made.targets.items():
        if target is not None:
            share = 1 / measures.SHARE if made.qualities[0].better == "low" else measures.SHARE
            origin = "as asked" if results.spec.target is not None else f"{share:.4g} of the reference's"
            main = made.qualities[0]
            told.append(f"{setting}: target {words.told(target, main.unit)} validation {main.words} ({origin}).")
    if made.ranks is not None:
        told.append(ranked(made.ranks))
    if results.unfinished:
        on = f"fedloom compare {shlex.quote(str(results.path))}"
        told.append(f"{words.counted(len(results.unfinished), 'cell')} not done yet; go on with: {on}")
    return told


def ranked(ranks: statistics.Ranks) -> str:
    """What the ranks over the settings say."""
    order = sorted(ranks.means.items(), key=lambda item: item[1])
    means = ", ".join(f"{method} {rank:.2f}" for method, rank in order)
    verdict = f"{ranks.why}." if ranks.why else f"Friedman test p = {ranks.p:.3g}."
    return f"Mean ranks over {ranks.settings} settings: {means}; critical difference {ranks.critical:.2f}. {verdict}"


def _facts(results: Results, made: Table) -> dict[str, Any]:
    looks = Looks.of(results.methods)
    first = {m: next((c.run for c in results.cells if c.method == m and c.run), None) for m in results.methods}
    finished = sum(cell.run is not None for cell in results.cells)
    quality = [name for name in measures.measures_of(made.qualities) if name not in measures.COSTS]
    version = next((run.manifest.get("fedloom", "") for run in first.values() if run), "")
    drawn = {setting: _pictures(results, made, setting, looks) for setting in results.settings}
    return {
        "title": ", ".join(results.methods),
        "of": sweeps.subject(results, list(first.values())),
        "one_method": sweeps.one_method(results),
        "chosen": sweeps.chosen(results),
        "importance": HOW if any(name.startswith("importance") for one in drawn.values() for name in one) else "",
        "searched": sweeps.searched(results),
        "settings": results.settings,
        "methods": results.methods,
        "looks": looks,
        "variables": {method: looks.variable(method) for method in results.methods},
        "table": made,
        "about": about,
        "quality": made.having(*quality),
        "unit": about(made.metric).unit,
        "main": made.qualities[0].words,
        "gap": exports.gap,
        "price": [n for n in PRICE if any(any(r.measures[n].values) for r in made.rows)],
        "said": exports.measure,
        "notes": notes(results, made),
        "finished": finished,
        "cells": results.cells,
        "seeds": results.seeds,
        "status": "finished" if finished == len(results.cells) else "not finished",
        "failed": results.failed,
        "capped": results.capped,
        "pictures": {setting: [*one.values()] for setting, one in drawn.items()},
        "ranks": _ranks_picture(made, looks),
        "sends": {m: _sends(run) if run else [] for m, run in first.items()},
        "privacy": {m: words.privacy_statement(run.manifest) if run else [] for m, run in first.items()},
        "keeps": {m: keeps(results.spec.kind(m)) for m in results.methods},
        "assumes": {m: assumes(results.spec.kind(m)) for m in results.methods},
        "fields": {m: {n: v for n, v in results.spec.methods[m].items() if n != "name"} for m in results.methods},
        "trials": {(r.setting, r.method): len(results.trials(r.setting, r.method)) for r in made.rows if r.tuned},
        "yaml": results.spec.text(),
        "command": f"fedloom compare {shlex.quote(str(results.path / 'comparison.yaml'))} --out NEW_FOLDER",
        "one": f"fedloom run {shlex.quote(str(results.cells[0].path / 'spec.yaml'))} --out NEW_FOLDER",
        "version": version,
        "colours": COLOURS,
        "series": SERIES,
    }


def pictures(results: Results) -> dict[str, Picture]:
    """The pictures of the page by name, those of each setting behind its own: `skewed-scores`."""
    made, looks = table(results), Looks.of(results.methods)
    drawn = {
        f"{folder(setting)}-{name}": picture
        for setting in results.settings
        for name, picture in _pictures(results, made, setting, looks).items()
    }
    ranks = _ranks_picture(made, looks)
    return drawn | ({"ranks": ranks} if ranks else {})


def _pictures(results: Results, made: Table, setting: str, looks: Looks) -> dict[str, Picture]:
    rows = made.of(setting)
    runs = {m: [c.run for c in results.of(setting, m) if c.run is not None] for m in results.methods}
    if not any(runs.values()):
        return {}
    said, reference = about(made.metric).words, made.references.get(setting)
    unit, main = about(made.metric).unit, made.qualities[0]
    in_shares = unit == "share"
    drawn = sweeps.pictures(results, made, setting)
    drawn["scores"] = Picture(
        f"{setting}: {said}",
        f"{said} of each method: " + "; ".join(f"{row.method} {exports.score(row.score, unit)}" for row in rows),
        partial(contrasts.scores_figure, rows, looks, said, reference, in_shares),
    )
    clients = {m: [c[main.name] for run in some for c in run.chosen_clients.get("clients", ()) if main.name in c]
               for m, some in runs.items()}  # fmt: skip
    if any(clients.values()):
        alt = "; ".join(f"{m}: {len(a)} results from {min(a):.2f} to {max(a):.2f}" for m, a in clients.items() if a)
        draw = partial(contrasts.clients_figure, clients, looks, main)
        drawn["clients"] = Picture(f"{setting}: client by client, all seeds", alt, draw)
    column = contrasts.shown(made.metric, main)
    virtual = all(any(row.get("virtual_seconds") for row in run.metrics) for some in runs.values() for run in some)
    for kind, across, caption in (*COSTS[:2], COSTS[2] if virtual else WALL):
        found = [contrasts.band(m, some, column, contrasts.COSTS[kind]) for m, some in runs.items()]
        bands = [b for b in found if b is not None and (kind != "bytes" or b.x[-1] > 0)]
        if bands:
            draw = partial(contrasts.curves_figure, bands, kind, looks, across, in_shares)
            alt = "; ".join(f"{b.method} ends at {words.told(b.mean[-1], unit)}" for b in bands)
            drawn[kind] = Picture(f"{setting}: {about(column).words} {caption}", alt, draw)
    return drawn


def _ranks_picture(made: Table, looks: Looks) -> Picture | None:
    if made.ranks is None:
        return None
    title = "Mean ranks over the settings, 1 is best"
    return Picture(title, ranked(made.ranks), partial(contrasts.ranks_figure, made.ranks, looks))


def _sends(run: Run) -> list[tuple[str, str, str, str]]:
    """(direction, function, field, size of one message) of training, the largest sums first."""
    from fedloom.report.page import DIRECTIONS, traffic

    return [
        (DIRECTIONS[t.direction], t.function, t.field, words.size(t.bytes / (t.messages or 1)))
        for t in traffic(run, run.metrics).get("train", [])
        if t.field != "envelope"
    ]


def keeps(kind: type) -> dict[str, list[str]]:
    """What a method's file stores between rounds: names in each client's state, and values at the server."""
    client: dict[str, None] = {}
    server: dict[str, None] = {}
    for base in kind.__mro__:
        for node in ast.walk(_source(base)):
            if not isinstance(getattr(node, "ctx", None), ast.Store):
                continue
            match node:
                case ast.Subscript(ast.Attribute(ast.Name("client"), "state"), ast.Constant(name)):
                    client[str(name)] = None
                case ast.Attribute(ast.Name("server"), name):
                    server[name] = None
    return {"client": list(client), "server": list(server)}


def assumes(kind: Any) -> list[str]:
    """What a method declares about the problem and the settings it is made for."""
    told = [f"needs {need}" for need in kind.needs] + ["needs one class a sample"] * kind.by_class
    told += ["needs a network with a head"] * kind.by_head
    told += [f"does not go with {setting}: {why}" for setting, why in kind.refuses.items()]
    told += ["one round only"] if kind.one_shot else []
    return told + ([] if kind.global_model else ["keeps no global model"])


def _source(kind: type) -> ast.Module:
    """The file of a method, parsed; nothing for what has none, and for the base of all methods."""
    try:
        path = Path(inspect.getfile(kind))
    except (OSError, TypeError):
        return ast.Module([], [])
    return ast.parse(path.read_text()) if path.is_file() and kind.__module__ != "fedloom.method" else ast.Module([], [])
