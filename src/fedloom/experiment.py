"""One experiment: from a spec to a trained model and a record."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from fedloom import checkpoint, engines, inputs, tasks
from fedloom._version import __version__
from fedloom.boundary import Boundary
from fedloom.boundary.passage import Passage
from fedloom.cohort import Cohort
from fedloom.engines import auto
from fedloom.engines.blocks import cores
from fedloom.errors import NobodyReplied, UsageError
from fedloom.method import Method, build
from fedloom.node import Server
from fedloom.random import seeded, stream
from fedloom.record import Run, chosen
from fedloom.registry import catalogue
from fedloom.rehearsal import rehearsed
from fedloom.settled import settled
from fedloom.site import Site
from fedloom.spec import BUDGETS, Spec, anywhere
from fedloom.states import States
from fedloom.task import Task, sound
from fedloom.tracking import Tracking, names
from fedloom.world import World
from fedloom.world.availability import located

OnRound = Callable[[Mapping[str, Any]], object]

LACKING = {"public": "public data at the server: set public=0.05, the share of the training rows that it gets"}
PLAIN = Spec()
JUDGED_CLIENTS = 1000  # of a larger population, this many seeded clients stand for all in personal measures
TASKS_OWN = ("problem", "label", "exclude", "keep", "missing", "partition", "clients", "validation", "public", "model")
CHECKPOINT_SHARE = 0.05  # of the time, at most, goes into checkpoints


def named_as(task: Task) -> str:
    """What a spec calls the data of a task that only Python has."""
    return f"{with_article(type(task).__name__)} given in Python"


def with_article(word: str) -> str:
    """`a Toy`, `an Experiment`."""
    return f"{'an' if word[:1].lower() in {*'aeiou'} else 'a'} {word}"


class Experiment:
    """The parts of one experiment, put together from a spec, and the loop over its rounds."""

    def __init__(self, spec: Spec, task: Task | None = None, method: Method | None = None) -> None:
        names(spec.track)  # told before the data are read
        if task is None and spec.partition == "given":
            raise UsageError(f"this run's data are {spec.data}; resume it in Python: fedloom.resume(path, task)")
        fields = {name: value for name, value in spec.method.items() if name != "name"}
        self.method = method or build(spec.method["name"], fields)
        if task is not None and spec.data == named_as(task):
            sound(task)
            for name in TASKS_OWN:
                value, own = getattr(spec, name), task.population if name == "clients" else getattr(task, name, None)
                if value not in (getattr(PLAIN, name), own, "given"):
                    raise UsageError(
                        f"{name}={value} has no effect on a task given in Python, which brings its own data, clients "
                        "and network; leave it out, and make the task so"
                    )
        self.task = task or tasks.build(spec)
        self.sits_out = type(self.task).present is not Task.present or (
            task is not None and not all(map(task.present, range(task.population)))
        )
        lacking = [need for need in self.method.needs if need not in self.task.offers]
        if lacking:
            raise UsageError(
                f"{self.method.name()} needs {LACKING.get(lacking[0], f'a problem of the kind {lacking[0]}')}"
            )
        if strange := self.task.demands.difference(self.method.needs):
            fitting = [entry.name for entry in catalogue() if strange <= {*entry.load(Method).needs}]
            raise UsageError(
                f"{self.method.name()} cannot learn a problem of the kind {min(strange)}; take {' or '.join(fitting)}"
            )
        for one in self.method.nested:
            for refused, why in one.refuses.items():
                setting, _, word = refused.partition("=")
                value = getattr(spec, setting)
                if value != getattr(PLAIN, setting) and word in str(value):
                    raise UsageError(f"{one.name()} does not go with {setting}={value}: {why}")
        self.spec = replace(
            spec,
            method={"name": placed_file(spec.method["name"]), **self.method.fields()},
            data=anywhere(spec.data),
            availability=located(spec.availability),
            rounds=1 if self.method.one_shot else spec.rounds,
            clients=self.task.population,
            model=getattr(self.task, "model", spec.model),
            device=device_named(spec.device),
        )
        self.world = World.of(self.spec, self.task.population)
        self.passage = rehearsed(self.method, Passage.of(spec, self.method, self.task))
        self.why = None  # why this engine, where `auto` chose it
        with settled(self.spec.device, spec.threads):
            self.site = Site(self.task, spec.seed, self.spec.device, spec.buffers, self.passage.layers, spec.blind)
            if spec.engine == "auto":
                chosen = auto.choose(self.method, self.site, self.world, spec.workers, cores())
                self.spec = replace(self.spec, engine=chosen.engine, workers=chosen.workers)
                self.why = chosen.why
        self.engine = engines.build(self.spec.engine, self.spec.workers, spec.threads)
        self.server = Server(self.site, self.task.population)
        self.boundary = Boundary(self.method, self.site, self.world, self.engine, self.passage)
        self.everybody = Cohort(range(self.task.population), self.boundary)
        self.done = 0
        self.deserted: str | None = None  # why nobody can ever be reached again
        self.best: dict[str, Any] | None = None  # the row that validation would choose so far

    def begin(self, out: str | Path | None) -> Experiment:
        """A new record."""
        import json

        self.manifest = manifest(self.spec, out) | ({"engine": self.why} if self.why else {})
        self.manifest["inputs"] = inputs.digests(self.spec)
        first = {
            "spec.yaml": self.spec.text(__version__),
            "manifest.json": json.dumps(self.manifest, indent=1) + "\n",
            "partition.json": json.dumps(self.task.describe()) + "\n",
        }
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
        self.done = checkpoint.load(record, self.spec, [self.server, self.states, self.boundary])
        for name in ("metrics.jsonl", "ledger.jsonl", "events.jsonl"):
            record.cut(name, self.done or -1)
        if told:
            before = self.manifest.get("notes", [])
            self.manifest["notes"] = [*before, *(f"after round {self.done}: {line}" for line in told)]
            self.manifest["inputs"] = inputs.digests(self.spec)
        return self

    def go(self, on_round: OnRound | None = None) -> Run:
        """Carries out the rounds that are left and writes the model; gives the record."""
        status = "failed"
        try:
            tracked = Tracking(self.record, self.spec.track, self.done)
            with settled(self.spec.device, self.spec.threads), tracked as tracking:
                self._rounds(on_round or (lambda row: None), tracking)
            status = "finished"
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            self.engine.stop()
            self.record.close()
            self._write_manifest(status)
        return self.record

    def _rounds(self, on_round: OnRound, tracking: Tracking) -> None:
        spec, server = self.spec, self.server
        self.engine.start(self.method, self.site, self.states)
        clock = self.boundary.clock
        time_then = clock.now  # what `setup` takes is in the first round's time
        if self.done == 0:
            clock.now = time_then = 0.0
            self.boundary.register()
            self._step("setup", 0, lambda: self.method.setup(server, self.everybody))
        spent = Spent(spec)
        for row in self.record.metrics:
            spent.add(row)
        self.best = chosen(self.record.metrics)
        saved_at, save_cost = time.perf_counter(), 0.0
        last = self.done >= spec.rounds or (self.done > 0 and self._stop(spent))
        while not last:
            round = self.done + 1
            began = time.perf_counter()
            if round > 1:
                clock.now = time_then  # the wall's clock stood still while the server measured and saved
            row = {"round": round, "seconds": 0.0, "virtual_seconds": 0.0} | self._round(round)
            row |= {"seconds": time.perf_counter() - began, "virtual_seconds": _tidy(clock.now - time_then)}
            spent.add(row | self.boundary.books.ledger.totals)
            last = round == spec.rounds or self._stop(spent)
            if last:
                self._step("finish", round, lambda: self.method.finish(server, self.everybody))
                row |= {"seconds": time.perf_counter() - began, "virtual_seconds": _tidy(clock.now - time_then)}
            time_then = clock.now
            if last or round % spec.eval_every == 0:
                began = time.perf_counter()
                row |= self._evaluate(round)
                row["eval_seconds"] = time.perf_counter() - began
            lines, totals = self.boundary.books.ledger.close()
            self.record.append("ledger.jsonl", lines)
            if events := self.boundary.books.timeline.close(round):
                self.record.append("events.jsonl", events)
            self.record.append("metrics.jsonl", [row | totals])
            self.done = round
            now = time.perf_counter()
            if not self.temporary and (last or save_cost <= CHECKPOINT_SHARE * (now - saved_at)):
                self._write_manifest("running")
                checkpoint.save(self.record, spec, round, [server, self.states, self.boundary])
                saved_at = time.perf_counter()
                save_cost = saved_at - now
            tracking.row(row | totals)
            on_round(row | totals)
        self._write_model()
        if self.method.global_model and not spec.blind:
            self.manifest |= self.passage.told("closing", self.boundary.books, server)

    def _stop(self, spent: Spent) -> bool:
        """Whether training ends before its last round; the manifest says why."""
        why = spent.over() or self.passage.spent(self.boundary.books) or self.deserted
        if why:
            self.manifest["stopped_because"] = why
        return why is not None

    def _step(self, kind: str, round: int, act: Callable[[], object]) -> dict[str, Any]:
        """One act of the server in its own streams; gives what it and the clients logged."""
        self.boundary.begin(kind, round)
        self.server.begin(kind, round)
        with seeded(self.spec.seed, *self.server.key, "torch"):
            act()
        logged = sorted(self.boundary.books.logs.items())
        logs = {
            name: float(np.mean([n for _, n in sorted(numbers)])) if len(numbers) > 1 else float(numbers[0][1])
            for name, numbers in logged
        }
        row: dict[str, Any] = {"train_loss": logs.pop("loss")} if "loss" in logs else {}
        row |= {f"client/{name}": number for name, number in logs.items()}
        return row | self._own_logs()

    def _own_logs(self) -> dict[str, float]:
        """What the server logged."""
        own = {name: float(torch.as_tensor(numbers).double().mean()) for name, numbers in self.server.logs.items()}
        return {f"server/{name}": number for name, number in own.items()}

    def _round(self, round: int) -> dict[str, Any]:
        before, books = dict(self.server.values), self.boundary.books
        row: dict[str, Any] = {"cohort": 0}

        def act() -> None:
            now, present = self.boundary.clock.now, self.everybody
            if self.world.there:
                present = Cohort(self.world.present(round, now), self.boundary)
                if not present and not self.boundary.flights:
                    row["note"] = self._wait_for_somebody(round)
                    return
            chosen = self.method.select(self.server, present)
            cohort = (
                chosen if chosen is not None else Cohort(self.world.choose(round, now, self.knowledge), self.boundary)
            )
            if self.sits_out:
                cohort = cohort.where(self.server.task.present)
            row["cohort"] = len(cohort)
            if chosen is None:
                self.boundary.books.asked, self.boundary.books.drawn = len(cohort), cohort.clients
            self.method.round(self.server, cohort)
            if self.world.server_speed:
                took = self.server.steps * self.world.step_seconds / self.world.server_speed
                self.boundary.clock.reach(self.boundary.clock.now + took)

        doubtful = self.world.fails or self.boundary.doubtful
        try:
            with self.states.undone_by(NobodyReplied) if doubtful else nullcontext():
                row |= self._step("train", round, act)
        except NobodyReplied as nobody:
            self.server.values.clear()
            self.server.values.update(before)
            row["note"] = f"{nobody}; the server kept its values"
        if unused := self.passage.unused(books):
            raise UsageError(
                f"{unused}={getattr(self.spec, unused)} had nothing to do in round {round}: {self.method.name()} has "
                "taken no mean; leave it out, or take a method that does"
            )
        moved = self.server.values["model"] is not before["model"]
        books.version += moved or (not self.method.global_model and books.replies > 0)
        row |= {"replies": books.replies, "gradient_steps": books.steps + self.server.steps}
        return row | self.passage.told("row", books, self.server) | books.notes

    @cached_property
    def knowledge(self) -> Mapping[str, Any]:
        """What the choice of a cohort may go by: what clients registered."""
        needs = self.world.chooser.needs
        return {name: np.array([self.boundary.info(k)[name] for k in self.everybody]) for name in needs}

    def _wait_for_somebody(self, round: int) -> str:
        """Moves the clock on to when somebody can be reached again; returns the round's note."""
        clock, there = self.boundary.clock, self.world.there
        assert there is not None
        then = there.next(clock.now)
        if then is None:
            self.deserted = f"availability={self.world.availability}: after {clock.now:g} s nobody can ever be reached"
            return f"{self.deserted}; the run ends"
        waited = f"; the server waited {then - clock.now:g} s" if then > clock.now else ""
        clock.reach(then)
        return f"nobody could be reached in round {round}{waited}"

    def _evaluate(self, round: int) -> dict[str, Any]:
        """The measures of the global model, and of what each client would use, on data that no training sees."""
        self.boundary.begin("evaluate", round)
        self.server.logs = {}
        observe = partial(self.method.observe, self.server, self.everybody)
        stand_in = self.passage.observed(self.boundary.books, self.server, observe)
        model = self.server.model if stand_in is None else stand_in
        row: dict[str, Any] = {"global_test_accuracy": None, "global_test_loss": None} | self._own_logs()
        if self.method.global_model and not self.spec.blind:
            measured = self.server.evaluate(model)
            row |= {f"global_test_{name}": value for name, value in measured.items() if name != "n"}
            row |= self.passage.told("measured", self.server)
        judged = self.everybody
        for stage in self.passage.having("honest"):
            judged = judged.where(stage.honest)
        if len(judged) > JUDGED_CLIENTS:
            order = torch.randperm(len(judged), generator=stream(self.spec.seed, "world", "judged"))
            judged = judged.where(order[:JUDGED_CLIENTS].tolist())
        replies = judged.call(self.method.evaluate, **self.method.judged(self.server))
        tests = [(reply.client, reply.test) for reply in replies if reply.test["n"]]
        held = self.server.task.global_validation()
        validations = [reply.validation for reply in replies] if held is None else [self.server.judge(model, held)]
        row["validation_accuracy"] = _weighted(validations, "accuracy")
        row["personal_test_accuracy"] = _weighted([test for _, test in tests], "accuracy")
        accuracies = [test["accuracy"] for _, test in tests if "accuracy" in test]
        row["personal_test_accuracy_std"] = float(np.std(accuracies)) if accuracies else None
        row["worst_client_accuracy"] = min(accuracies, default=None)
        for name in sorted({name for _, test in tests for name in test} - {"n", "accuracy", "loss"}):
            row[f"personal_test_{name}"] = _weighted([test for _, test in tests], name)
        each = [
            {"id": client} | {name: test[name] for name in ("accuracy", "n") if name in test} for client, test in tests
        ]
        judged_clients = {"round": round, "clients": each}
        self.record.write_json("clients.json", judged_clients)
        if (stage := self.task.stage(round)) is not None:
            row["stage"] = stage
        if chosen([self.best or row, row]) is row:
            self.best = row
            self.record.write_json("chosen.json", judged_clients)
        return row

    def _write_manifest(self, status: str) -> None:
        self.manifest |= {"status": status, "privacy": list(self.boundary.books.verbs.values())}
        self.manifest |= self.passage.told("manifest", self.boundary.books)
        self.record.write_json("manifest.json", self.manifest)

    def _write_model(self) -> None:
        from safetensors.torch import save

        model = self.server.model
        tensors = {name: model[name].cpu().contiguous() for name in model}
        # A second entry would stand before or after the first as chance has it, and the file's bytes with it.
        data = save(tensors, metadata={"fedloom": f"{__version__}, round {self.done}"})
        self.record.write("model.safetensors", lambda file: file.write(data))


