"""The report's facts, gathered from a run's files, and the page they stand on."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from fedloom.comparison.measures import qualities_in
from fedloom.quality import Quality, chooser_of, evaluated, in_column, main_of, named
from fedloom.report import html, words
from fedloom.report.clients import ranked
from fedloom.report.participants import Participant, participants, turned_away, verdict
from fedloom.report.pictures import pictures
from fedloom.report.style import COLOURS
from fedloom.runs.confusion import kept
from fedloom.runs.continual import continual
from fedloom.runs.reading import damaged

if TYPE_CHECKING:
    from fedloom.runs.record import Run

KINDS = {
    "train": "Training",
    "setup": "Setup, once",
    "finish": "After the last round, once",
    "evaluate": "Evaluation, not counted above",
}
DIRECTIONS = {"down": "server → client", "up": "client → server", "peer": "client → client"}
FEW = 5  # test rows below which a client's measure says little
NOTES = 12  # notes of rounds, at most, that are written out
WHERE_THERE = ("newcomer_test_", "worst_client_", "validation_")  # of which a page says nothing where there are none
APART = ("timeline", "partition")  # pictures that stand by themselves
SHOWN_CLIENTS = 200  # rows, at most, of the table of who was flagged
SHOWN_ROUNDS = 1000  # rows, at most, of the table of rounds


@dataclass
class Traffic:
    """What one field of one message added up to: `bytes` over `messages`."""

    kind: str
    direction: str
    function: str
    field: str
    messages: int = 0
    bytes: int = 0
    rounds: int = 1  # over which it was spread


def render(run: Run) -> str:
    """The whole page, self-contained: no script, nothing to load, and everything from files and data escaped."""
    return html.page("page.html.j2", _facts(run), _cell)


def _facts(run: Run) -> dict[str, Any]:
    spec, manifest, metrics, partition = asdict(run.spec), run.manifest, run.metrics, run.partition
    method = spec.pop("method")
    results, qualities = _results(run, metrics), qualities_in(metrics)
    judged = (run.chosen_clients if results else {}) or run.clients  # of the round of the headline
    main, drawn, everybody = qualities[0], pictures(run), participants(run)
    return {
        "name": words.brief(method.pop("name")),
        "data": words.brief(spec["data"]),
        "network": network(run),
        "fields": method,
        "spec": spec,
        "manifest": manifest,
        "version": manifest.get("fedloom", ""),
        "status": manifest.get("status", "unknown"),
        "done": metrics[-1]["round"] if metrics else 0,
        "machine": _machine(run, manifest),
        "partition": partition,
        "held": _held(partition),
        "warnings": _warnings(run, metrics),
        "measures": _measures(results, qualities),
        "main": main,
        "baseline": words.baseline(partition),
        "unit_of": unit_of,
        "told": words.told,
        "results": results,
        "drawn": [picture for name, picture in drawn.items() if name not in APART],
        "timeline": drawn.get("timeline"),
        "by_class": by_class(run),
        "turned_away": turned_away(everybody)[:SHOWN_CLIENTS],
        "verdict": verdict(everybody),
        "stream": words.kept(continual(run)),
        "judged_round": judged.get("round"),
        "judged": "clients" in drawn,
        "dealt": drawn.get("partition"),
        "clients": _clients_table(partition, judged, main),
        "totals": _totals(metrics),
        "traffic": traffic(run, metrics),
        "members": _members(manifest, everybody),
        "kinds": KINDS,
        "directions": DIRECTIONS,
        "privacy": words.privacy_statement(manifest),
        "columns": list(dict.fromkeys(name for row in metrics for name in row)),
        "rows": metrics[:: max(1, math.ceil(len(metrics) / SHOWN_ROUNDS))],
        "rounds": len(metrics),
        "colours": COLOURS,
    }


def _results(run: Run, metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """The result first (the round that the validation data chose), then the last round; never the best test."""
    if not any(map(evaluated, metrics)):
        return []
    selected, final = run.selected, run.final
    if selected.get(f"validation_{chooser_of(metrics).name}") is None:
        return [("the last: there are no validation data to choose by", final)]
    if selected["round"] == final["round"]:
        return [(f"{words.how_chosen(final)}, and the last", final)]
    return [(words.how_chosen(selected), selected), ("the last", final)]


def said_of(qualities: Sequence[Quality]) -> dict[str, str]:
    """The measures of a run in words, those of the main one first and last."""
    found = {}
    main, *others = (one.name for one in qualities)
    said = {one.name: one.words for one in qualities}
    alone = {one.name for one in qualities if one.pooled == "alone"}
    for name in (main, *others):
        found[f"global_test_{name}"] = f"Global model, test {said[name]}"
    found |= {"global_test_loss": "Global model, test loss", f"personal_test_{main}": f"Personal test {said[main]}"}
    found |= {f"personal_test_{name}": f"Personal test {said[name]}" for name in others if name not in alone}
    return found | {
        f"newcomer_test_{main}": f"Newcomers, test {said[main]}",
        **{f"worst_client_{name}": f"Worst client, test {said[name]}" for name in (main, *others)},
        **{f"validation_{name}": f"Validation {said[name]}" for name in (main, *others)},
        "validation_loss": "Validation loss",
    }


def unit_of(column: str) -> str:
    """The unit of a column of the record: that of the measure that it ends in."""
    plain = column.partition("@")[0].removesuffix("_std")
    return named(in_column(plain)).unit


def _measures(results: Sequence[tuple[str, Mapping[str, Any]]], qualities: Sequence[Quality]) -> dict[str, str]:
    """The measures of results in words, each with those of single judged models and tests behind it."""
    measures = said_of(qualities)
    return {
        name: words.named(name, measures[plain])
        for plain in measures
        for name in (plain, *words.single(plain, [row for _, row in results]))
        if not plain.startswith(WHERE_THERE) or any(plain in row for _, row in results)
    }


def _warnings(run: Run, metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know before believing a number."""
    spec, status = run.spec, run.manifest.get("status")
    done = f"{metrics[-1]['round'] if metrics else 0} of {words.counted(spec.rounds, 'round')}"
    again = "task" if spec.partition == "given" else "data"
    on = f"fedloom.resume({str(run.path)!r}, {again})" if spec.in_python else None
    on = on or f"fedloom resume {shlex.quote(str(run.path))}"
    found = []
    if status == "finished":
        if metrics and metrics[-1]["round"] < spec.rounds:
            why = run.manifest.get("stopped_because", f"max_seconds={spec.max_seconds} is spent")
            found.append(f"Ended after {done}: {why}.")
    elif status == "running":
        found.append(f"Not finished: {done}. It is running, or was killed; then go on with: {on}")
    else:
        found.append(f"Not finished: it {status} after {done}. Go on with: {on}")
    silent = sum(0 < row["replies"] < row["cohort"] for row in metrics)  # none at all: no call, or there is a note
    overlapping = any(told["verb"] == "submit" for told in run.manifest.get("privacy", ()))  # a round has who came
    if silent and not overlapping:
        found.append(
            f"In {silent} of {words.counted(len(metrics), 'round')} fewer replies arrived than clients were asked."
        )
    found += words.apart(run.partition, run.manifest)
    if any(map(evaluated, metrics)):
        found += words.left_out(run.selected) + _few(run, main_of(metrics))
    broken = [row["round"] for row in metrics if not math.isfinite(row.get("train_loss") or 0.0)]
    if broken:
        times = words.counted(len(broken), "round")
        found.append(f"The training loss is no finite number in {times}, first in round {broken[0]}.")
    notes = [f"Round {row['round']}: {row['note']}." for row in metrics if row.get("note")]
    found += notes[:NOTES]
    if len(notes) > NOTES:
        found.append(f"{len(notes) - NOTES} more notes stand in metrics.jsonl.")
    return found


