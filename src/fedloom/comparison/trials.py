"""The trials of tuning that ended: what each tried and what came out, and which one is chosen."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.comparison.layout import put, trials_file
from fedloom.comparison.reading import value_at
from fedloom.errors import RunError
from fedloom.quality import chooser_of
from fedloom.runs.reading import lines_of
from fedloom.runs.record import Run
from fedloom.runs.spec import plain

# Of a trial, which nobody asks for again.
HEAVY = ("model.safetensors", "ledger.jsonl", "clients.json", "clients.jsonl", "replies.jsonl", "chosen.json")


def finished_trials(out: Path, setting: str, method: str) -> list[dict[str, Any]]:
    """The trials that ended, in order."""
    return list(lines_of(trials_file(out, setting, method), having=("number",)))


def best_fields(out: Path, setting: str, method: str) -> dict[str, Any]:
    """The fields of the trial that validation finds best, the first of equals; empty without tuning.

    Raises RunError if there were trials and none succeeded.
    """
    trials = finished_trials(out, setting, method)
    good = [trial for trial in trials if score_of(trial) is not None]
    if trials and not good:
        raise RunError(f"none of {len(trials)} trials of tuning succeeded; the first: {trials[0]['error']}")
    best: dict[str, Any] = max(good, key=score_of)["fields"] if good else {}  # type: ignore[arg-type]
    return best


def score_of(trial: Mapping[str, Any]) -> float | None:
    """What a trial came to, larger where it is better; None where it has nothing to be judged by."""
    by = chooser_of(trial)
    value = trial[f"validation_{by.name}"]
    return None if value is None else by.score(value)


def record_trial(
    out: Path, setting: str, method: str, fields: Mapping[str, Any], run: Run | None, error: str | None
) -> None:
    """Writes down what the next trial came to, and lets go of what only a resumed trial would need."""
    trials = finished_trials(out, setting, method)
    rows = run.metrics if run is not None else trials
    column = f"validation_{chooser_of(rows).name}"
    line: dict[str, Any] = {"number": len(trials), "fields": plain(fields), column: None, "error": error}
    if run is not None:
        row, spec = run.selected, run.spec
        line |= {
            "fields": {name: plain(value_at(spec.method, name)) for name in fields},
            column: row[column],
            "round": row["round"],
            "seed": spec.seed,
            "seconds": sum(one["seconds"] for one in run.metrics),
        }
        if row[column] is None:
            line["error"] = "there are no validation data to judge it by"
        elif not math.isfinite(row[column]):
            line |= {column: None, "error": "the model's outputs are no finite numbers any more"}
    text = "".join(json.dumps(one) + "\n" for one in [*trials, line])
    put(trials_file(out, setting, method), text)
    if run is not None:
        shutil.rmtree(run.path / "checkpoint", ignore_errors=True)
        for name in HEAVY:
            (run.path / name).unlink(missing_ok=True)
