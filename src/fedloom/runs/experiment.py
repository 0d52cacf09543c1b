"""One experiment: from a spec to a trained model and a record."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom import inputs
from fedloom._version import __version__
from fedloom.boundary.registration import shipped
from fedloom.data.given import Given, require_same
from fedloom.determinism import reproducible
from fedloom.encoders.features import Features
from fedloom.encoders.features import require_same as require_same_encoder
from fedloom.method import Method
from fedloom.runs.budget import Spent
from fedloom.runs.checkpoint import Checkpoints
from fedloom.runs.choice import chosen
from fedloom.runs.evaluation import evaluate
from fedloom.runs.keeping import Kept
from fedloom.runs.manifest import manifest
from fedloom.runs.parts import Parts
from fedloom.runs.record import Run
from fedloom.runs.spec import FREE, Spec
from fedloom.runs.states import States
from fedloom.runs.steps import once, train
from fedloom.task import Task
from fedloom.tracking import Tracking, names

OnRound = Callable[[Mapping[str, Any]], object]


class Experiment(Parts):
    """The parts of a run, its record, and the loop over its rounds."""

    def __init__(self, spec: Spec, task: Task | Given | None = None, method: Method | None = None) -> None:
        names(spec.track)  # told before the data are read
        super().__init__(spec, task, method)
        self.has_oracle = self.task.pool(0) is not None
        self.done = 0
        self.best: dict[str, Any] | None = None  # the row that validation would choose so far
        self.kept = Kept(self)
        self.time = 0.0  # by the world's clock, when the last round was over

    def begin(self, out: str | Path | None) -> Experiment:
        """A new record."""
        self.manifest = manifest(self.spec, out) | ({"engine": self.why} if self.why else {})
        self.manifest["inputs"] = inputs.digests(self.spec)
        if sizes := shipped(self.site):
            self.manifest["shared_data"] = {"samples": len(self.server.shared_data), "bytes": sum(sizes.values())}
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
        self.record = Run.create(out, first)
        self.states = States(self.record.path, self.site.device)
        return self

    def take_up(self, record: Run, told: Sequence[str] = ()) -> Experiment:
        """The record of a run that stopped, and the state of its last checkpoint; `told` goes into the manifest."""
        self.record, self.temporary = record, False
        self.states = States(record.path, self.site.device)
        self.manifest = record.manifest | {"status": "running"}
        self.manifest.pop("stopped_because", None)
        if "encoder" in self.manifest:
            require_same_encoder(self.task.describe().get("encoder"), self.manifest["encoder"])
        if "data" in record.partition:
            require_same(self.task.describe().get("data"), record.partition["data"], self.spec.data)
        self.done = self._checkpoints.load()
        self.time = self.boundary.clock.now
        for name in ("metrics.jsonl", "ledger.jsonl", "events.jsonl", "clients.jsonl"):
            record.truncate_after(name, self.done or -1)
        if told:
            before = self.manifest.get("notes", [])
            self.manifest["notes"] = [*before, *(f"after round {self.done}: {line}" for line in told)]
            self.manifest["inputs"] = inputs.digests(self.spec)
        return self

    def go(self, on_round: OnRound | None = None) -> Run:
        """The rounds that are left; then the model."""
        status = "failed"
        try:
            tracked = Tracking(self.record, self.spec.track, self.done)
            with reproducible(self.spec.device, self.spec.threads), tracked as tracking:
                spent, checkpoints = self._opened(), self._checkpoints
                last = self.done >= self.spec.rounds or (self.done > 0 and self._stop(spent))
                while not last:
                    began = time.perf_counter()
                    if self.done:
                        self.boundary.clock.now = self.time  # the wall's stood still while the server measured
                    row, last = self._closed(train(self, self.states, self.done + 1), began, spent)
                    if not self.temporary and checkpoints.due(last):
                        self._write_manifest("running")
                        checkpoints.save(self.done)
                    tracking.row(row)
                    if on_round:
                        on_round(row)
                self._end()
            status = "finished"
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            self.engine.stop()
            self.record.close()
            self._write_manifest(status)
        return self.record

    @property
    def _checkpoints(self) -> Checkpoints:
        planned = self.method.scheduled or (self.schedule is not None and self.schedule.by_rounds)
        free = FREE - {"rounds"} if planned else FREE
        return Checkpoints(self.record, self.spec, [self.server, self.states, self.boundary, self.kept], free)

    def _opened(self) -> Spent:
        """Before the first round, or after a resumption; what the rounds before it have cost."""
        self.engine.start(self.method, self.site, self.states)
        if self.done == 0:
            self.boundary.clock.now = self.time = 0.0  # what `setup` takes is in the first round's time
            self.boundary.register()
            once(self, "setup", 0, self.method_in(0).setup)
        spent = Spent(self.spec)
        for row in self.record.metrics:
            spent.add(row)
        self.best = chosen(self.record.metrics)
        return spent

    def _closed(self, row: dict[str, Any], began: float, spent: Spent) -> tuple[dict[str, Any], bool]:
        """The whole row of a round that has trained, recorded, and whether it is the last; that has a `finish`."""
        round, books = self.done + 1, self.boundary.books
        row = {"round": round, "seconds": 0.0, "virtual_seconds": 0.0} | row | self._took(began)
        spent.add(row | books.ledger.totals)
        last = round == self.spec.rounds or self._stop(spent)
        if last:
            once(self, "finish", round, self.method_in(round).finish)
            row |= self._took(began)
        self.time = self.boundary.clock.now
        if last or round % self.spec.eval_every == 0:
            began = time.perf_counter()
            row |= self._judged(round, last)
            row["eval_seconds"] = time.perf_counter() - began
        if self.has_oracle:
            row["labels"], books.labels = books.labels, 0
        lines, totals = books.ledger.close()
        self.record.append("ledger.jsonl", lines)
        if events := books.timeline.close(round):
            self.record.append("events.jsonl", events)
        self.record.append("metrics.jsonl", [row | totals])
        self.done = round
        return row | totals, last

    def _took(self, began: float) -> dict[str, float]:
        """The seconds of a round, without the digits that a difference of two large numbers makes up."""
        virtual = round(self.boundary.clock.now - self.time, 9)
        return {"seconds": time.perf_counter() - began, "virtual_seconds": virtual}

    def _judged(self, round: int, last: bool) -> dict[str, Any]:
        """The measures of a round; those of each client go into files."""
        row, each, subject = evaluate(self, round)
        judged_clients = {"round": round, **each}
        named = dict.fromkeys(name for client in each["clients"] for name in client)
        columns = {name: [client.get(name) for client in each["clients"]] for name in named}
        self.record.append("clients.jsonl", [{"round": round} | columns])
        self.record.write_json("clients.json", judged_clients)
        if chosen([self.best or row, row]) is row:
            self.best = row
            self.record.write_json("chosen.json", judged_clients)
            self.kept.judged("chosen", round, subject)
        if last:
            self.kept.judged("last", round, subject)
        return row

    def _stop(self, spent: Spent) -> bool:
        """Whether training ends before its last round; the manifest says why."""
        why = spent.over() or self.pipeline.stop_reason(self.boundary.books) or self.deserted
        if why:
            self.manifest["stopped_because"] = why
        return why is not None

    def _end(self) -> None:
        """After the last round: the model, and what the manifest says of it."""
        if not self.spec.blind:
            # What is gone with its process need not outlive a loss of power.
            self.kept.write(self.record, self.done, durable=not self.temporary)
        if self.method.global_model and not self.spec.blind:
            self.manifest |= self.pipeline.collect("final_manifest", self.boundary.books, self.server)

    def _write_manifest(self, status: str) -> None:
        self.manifest |= {"status": status, "privacy": list(self.boundary.books.verbs.values())}
        self.manifest |= self.pipeline.collect("manifest", self.boundary.books)
        self.record.write_json("manifest.json", self.manifest)
