"""An experiment and its record: begun in a new folder, or taken up where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from fedloom import inputs
from fedloom._version import __version__
from fedloom.boundary.registration import shipped
from fedloom.data.given import Given, require_same
from fedloom.encoders.features import Features
from fedloom.encoders.features import require_same as require_same_encoder
from fedloom.engines.base import Engine
from fedloom.errors import UsageError
from fedloom.method import Method
from fedloom.plugin import Plugin
from fedloom.runs.checkpoint import Checkpoints
from fedloom.runs.ending import Ending
from fedloom.runs.keeping import Kept
from fedloom.runs.manifest import manifest
from fedloom.runs.parts import Parts
from fedloom.runs.personal import ELSEWHERE, personalises
from fedloom.runs.record import Run
from fedloom.runs.spec import FREE, Spec
from fedloom.runs.states import States
from fedloom.task import Task
from fedloom.tracking import names


class Recorded(Parts):
    """The parts of a run and its record; `done` is how many rounds are over."""

    def __init__(
        self,
        spec: Spec,
        task: Task | Given | None = None,
        method: Method | None = None,
        engine: Engine | None = None,
    ) -> None:
        names(spec.track)  # told before the data are read
        super().__init__(spec, task, method, engine)
        self.done = 0
        self.kept = Kept(self)
        self.time = 0.0  # by the world's clock, when the last round was over
        self.given = task

    def begin(self, out: str | Path | None, also: Mapping[str, str] | None = None) -> Self:
        """A new record; `also` are more files (name: text) that it has from the first moment."""
        self.manifest = manifest(self.spec, out) | ({"engine": self.why} if self.why else {})
        self.manifest["inputs"] = inputs.digests(self.spec)
        if sizes := shipped(self.site):
            self.manifest["shared_data"] = {"samples": len(self.server.shared_data), "bytes": sum(sizes.values())}
        if personalises(self.method) and not self.engine.keeps_states:
            self.manifest["personal"] = f"{ELSEWHERE[0].upper()}{ELSEWHERE[1:]}."
        if self.missed:
            self.manifest["notes"] = list(self.missed)
        encoder = self.task.encoder if isinstance(self.task.encoder, Features) else None
        self.manifest |= {"encoder": encoder.describe()} if encoder else {}
        first = {
            "spec.yaml": self.spec.text(__version__),
            "manifest.json": json.dumps(self.manifest, indent=1) + "\n",
            "partition.json": json.dumps(self.task.describe()) + "\n",
        } | ({"encoder.json": json.dumps(encoder.stored()) + "\n"} if encoder else {})
        self.temporary = out is None
        self.record = Run.create(out, first | dict(also or {}))
        self.record.given = self.given
        self.states = States(self.record.path, self.site.device)
        return self

    def take_up(self, record: Run, told: Sequence[str] = ()) -> Self:
        """The record of a run that stopped, and the state of its last checkpoint; `told` goes into the manifest.

        Its rounds may be more than they were. Raises UsageError where the run would not be what it had been with them.
        """
        self.record, self.temporary = record, False
        self.record.given = self.given
        self.states = States(record.path, self.site.device)
        self.manifest = record.manifest | {"status": "running"}
        self.manifest.pop("stopped_because", None)
        if "encoder" in self.manifest:
            require_same_encoder(self.task.describe().get("encoder"), self.manifest["encoder"])
        if "data" in record.partition:
            require_same(self.task.describe().get("data"), record.partition["data"], self.spec.data)
        before = record.spec.rounds
        if before != self.spec.rounds and self.by_rounds:
            raise UsageError(
                f"{record.path} was planned for rounds={before}, by which {self.by_rounds} goes: with "
                f"rounds={self.spec.rounds} its first rounds had been others; begin another run"
            )
        self.done = self.checkpoints().load()
        self.time = self.boundary.clock.now
        if self.spec.rounds < self.done and before != self.spec.rounds:
            raise UsageError(f"{record.path} has {self.done} rounds; it can go on to more, not to {self.spec.rounds}")
        ended = self.done > 0 and (record.manifest.get("status") == "finished" or before <= self.done)
        rows = [row for row in record.metrics if row["round"] <= self.done]
        if self.finishes and ended and self.done < self.spec.rounds and not Ending(self, rows).why():
            raise UsageError(
                f"{record.path} is over, and {self.method.name()} has done what it does after the last round: in a "
                f"longer run it had gone on from before that; begin another run, with rounds={self.spec.rounds}"
            )
        for name in ("metrics.jsonl", "ledger.jsonl", "events.jsonl", "clients.jsonl", "replies.jsonl"):
            record.truncate_after(name, self.done or -1)
        if before != self.spec.rounds:
            told = [*told, f"the run goes on to {self.spec.rounds} rounds in place of {before}"]
            text = self.spec.text(__version__).encode()
            record.write("spec.yaml", lambda file: file.write(text))
        if told:
            before_it = self.manifest.get("notes", [])
            self.manifest["notes"] = [*before_it, *(f"after round {self.done}: {line}" for line in told)]
            self.manifest["inputs"] = inputs.digests(self.spec)
        return self

    def checkpoints(self) -> Checkpoints:
        free = FREE - {"rounds"} if self.by_rounds else FREE
        return Checkpoints(self.record, self.spec, [self.server, self.states, self.boundary, self.kept], free)

    @property
    def by_rounds(self) -> str | None:
        """What of it depends on how many rounds there are, from the first of them on."""
        if self.method.scheduled:
            return self.method.name()
        if self.schedule is not None and self.schedule.by_rounds:
            return f"schedule={self.spec.schedule}"
        found = next((stage.setting for stage in self.pipeline.stages if stage.by_rounds), None)
        return found and f"{found}={getattr(self.spec, found)}"

    @property
    def finishes(self) -> bool:
        """Whether the method does something after the last round."""
        return any(type(one).finish not in (Method.finish, Plugin.finish) for one in self.method.nested)

    def save(self, checkpoints: Checkpoints) -> None:
        if not self.temporary:
            self.write_manifest("running")
            self.engine.saving(self.done)
            checkpoints.save(self.done)
            self.engine.saved(self.done, self.boundary.pending.outcomes())

    def end(self) -> None:
        """After the last round: the model, and what the manifest says of it."""
        # What is gone with its process need not outlive a loss of power.
        self.kept.write(self.record, self.done, durable=not self.temporary)
        if self.method.global_model and not self.spec.blind:
            self.manifest |= self.pipeline.collect("final_manifest", self.boundary.books, self.server)

    def write_manifest(self, status: str) -> None:
        self.manifest |= {"status": status, "privacy": list(self.boundary.books.verbs.values())}
        self.manifest |= self.pipeline.collect("manifest", self.boundary.books)
        self.manifest |= self.engine.manifest()
        self.record.write_json("manifest.json", self.manifest)
