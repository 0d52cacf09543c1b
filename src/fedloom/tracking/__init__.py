"""Trackers: other programs that follow a run, each through three calls. None of them changes a number of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from fedloom.errors import UsageError, unknown
from fedloom.members import Registry

if TYPE_CHECKING:
    from fedloom.runs.record import Run
    from fedloom.runs.spec import Spec

PARTS = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}  # packages each is made of


class Tracker(Protocol):
    """One follower of a run. It is made with its folder, and with the rounds that a resumed run has behind it."""

    def begin(self, spec: Spec, manifest: Mapping[str, Any]) -> None:
        """The run starts, or goes on."""

    def row(self, metrics: Mapping[str, Any]) -> None:
        """A round has ended; `metrics` as in metrics.jsonl."""

    def end(self, status: str, paths: Iterable[Path]) -> None:
        """The run has come to `status`: finished, stopped or failed; `paths` are the files it made."""


def names(track: str | None) -> list[str]:
    """The trackers that a setting `track` asks for. Raises UsageError for an unknown one, or one not installed."""
    asked = [name.strip() for name in (track or "").split(",") if name.strip()]
    for name in asked:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
        if not all(importlib.util.find_spec(part) for part in PARTS.get(name, ())):
            raise UsageError(f"track={name} needs the extra: pip install 'fedloom[track]'")
    return list(dict.fromkeys(asked))


_OWN = {"tensorboard": "fedloom.tracking.tensorboard:Follower", "mlflow": "fedloom.tracking.mlflow:Follower"}
TRACKERS: Registry[Callable[[Path, int], Tracker]] = Registry("tracker", "fedloom.trackers", _OWN)


STOPS = (KeyboardInterrupt, GeneratorExit)  # whoever iterates over the rounds has seen enough


class Tracking:
    """All trackers of a run, around its rounds. `done`: rounds that stand already, which are not told again."""

    def __init__(self, run: Run, track: str | None, done: int) -> None:
        self.run, self.done = run, done
        self.trackers: list[Tracker] = []
        for name in names(track):
            self.trackers.append(TRACKERS[name](run.path / "track" / name, done))

    def __enter__(self) -> Tracking:
        if self.trackers:
            spec, manifest = self.run.spec, self.run.manifest
            for tracker in self.trackers:
                tracker.begin(spec, manifest)
        return self

    def row(self, metrics: Mapping[str, Any]) -> None:
        """To every tracker."""
        for tracker in self.trackers:
            tracker.row(metrics)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        status = "finished" if kind is None else "stopped" if issubclass(kind, STOPS) else "failed"
        files = [self.run.path / name for name in ("spec.yaml", "partition.json", "clients.json", "chosen.json")]
        for tracker in self.trackers:
            tracker.end(status, [file for file in files if file.exists()])


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a round."""
    found = {name: value for name, value in metrics.items() if isinstance(value, int | float) and name != "round"}
    return {name: float(value) for name, value in found.items() if abs(value) < float("inf")}


def settings(spec: Spec) -> dict[str, Any]:
    """Every setting of a run, flat: `method.lr`."""
    from dataclasses import asdict

    flat = asdict(spec)
    method = flat.pop("method")
    return {"method": method["name"]} | {f"method.{n}": v for n, v in method.items() if n != "name"} | flat