class Spent:
    """What a run's rounds have cost so far, beside its budgets."""

    COSTS = MappingProxyType(
        {
            "max_seconds": ("seconds",),
            "max_steps": ("gradient_steps",),
            "max_bytes": ("up_bytes", "down_bytes", "peer_bytes"),
            "max_virtual_seconds": ("virtual_seconds",),
        }
    )

    def __init__(self, spec: Spec) -> None:
        self.budgets = {name: getattr(spec, name) for name in BUDGETS if getattr(spec, name) is not None}
        self.used = dict.fromkeys(self.budgets, 0.0)

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes in a round."""
        for name in self.used:
            self.used[name] += sum(row.get(cost, 0) for cost in self.COSTS[name])

    def over(self) -> str | None:
        """Which budget is spent, if one is."""
        for name, budget in self.budgets.items():
            if self.used[name] >= budget:
                return f"{name}={budget} is spent"
        return None


def placed_file(name: str) -> str:
    """The name of a method; of a method's file the path that holds in every working folder."""
    return str(Path(name).resolve()) if name.endswith(".py") and Path(name).is_file() else name


def manifest(spec: Spec, out: str | Path | None) -> dict[str, Any]:
    """Versions, hardware and seed of a run that begins."""
    return {
        "fedloom": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": {"name": _cpu_name(), "cores": os.cpu_count()},
        "device": torch.cuda.get_device_name(spec.device) if spec.device.startswith("cuda") else "cpu",
        "seed": spec.seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "running",
        "command": "in Python, with the same task: fedloom.run(METHOD, TASK, ...) and the settings of spec.yaml"
        if spec.partition == "given"
        else f"fedloom run {Path(out or '.') / 'spec.yaml'} --out NEW_FOLDER",
        "privacy": [],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _tidy(seconds: float) -> float:
    """Without the digits that a difference of two large numbers makes up."""
    return round(seconds, 9)


def _weighted(measured: list[dict[str, float]], name: str) -> float | None:
    """The mean of a measure over samples; None where nobody has it."""
    having = [m for m in measured if m["n"] and name in m]
    return float(sum(m[name] * m["n"] for m in having) / sum(m["n"] for m in having)) if having else None


def device_named(name: str) -> str:
    """The device that a setting stands for; UsageError if it is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("device is cuda, but this PyTorch sees no CUDA device; take --device cpu or auto")
    if name != "cpu" and not name.startswith("cuda"):
        raise UsageError(f"unknown device {name!r} (known: auto, cpu, cuda)")
    return name
