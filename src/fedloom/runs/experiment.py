"""One experiment: from a spec to a trained model and a record."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

from fedloom.determinism import reproducible
from fedloom.errors import UsageError
from fedloom.quality import evaluated
from fedloom.report.words import counted
from fedloom.runs.checkpoint import Checkpoints
from fedloom.runs.choice import chosen
from fedloom.runs.ending import Ending
from fedloom.runs.evaluation import evaluate
from fedloom.runs.record import Run
from fedloom.runs.recorded import Recorded
from fedloom.runs.steps import once, train
from fedloom.runs.telling import Telling
from fedloom.tracking import Tracking

log = logging.getLogger("fedloom.runs")

# Told each round's row when it is over; the run ends with that round where it answers "stop".
OnRound = Callable[[Mapping[str, Any]], object]
STOP = "stop"


class Experiment(Recorded):
    """The parts of a run, its record, and the loop over its rounds."""

    latest: Any = None  # what was judged last
    best: dict[str, Any] | None = None  # the row that validation would choose so far

    @cached_property
    def has_oracle(self) -> bool:
        """Whether labels can be asked for: looked at once."""
        return self.task.has_oracle

    def go(self, on_round: OnRound | None = None) -> Run:
        """The rounds that are left; then the model."""
        for _ in self.rounds(on_round):
            pass
        return self.record

    def rounds(self, on_round: OnRound | None = None) -> Iterator[dict[str, Any]]:
        """The rounds that are left, by their rows, each when it is over; then the model.

        Whoever iterates has PyTorch's settings as they were. Where the iterator is closed before its end, the run is
        stopped, and its checkpoint is of the last of these rounds.
        """
        status = "failed"
        try:
            with Tracking(self.record, self.spec.track, self.done) as tracking:
                with self._settled():
                    ending, checkpoints = self._opened(), self.checkpoints()
                    telling = self._tell_begin()
                    last = self.done >= self.spec.rounds or (self.done > 0 and self._stop(ending.why()))
                while not last:
                    with self._settled():
                        began = time.perf_counter()
                        if self.done:
                            self.boundary.clock.now = self.time  # the wall's stood still while the server measured
                        row, last = self._closed(train(self, self.states, self.done + 1), began, ending)
                        if (stale := ending.judge(row)) and not last:
                            row, last = self._cut_short(row, stale), True
                        if checkpoints.due(last) and not self.temporary:
                            self.save(checkpoints)
                        tracking.row(row)
                        if on_round and _said_stop(on_round(row)) and not last:
                            row, last = self._cut_short(row, "on_round said stop"), True
                            self.save(checkpoints)
                    self._tell(telling, row)
                    yield from self._shown(row, checkpoints)
                with self._settled():
                    self.end()
            status = "finished"
        except (KeyboardInterrupt, GeneratorExit):
            status = "stopped"
            raise
        finally:
            self.engine.stop()
            self.record.close()
            self.write_manifest(status)
            log.info("%s after round %d of %d: %s", status, self.done, self.spec.rounds, self.record.path)

    def _tell_begin(self) -> Telling:
        """Logs what is run, and gives what puts its rounds into words."""
        spec = self.spec
        log.info(
            "%s on %s, %s, seed %d, from round %d of %d: %s",
            *(self.method.name(), spec.data, counted(self.task.population, "client"), spec.seed),
            *(self.done + 1, spec.rounds, self.record.path),
        )
        for line in self.manifest.get("notes", ()):
            log.info("%s", line)
        return Telling(spec.rounds, self.record.metrics if log.isEnabledFor(logging.INFO) else ())

    @staticmethod
    def _tell(telling: Telling, row: Mapping[str, Any]) -> None:
        """Logs a round: in words, and every number of it where more is asked for."""
        if log.isEnabledFor(logging.INFO):
            log.info("%s%s", telling.line(row), f": {row['note']}" if row.get("note") else "")
            log.debug("round %d: %s", row["round"], json.dumps(row))

    def _settled(self) -> AbstractContextManager[None]:
        return reproducible(self.spec.device, self.spec.threads)

    def _shown(self, row: dict[str, Any], checkpoints: Checkpoints) -> Iterator[dict[str, Any]]:
        """The row, to whoever iterates; where that ends here, the state is kept."""
        try:
            yield row
        except GeneratorExit:
            self.save(checkpoints)
            raise

    def _opened(self) -> Ending:
        """Before the first round, or after a resumption; what knows of the rounds before it when the run is over."""
        self.engine.start(self.method, self.site, self.states)
        if self.done == 0:
            self.boundary.clock.now = self.time = 0.0  # what `setup` takes is in the first round's time
            self.boundary.register()
            once(self, "setup", 0, self.method_in(0).setup)
        self.best = chosen(self.record.metrics)
        return Ending(self, self.record.metrics)

    def _closed(self, row: dict[str, Any], began: float, ending: Ending) -> tuple[dict[str, Any], bool]:
        """The whole row of a round that has trained, recorded, and whether it is the last; that has a `finish`."""
        round, books = self.done + 1, self.boundary.books
        row = {"round": round, "seconds": 0.0, "virtual_seconds": 0.0} | row | self._took(began)
        ending.spent.add(row | books.ledger.totals)
        last = round == self.spec.rounds or self._stop(ending.why())
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
        if self.whose:
            self.record.append("replies.jsonl", [self.whose])
        self.record.append("metrics.jsonl", [row | totals])
        self.done = round
        return row | totals, last

    def _took(self, began: float) -> dict[str, float]:
        """The seconds of a round, without the digits that a difference of two large numbers makes up."""
        virtual = round(self.boundary.clock.now - self.time, 9)
        return {"seconds": time.perf_counter() - began, "virtual_seconds": virtual}

    def _judged(self, round: int, last: bool) -> dict[str, Any]:
        """The measures of a round; those of each client go into files."""
        row, each, self.latest = evaluate(self, round)
        judged_clients = {"round": round, **each}
        named = dict.fromkeys(name for client in each["clients"] for name in client)
        columns = {name: [client.get(name) for client in each["clients"]] for name in named}
        self.record.append("clients.jsonl", [{"round": round} | columns])
        self.record.write_json("clients.json", judged_clients)
        better = chosen([self.best or row, row]) is row
        if better:
            self.best = row
            self.record.write_json("chosen.json", judged_clients)
        if better or last:
            self.kept.judged(["chosen"] * better + ["last"] * last, round, self.latest)
        return row

    def _cut_short(self, row: dict[str, Any], why: str) -> dict[str, Any]:
        """Makes a round the last that was not known to be, with what the last one has: `finish`, and an evaluation."""
        self.manifest["stopped_because"] = why
        round, ledger = self.done, self.boundary.books.ledger
        if not self.finishes and evaluated(row):
            self.kept.judged(["last"], round, self.latest)
            return row
        began, self.boundary.clock.now = time.perf_counter(), self.time
        once(self, "finish", round, self.method_in(round).finish)
        took = self._took(began)
        self.time = self.boundary.clock.now
        began = time.perf_counter()
        self.record.truncate_after("clients.jsonl", round - 1)
        row = row | self._judged(round, last=True)
        took["eval_seconds"] = time.perf_counter() - began
        lines, totals = ledger.close()
        row |= {name: row.get(name, 0) + more for name, more in (took | totals).items()}
        self.record.append("ledger.jsonl", lines)
        if events := self.boundary.books.timeline.close(round):
            self.record.append("events.jsonl", events)
        self.record.truncate_after("metrics.jsonl", round - 1)
        self.record.append("metrics.jsonl", [row])
        return row

    def _stop(self, why: str | None) -> bool:
        """Whether training ends before its last round; the manifest says why."""
        if why:
            self.manifest["stopped_because"] = why
        return why is not None


def _said_stop(answer: object) -> bool:
    if isinstance(answer, str) and answer != STOP:
        raise UsageError(f"on_round answered {answer!r}; it answers {STOP!r} to end the run, or nothing")
    return isinstance(answer, str)
