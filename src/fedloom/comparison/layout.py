"""Where the files of a comparison lie, and how one is replaced. It imports nothing of what lies there."""

from __future__ import annotations

import re
from pathlib import Path

from fedloom.runs.writing import write_aside

SPEC = "comparison.yaml"  # of a comparison's folder; a run's has spec.yaml


def cell_folder(out: Path, setting: str, method: str, seed: int) -> Path:
    """The folder of a cell's run."""
    return out / "cells" / folder(setting) / folder(method) / f"seed-{seed}"


def error_file(path: Path) -> Path:
    """Where the error of the run in this folder is written: next to it, for there may be no folder."""
    return path.with_name(f"{path.name}.error.json")


def tuning_folder(out: Path, setting: str, method: str) -> Path:
    """The folder of a method's trials under a setting."""
    return out / "tuning" / folder(setting) / folder(method)


def trial_folder(out: Path, setting: str, method: str, number: int) -> Path:
    """The folder of one trial's run."""
    return tuning_folder(out, setting, method) / f"trial-{number:03}"


def trials_file(out: Path, setting: str, method: str) -> Path:
    """Where the trials that ended have a line each."""
    return tuning_folder(out, setting, method) / "trials.jsonl"


def put(path: Path, text: str) -> None:
    """Writes a file aside and renames it: it is the old one or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda file: file.write(text.encode()))


def folder(name: str) -> str:
    """A name as a folder's."""
    return re.sub(r"[^\w.=+,-]+", "-", name).strip("-.") or "_"