def _machine(run: Run, manifest: Mapping[str, Any]) -> list[tuple[str, Any]]:
    cpu, parameters, encoder = manifest.get("cpu", {}), _parameters(run), manifest.get("encoder")
    known = {
        "started": manifest.get("started", "").replace("T", " ").replace("+00:00", " UTC") or None,
        "fedloom": manifest.get("fedloom"),
        "python": manifest.get("python"),
        "torch": manifest.get("torch"),
        "numpy": manifest.get("numpy"),
        "platform": manifest.get("platform"),
        "processor": f"{cpu['name']}, {cpu['cores']} cores" if cpu else None,
        "device": manifest.get("device"),
        "encoder": encoder and f"{encoder['name']}, {encoder['features']} features, digest {encoder['digest']}",
        "numbers in the model": f"{parameters:,}" if parameters is not None else None,
    }
    return [(name, value) for name, value in known.items() if value is not None]


def _members(manifest: Mapping[str, Any], everybody: Sequence[Participant]) -> list[dict[str, Any]]:
    """Of a run between machines, who took part: in how many rounds a reply came, and the bytes that passed."""
    heard = {one.client: one.replied for one in everybody}
    return [{**member, "rounds": heard.get(member["number"], 0)} for member in manifest.get("network", ())]


def network(run: Run) -> str:
    """What a run's network is called; that of a task given in Python by its size; nothing where there is none."""
    if run.spec.model:
        return words.brief(str(run.spec.model))
    size = _parameters(run)
    return "" if size is None else f"a network of {words.counted(size, 'number')}"


