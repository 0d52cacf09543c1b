"""The record of a run: what was asked and what came out, from the files of its folder."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.errors import TakenError, UsageError
from fedloom.fields import current_names
from fedloom.quality import evaluated
from fedloom.runs.choice import chosen
from fedloom.runs.learned import Learned
from fedloom.runs.outline import Outlined
from fedloom.runs.reading import understood
from fedloom.runs.writing import disk, remove

if TYPE_CHECKING:
    from fedloom.encoders.features import Features
    from fedloom.runs.spec import Spec


class Run(Learned, Outlined):
    """One experiment on disk: what was asked, what came out, and what is needed to go on.

    `metrics` is a list of one dict a round, `frame()` a table of them.

    Examples:
        >>> run = fedloom.run("fedavg", rounds=1, clients=4)
        >>> [row["round"] for row in run.metrics], run.manifest["status"]
        ([1], 'finished')
        >>> run.metrics[0]["up_bytes"] > 0
        True
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        if not (self.path / "spec.yaml").is_file():
            raise UsageError(f"{self.path} is not a run's folder: it has no spec.yaml")

    @staticmethod
    def create(out: str | Path | None, first: Mapping[str, str]) -> Run:
        """A new folder with its first files (name: text), there with all of them or not at all; None: temporary."""
        if out is None:
            folder = Path(tempfile.mkdtemp(prefix="fedloom-"))
            for name, text in first.items():
                (folder / name).write_text(text, encoding="utf-8")
            run = Run(folder)
            weakref.finalize(run, remove, folder, os.getpid())
            return run
        path = Path(out)
        Run.require_absent(path)
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            aside.mkdir()
            try:
                for name, text in first.items():
                    (aside / name).write_text(text, encoding="utf-8")
                aside.rename(path)
            except BaseException as failure:
                shutil.rmtree(aside, ignore_errors=True)
                if isinstance(failure, OSError) and failure.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise _taken(path) from None  # another run was quicker
                raise
        run = Run(path)
        run.loose.update(first)
        return run

    @staticmethod
    def require_absent(out: str | Path | None) -> None:
        """Raises UsageError if `out` is there already."""
        if out is None:
            return
        with disk(Path(out)):
            there = os.path.lexists(out) or Path(out).exists()  # which tells of a name that no file may have
        if there:
            raise _taken(out)

    @property
    def spec(self) -> Spec:
        """Everything resolved: it alone repeats the run."""
        from fedloom.runs.spec import Spec

        return Spec.read(self.path / "spec.yaml")

    @property
    def manifest(self) -> dict[str, Any]:
        """Versions, hardware, seed, status, and the privacy statement of the verbs used."""
        return current_names(self.read_json("manifest.json"))

    @property
    def partition(self) -> dict[str, Any]:
        """What each client got."""
        return self.read_json("partition.json")

    @property
    def clients(self) -> dict[str, Any]:
        """The last evaluation, client by client."""
        return self.read_json("clients.json")

    @property
    def chosen_clients(self) -> dict[str, Any]:
        """The evaluation that `selected` is of, client by client; empty where no file kept it."""
        for found in (self.read_json("chosen.json"), self.clients):
            if found and found["round"] == self.selected["round"]:
                return found
        return {}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict a round."""
        return list(self.lines("metrics.jsonl"))

    @property
    def ledger(self) -> Iterator[dict[str, Any]]:
        """The payload bytes, a line at a time: round, kind, verb, direction, function, field, bytes, clients."""
        return self.lines("ledger.jsonl")

    @property
    def final(self) -> dict[str, Any]:
        """The last evaluated round."""
        found = [row for row in self.metrics if evaluated(row)]
        if not found:
            raise UsageError(f"{self.path} has no evaluated round yet")
        return found[-1]

    @property
    def selected(self) -> dict[str, Any]:
        """The evaluated round that the validation data choose (the last one if there are none): the honest result.

        Where the problem changes with time, it is chosen among the rounds that were judged on what the last one was.
        """
        return chosen(self.metrics) or self.final

    @property
    def encoder(self) -> Features | None:
        """What makes features, as the model takes them, of raw inputs (images in [0, 1], texts); None: it takes these.

        Raises UsageError where the encoder is another one by now than in the run.
        """
        from fedloom.encoders.features import Features

        with understood(self.path):
            stored = self.read_json("encoder.json")
            return Features.restored(stored) if stored else None

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"


def _taken(out: str | Path) -> TakenError:
    return TakenError(f"{out} exists; choose another --out, or go on with it: fedloom resume {out}")