def _parameters(run: Run) -> int | None:
    """How many numbers the trained model is."""
    from safetensors import SafetensorError, safe_open

    path = run.path / "model.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise damaged(path, error) from error


def _held(partition: Mapping[str, Any]) -> dict[str, str]:
    """What the clients hold, in a few numbers."""
    clients = partition.get("clients", [])
    if not clients:
        return {}
    held = {}
    for split in ("train", "validation", "test"):
        rows = [client[split] for client in clients]
        held[split] = f"{sum(rows):,} (median {median(rows):,.0f}, from {min(rows):,} to {max(rows):,} a client)"
    return held


def _few(run: Run, main: Quality) -> list[str]:
    """Where the worst client has so few test rows that its measure says little, how many it has."""
    judged = [client for client in run.chosen_clients.get("clients", ()) if main.name in client]
    if not judged or (worst := ranked(judged, main)[0])["n"] >= FEW:
        return []
    rows = words.counted(worst["n"], "test row")
    return [f"The worst client ({worst['id']}) has {rows} only: its {main.words} says little of how it is served."]


def by_class(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """Whose they are, and recall, precision, F1 and support of each class: of the models that a run has ended with."""
    whose = {"global": "the global model, on the global test", "personal": "clients' models, on their own test rows"}
    return [(said, found.per_class()) for name, said in whose.items() if (found := kept(run, name))]


def _clients_table(partition: Mapping[str, Any], judged: Mapping[str, Any], main: Quality) -> dict[str, list[Any]]:
    """Columns with a cell for every client that the partition or the last evaluation names; empty columns left out."""
    described = {client["id"]: client for client in partition.get("clients", [])}
    values = {client["id"]: client[main.name] for client in judged.get("clients", []) if main.name in client}
    ids = sorted(described.keys() | values.keys())
    columns: dict[str, list[Any]] = {"client": ids}
    for name in ("name", "note", "train", "validation", "test"):
        column = [described.get(id, {}).get(name, "") for id in ids]
        if any(str(cell) not in ("", str(id)) for cell, id in zip(column, ids, strict=True)):
            columns[name] = column
    if values:
        columns[f"test {main.words}"] = [words.told(values.get(id), main.unit) for id in ids]
    return columns


def _totals(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = ("seconds", "eval_seconds", "gradient_steps", "up_bytes", "down_bytes", "peer_bytes", "labels")
    return {name: sum(row.get(name, 0) for row in metrics) for name in names}


def traffic(run: Run, metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[Traffic]]:
    """The ledger by kind, each with its largest sums first. It is read a line at a time: it can be larger than memory.

    A kill may leave lines of a round that has no metrics; such a round will be repeated and is not counted.
    """
    spread = {"train": len(metrics), "evaluate": sum(map(evaluated, metrics))}
    last = metrics[-1]["round"] if metrics else -1
    sums: dict[tuple[str, str, str, str], Traffic] = {}
    for line in run.ledger:
        if line["round"] > last:
            continue
        key = (line["kind"], line["direction"], line["function"], line["field"])
        traffic = sums.setdefault(key, Traffic(*key, rounds=max(1, spread.get(line["kind"], 1))))
        messages = len(line.get("clients") or line.get("edges") or ())
        traffic.messages += messages
        traffic.bytes += messages * line["bytes"]
    kinds = defaultdict(list)
    for traffic in sorted(sums.values(), key=lambda traffic: -traffic.bytes):
        kinds[traffic.kind].append(traffic)
    return {kind: kinds[kind] for kind in KINDS if kind in kinds}


def _cell(value: Any) -> str:
    """A number of a table, short; the files have every digit."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
