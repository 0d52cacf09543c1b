"""Runs that are killed, stopped, starved and broken; what they leave, and that going on changes no bit."""

import contextlib
import gc
import json
import os
import random  # noqa: TID251 - its state is looked at, nothing is drawn
import shutil
import signal
import textwrap
import time
import tracemalloc
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import fedloom
from fedloom import encoding
from fedloom.calls import ClientError
from fedloom.errors import RunError, UsageError
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.plugin import Plugin
from fedloom.random import stream
from fedloom.runs import act, checkpoint, evaluation
from fedloom.runs.experiment import Experiment
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.task import Data
from fedloom.tasks.toy import Toy
from fedloom.testing import difference, trace

ROUNDS = 8

# Everything that must come through a kill: work under way across rounds, per-client messages, server values of every
# kind, a choice of the server's own, clients' states, running statistics, torch's own generator, logs, a last act.
OVERLAPPING = """
    from dataclasses import dataclass

    import torch

    from fedloom.cohort import Each
    from fedloom.message import Packed, Sparse
    from fedloom.method import Method, client


    @dataclass(frozen=True)
    class Overlapping(Method):
        '''Does a run with work under way come through a kill?'''

        lr: float = 0.1  # eta

        def setup(self, server, clients):
            server.heard = {reply.client: reply.n for reply in clients.call(self.enrol)}
            few = Sparse(torch.tensor([1]), torch.ones(1), 3)
            server.bag = {"mask": Packed(torch.tensor([True, False]), 1), "few": few}
            server.drift = server.model.zeros_like()
            server.rest = None

        def select(self, server, clients):
            return clients.where(torch.randperm(len(clients), generator=server.rng("select"))[:4].tolist())

        def round(self, server, cohort):
            server.drift = server.drift + server.grad(server.model, server.task.global_test().all())
            scales = {client: 1.0 + torch.rand((), generator=server.rng("scale")).item() for client in cohort}
            cohort.idle.submit(self.local, model=server.model, scale=Each(scales), few=server.bag["few"])
            for reply in cohort.wait(2):
                server.heard = server.heard | {reply.client: server.heard[reply.client] + reply.staleness}
                server.model = server.model + reply.delta / (1 + reply.staleness)
                server.log(staleness=reply.staleness)
            server.log(noise=torch.rand(()))

        def finish(self, server, clients):
            server.rest = len(clients.wait())

        @client
        def enrol(self, client):
            return {"n": client.n}

        @client
        def local(self, client, model, scale, few):
            w, _ = client.descend(model, lr=self.lr * scale, batch=8)
            client.state["past"] = [*client.state.get("past", []), client.round]
            client.state["model"] = w
            client.log(noise=torch.rand(()))
            return {"delta": w - model, "few": few.values + 1}
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "overlapping.py"
    path.write_text(textwrap.dedent(OVERLAPPING))
    return Spec.of({"method": str(path), "partition": "given", "rounds": ROUNDS, "dropout": 0.1, "lost": 0.1})


def task():
    return Toy((10, 6, 12, 7, 4), norm=True)


def begun(spec, out):
    return Experiment(spec, task()).begin(out)


def taken_up(out):
    record = Run(out)
    return Experiment(record.spec, task()).take_up(record)


def left(made):
    """All that a run leaves: what the contract compares, and its files without times."""
    files = {
        name: (made.record.path / name).read_bytes() for name in ("model.safetensors", "clients.json", "partition.json")
    }
    manifest = {name: value for name, value in made.record.manifest.items() if name not in ("started", "command")}
    return trace(made) | {"files": files, "manifest": manifest}


@pytest.fixture
def uninterrupted(spec):
    made = begun(spec, None)
    made.go()
    assert {len(li["clients"]) for li in made.record.ledger if li["function"] == "local"} != {1}
    assert made.server.rest > 0 and made.server.values.keys() == {"heard", "bag", "drift", "model", "rest"}
    return left(made)


def killed(work, after=None):
    """Runs `work` in a process that gets a real SIGKILL: from itself, or `after` seconds. Says whether it did."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def after_calls(count, owner, name, first=lambda *args: None):
    """Replaces a function by one that at its `count`-th call does what `first` does with its arguments, and dies."""
    honest, calls = getattr(owner, name), []

    def counting(*args, **kwargs):
        calls.append(0)
        if len(calls) == count:
            first(*args)
            die()
        return honest(*args, **kwargs)

    setattr(owner, name, counting)


def torn(run, name, lines):
    with (run.path / name).open("a") as file:
        file.write(json.dumps(next(iter(lines)))[:9])


MOMENTS = {
    "in setup": lambda: after_calls(2, act, "seeded"),
    "in the first round": lambda: after_calls(4, act, "seeded"),
    "before the ledger": lambda: after_calls(5, Run, "append"),
    "between ledger and metrics": lambda: after_calls(4, Run, "append"),
    "in a line of the ledger": lambda: after_calls(5, Run, "append", torn),
    "in a line of the metrics": lambda: after_calls(6, Run, "append", torn),
    "before a checkpoint": lambda: after_calls(3, checkpoint, "save"),
    "in a checkpoint": lambda: after_calls(3, encoding, "encode"),
    "before a checkpoint is renamed": lambda: after_calls(2, os, "replace"),
    "when a checkpoint is done": lambda: after_calls(3, Experiment, "_judged"),
    "before the model": lambda: after_calls(1, Experiment, "end"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_certain_moment_and_resumed(spec, tmp_path, uninterrupted, moment):
    out = tmp_path / "run"

    def doomed():
        MOMENTS[moment]()
        checkpoint.SHARE = 1e9 if "checkpoint" in moment else checkpoint.SHARE
        begun(spec, out).go()

    assert killed(doomed), "the moment came"
    assert Run(out).manifest["status"] == "running"
    assert all(isinstance(row, dict) for row in [*Run(out).metrics, *Run(out).ledger]), "readable as it is"
    again = taken_up(out)
    again.go()
    assert difference(uninterrupted, left(again)) is None


def test_killed_again_and_again_at_any_time_and_resumed(spec, tmp_path, uninterrupted):
    out = tmp_path / "run"
    began = time.perf_counter()
    begun(spec, out).go()
    whole = time.perf_counter() - began
    kills = 0
    for delay in torch.rand(14, generator=stream(0, "kills")).tolist():
        if not (out / "model.safetensors").exists():
            kills += killed(lambda: taken_up(out).go(), after=delay * whole / 2)
        else:  # it was quicker than its death
            shutil.rmtree(out)
            begun(spec, out)
    assert kills >= 4
    again = taken_up(out)
    again.go()
    assert difference(uninterrupted, left(again)) is None


def test_going_on_twice_is_going_on_once(spec, tmp_path, uninterrupted):
    made = begun(spec, tmp_path / "run")
    made.go()
    before = {path.name: path.read_bytes() for path in made.record.path.iterdir() if path.is_file()}
    again = taken_up(tmp_path / "run")
    again.go()
    assert difference(uninterrupted, left(again)) is None
    assert before == {path.name: path.read_bytes() for path in made.record.path.iterdir() if path.is_file()}


def test_a_run_of_more_rounds_is_the_shorter_one_gone_on(tmp_path):
    spec = Spec.of({"method": "scaffold", "partition": "given", "rounds": 6})
    longer = begun(spec, None)
    longer.go()
    shorter = begun(Spec.of({"method": "scaffold", "partition": "given", "rounds": 4}), tmp_path / "run")
    shorter.go()
    path = tmp_path / "run" / "spec.yaml"
    path.write_text(path.read_text().replace("rounds: 4", "rounds: 6"))
    again = taken_up(tmp_path / "run")
    again.go()
    assert difference(trace(longer), trace(again)) is None


def fedavg(out=None, task=None, **settings):
    return fedloom.run(FedAvg(), task or Toy((5, 4)), out=out, report=False, **{"rounds": 3} | settings)


def test_ctrl_c_stops_and_says_so(tmp_path):
    def interrupt(row):
        if row["round"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        fedavg(tmp_path / "run", on_round=interrupt)
    stopped = Run(tmp_path / "run")
    assert stopped.manifest["status"] == "stopped" and len(stopped.metrics) == 2 and stopped.final["round"] == 2
    again = fedloom.resume(tmp_path / "run", Toy((5, 4)), report=False)
    assert again.manifest["status"] == "finished" and [row["round"] for row in again.metrics] == [1, 2, 3]
    assert difference(again.model.flat, fedavg().model.flat) is None


def test_a_checkpoint_cut_off_anywhere_is_damaged(spec, tmp_path, uninterrupted):
    out = tmp_path / "run"
    begun(spec, out).go()
    path = out / checkpoint.FILE
    whole = path.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, *range(len(whole) // 7, len(whole), len(whole) // 7), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(RunError, match=r"is damaged .* delete it to start the run again") as failed:
            taken_up(out)
        assert "\n" not in str(failed.value)
    for byte in (7, 6, 3):  # an absurd length of the first frame
        path.write_bytes(whole[:byte] + b"\xff" + whole[byte + 1 :])
        with pytest.raises(RunError, match="is damaged"):
            taken_up(out)
    path.unlink()
    again = taken_up(out)
    again.go()
    assert difference(uninterrupted, left(again)) is None


def test_no_altered_byte_of_a_checkpoint_is_taken_for_a_number(spec, tmp_path):
    out = tmp_path / "run"
    begun(spec, out).go()
    path = out / checkpoint.FILE
    whole = path.read_bytes()
    places = torch.randint(len(whole), (40,), generator=stream(0, "bits")).tolist()
    for place in [0, 8, 20, *places, len(whole) - 33, len(whole) - 32, len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(RunError, match=r"is damaged .* delete it to start the run again"):
            taken_up(out)
    path.write_bytes(whole + b"x")
    with pytest.raises(RunError, match="is damaged"):
        taken_up(out)
    path.write_bytes(whole)
    taken_up(out)


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl"])
def test_lines_that_a_checkpoint_relies_on_and_that_are_gone_are_told(spec, tmp_path, name):
    out = tmp_path / "run"
    begun(spec, out).go()
    lines = (out / name).read_bytes().splitlines(keepends=True)
    for left_over in (lines[:1], lines[:-1], None):
        (out / name).unlink() if left_over is None else (out / name).write_bytes(b"".join(left_over))
        with pytest.raises(RunError, match=rf"{name} has \d+ bytes, but \d+ when .*: rounds are missing; restore it"):
            taken_up(out)
    (out / name).write_bytes(b"".join(lines))
    taken_up(out)


def test_the_record_is_on_the_disk_before_the_checkpoint_that_relies_on_it(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, Path.replace

    def names_of(file):
        return Path(f"/proc/self/fd/{file}").readlink().name

    monkeypatch.setattr(os, "fsync", lambda file: (order.append(names_of(file)), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (order.append(f"{to.name} renamed"), replace(path, to)))
    fedavg(tmp_path / "run", rounds=1)
    before = order[: order.index("state.bin renamed")]
    written = {"metrics.jsonl", "ledger.jsonl", "clients.json", "chosen.json", "manifest.json", "spec.yaml"}
    assert written <= set(before) and before[-1] == ".state.bin.partial"


def test_nobody_else_may_read_what_clients_keep_to_themselves(tmp_path):
    fedloom.run("scaffold", Toy((5, 4)), out=tmp_path / "run", report=False, rounds=1)
    path = tmp_path / "run" / checkpoint.FILE
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0


def test_a_checkpoint_of_another_spec_is_refused(tmp_path):
    fedavg(tmp_path / "run")
    path = tmp_path / "run" / "spec.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1").replace("lr: 0.05", "lr: 0.5"))
    with pytest.raises(UsageError, match="a checkpoint of another spec") as refused:
        fedloom.resume(tmp_path / "run", Toy((5, 4)))
    assert "method.lr: 0.05 there, 0.5 here; seed: 0 there, 1 here" in str(refused.value)
    assert "restore spec.yaml" in str(refused.value)


def test_a_task_given_in_python_is_needed_again(tmp_path):
    fedavg(tmp_path / "run")
    with pytest.raises(UsageError, match=r"a Toy given in Python; resume it in Python"):
        fedloom.resume(tmp_path / "run")


def test_a_folder_that_exists_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="exists"):
        fedavg(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_evaluation_every_few_rounds_and_always_at_the_end():
    rows = fedavg(rounds=7, eval_every=3).metrics
    assert [row["round"] for row in rows if "global_test_accuracy" in row] == [3, 6, 7]
    assert [row["round"] for row in rows] == list(range(1, 8))
    assert all(("eval_up_bytes" in row, row["eval_up_bytes"] > 0) == (True, row["round"] in (3, 6, 7)) for row in rows)


def test_time_that_is_spent_ends_a_run_after_its_round():
    assert len(fedavg(rounds=10**6, max_seconds=0).metrics) == 1
    run = fedavg(rounds=10**6, max_seconds=0.05, eval_every=10**6)
    seconds = [row["seconds"] for row in run.metrics]
    assert sum(seconds) >= 0.05 > sum(seconds[:-1])
    assert run.manifest["status"] == "finished" and run.final["round"] == len(seconds)
    assert (run.path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("budget", "costs"),
    [("max_steps", ["gradient_steps"]), ("max_bytes", ["up_bytes", "down_bytes", "peer_bytes"])],
)
def test_a_budget_ends_a_run_after_the_round_that_spends_it_and_resuming_adds_none(budget, costs, tmp_path):
    a_round = sum(fedavg(rounds=1).metrics[0][cost] for cost in costs)
    assert len(fedavg(rounds=9, **{budget: 3 * a_round}).metrics) == 3
    run = fedavg(rounds=9, **{budget: 2 * a_round + 1}, out=tmp_path / "run")
    assert [row["round"] for row in run.metrics] == [1, 2, 3]
    assert run.manifest["stopped_because"] == f"{budget}={2 * a_round + 1} is spent"
    again = fedloom.resume(run.path, Toy((5, 4)), report=False)
    assert again.metrics == run.metrics and again.manifest["status"] == "finished"


@dataclass(frozen=True)
class Failing(FedAvg):
    """A client that fails in the second round, in a way of its own."""

    way: str = "raise"

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, batch=self.batch)
        if client.round == 2 and client.id == 1:
            if self.way == "raise":
                raise ZeroDivisionError("no luck")
            return {"delta": (w - model) * float("nan"), "n": client.n}
        return {"delta": w - model, "n": client.n}


@pytest.mark.parametrize(
    ("way", "complaint"),
    [("raise", "ZeroDivisionError: no luck"), ("nan", "the field 'delta' of the reply has NaN or infinite numbers")],
)
def test_a_client_that_fails_stops_the_run_and_is_named(tmp_path, way, complaint):
    with pytest.raises(ClientError) as failed:
        fedloom.run(Failing(way=way), Toy((5, 4)), out=tmp_path / "run", report=False, rounds=3)
    told = str(failed.value)
    assert told.startswith("client 1, round 2, test_experiment.local: ") and complaint in told
    assert told.endswith("[sent: model: Vector[83]]") and "\n" not in told
    assert failed.value.__cause__ is not None, "the traceback leads to the client function"
    record = Run(tmp_path / "run")
    assert record.manifest["status"] == "failed" and [row["round"] for row in record.metrics] == [1]


FULL = Path("/dev/full")  # a device on which every write finds the disk full


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl", ".state.bin.partial", ".clients.json.partial"])
@pytest.mark.parametrize("manifest", [False, True], ids=["", "and the manifest"])
def test_a_full_disk_leaves_a_run_that_can_be_read_and_resumed(tmp_path, name, manifest, full_disk):
    out = tmp_path / "run"

    # The first round is saved whatever it costs, the second again.
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.ExitStack() as full,
        pytest.raises(RunError, match=r"the disk of .* is full") as failed,
    ):

        def fill(row):
            if row["round"] == 1:
                full.enter_context(full_disk(*[name, ".manifest.json.partial"] if manifest else [name]))

        patch.setattr(checkpoint, "SHARE", 1e9)
        fedavg(out, on_round=fill)
    assert "fedloom resume" in str(failed.value)
    assert not [path for path in out.rglob(".*") if path.is_file() or path.is_symlink()], "nothing half-written"
    record = Run(out)
    # A checkpoint begins with the manifest: that write found the disk full, and the last one free again.
    assert record.manifest["status"] == ("running" if manifest and "state" not in name else "failed")
    assert [row["round"] for row in record.metrics][:1] == [1] and record.spec.rounds == 3
    again = fedloom.resume(out, Toy((5, 4)), report=False)
    assert [row["round"] for row in again.metrics] == [1, 2, 3]
    whole = fedavg()
    assert difference(again.model.flat, whole.model.flat) is None
    assert list(again.ledger) == list(whole.ledger)


def states_of_generators():
    _, keys, *rest = np.random.get_state()  # noqa: NPY002 - looked at only
    return [torch.get_rng_state().tolist(), random.getstate(), keys.tolist(), rest]


def test_global_generators_and_threads_are_left_as_they_were():
    torch.set_num_threads(2)
    inside = []
    try:
        before = states_of_generators()
        fedavg(on_round=lambda row: inside.append((torch.get_num_threads(), states_of_generators() == before)))
        assert inside == [(1, True)] * 3
        with pytest.raises(ClientError):
            fedloom.run(Failing(), Toy((5, 4)), rounds=3)
        assert states_of_generators() == before and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_global_generators_do_not_matter():
    one = fedavg().model
    torch.rand(3)
    np.random.random(3)  # noqa: NPY002 - disturbs what must not matter
    assert difference(one.flat, fedavg().model.flat) is None


def test_memory_does_not_grow_with_the_rounds():
    held = {}

    def weigh(row):
        if row["round"] in (50, 200):
            gc.collect()
            held[row["round"]] = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        fedloom.run("scaffold", Toy((5, 4)), rounds=200, eval_every=25, on_round=weigh)
    finally:
        tracemalloc.stop()
    assert held[200] - held[50] < 30_000, f"bytes held after 50 and 200 rounds: {held}"


class Crowd(Toy):
    """A hundred thousand clients with the samples of four."""

    population: int

    def __init__(self):
        super().__init__((6, 6, 6, 6))
        self.population = 100_000

    def data(self, client, split):
        return super().data(client % 4, split)

    def global_test(self):
        return Data(self.x, self.y)

    def to(self, device):
        return self


def test_a_hundred_thousand_clients():
    began = time.perf_counter()
    run = fedloom.run("scaffold", Crowd(), cohort=10, rounds=3, eval_every=3)
    assert time.perf_counter() - began < 10
    assert [row["cohort"] for row in run.metrics] == [10] * 3 and run.final["gradient_steps"] == 10
    assert run.partition["population"] == 100_000 and len(run.partition["clients"]) == 1000
    assert len(run.clients["clients"]) == evaluation.JUDGED_CLIENTS, "a seeded sample stands for all"
    trained = {k for line in run.ledger if line["kind"] == "train" for k in line["clients"]}
    assert len(trained) > 20 and max(trained) > 1000


@dataclass(frozen=True)
class Choosing(FedAvg):
    """A method that asks clients before it chooses among them."""

    def setup(self, server, clients):
        server.chosen = 0

    def select(self, server, clients):
        assert server.round == 1 + server.chosen
        server.chosen = server.round
        sizes = {reply.client: reply.n for reply in clients.call(self.size)}
        return clients.where(lambda k: sizes[k] >= 5)

    @client
    def size(self, client):
        client.log(asked=1.0)
        return {"n": client.n}


@dataclass(frozen=True)
class Counting(FedAvg):
    """Declares a total that has no value before the second round; `slip` names the box that misspells it."""

    slip: str = ""

    def setup(self, server, clients):
        server.total = None

    def counted(self, server, box):
        if server.round >= 2:
            server.total = (server.total or 0) + 1
            if box == self.slip:
                server.totl = server.total

    def select(self, server, clients):
        self.counted(server, "select")

    def round(self, server, cohort):
        FedAvg.round(self, server, cohort)
        self.counted(server, "round")

    def finish(self, server, clients):
        self.counted(server, "finish")

    def observe(self, server, clients):
        self.counted(server, "observe")


@dataclass(frozen=True)
class Around(Plugin):
    """Sets the inner method's value from outside, rightly or not, and declares nothing."""

    inner: Method = Counting()
    value: str = "total"

    def round(self, server, cohort):
        self.inner.round(server, cohort)
        if server.round >= 2:
            setattr(server, self.value, 7)


SLIPS = [
    Counting(slip="select"),
    Counting(slip="round"),
    Counting(slip="finish"),
    Counting(slip="observe"),
    Around(Counting(slip="round")),
]


@pytest.mark.parametrize("method", [*SLIPS, Around(value="totl")])
def test_a_server_value_that_setup_did_not_declare_is_an_error_in_every_box(method):
    with pytest.raises(UsageError) as refused:
        fedloom.run(method, Toy((5, 4, 6)), rounds=2)
    said = "unknown server value 'totl'; did you mean 'total'? (known: model, total); a new one is declared in setup"
    assert str(refused.value).startswith(said)


def resumed_after_one_round(method, folder):
    """The experiment as it was taken up in the second round."""

    def stop(row):
        raise KeyboardInterrupt

    spec = Spec.of({"method": method.to_spec(), "partition": "given", "rounds": 3})
    with contextlib.suppress(KeyboardInterrupt):
        Experiment(spec, task(), method).begin(folder).go(stop)
    record = Run(folder)
    return Experiment(record.spec, task(), method).take_up(record)


@pytest.mark.parametrize("method", [*SLIPS, Around(value="totl")])
def test_a_resumed_run_knows_what_was_declared_and_nothing_more(method, tmp_path):
    again = resumed_after_one_round(method, tmp_path / "run")
    assert again.server.values.keys() == {"model", "total"} and again.server.total is None
    with pytest.raises(UsageError, match="unknown server value 'totl'; did you mean 'total'"):
        again.go()


@pytest.mark.parametrize("method", [Counting(), Around()])
def test_what_is_declared_without_a_value_gets_one_after_a_resume_too(method, tmp_path):
    again = resumed_after_one_round(method, tmp_path / "run")
    again.go()
    through = Experiment(again.spec, task(), method).begin(None)
    through.go()
    assert again.server.total == through.server.total == (9 if isinstance(method, Around) else 7)
    assert difference(trace(again), trace(through)) is None


def test_a_plugin_that_leaves_out_the_inner_setup_has_not_declared_its_values():
    @dataclass(frozen=True)
    class Forgetful(Plugin):
        inner: Method = Counting()

        def setup(self, server, clients):
            server.mine = 1

    with pytest.raises(UsageError, match=r"unknown server value 'total' \(known: mine, model\)"):
        fedloom.run(Forgetful(), Toy((5, 4, 6)), rounds=2)


def test_choosing_a_cohort_is_part_of_the_round():
    run = fedloom.run(Choosing(), Toy((5, 4, 6)), rounds=2)
    for row in run.metrics:
        assert row["cohort"] == 2 and row["replies"] == 5 and row["client/asked"] == 1.0
    asked = {(line["function"], *line["clients"]) for line in run.ledger if line["kind"] == "train"}
    assert {("size", 0, 1, 2), ("local", 0, 2)} <= asked and not any(who[0] == "local" and 1 in who for who in asked)


@dataclass(frozen=True)
class Logging(Method):
    """A method that only logs."""

    def round(self, server, cohort):
        server.log(a=server.round, b=torch.tensor(2.0))
        server.log(a=server.round + 1)
        cohort.call(self.local)

    @client
    def local(self, client):
        client.log(id=client.id)


def test_what_is_logged_is_averaged_over_the_round():
    row = fedloom.run(Logging(), Toy((5, 4, 6)), rounds=1).metrics[0]
    assert row["client/id"] == 1.0 and row["server/a"] == 1.5 and row["server/b"] == 2.0
    assert "train_loss" not in row and row["gradient_steps"] == 0


def test_measures_are_means_over_samples():
    class Perfect(Toy):
        def judge(self, scores, data):
            return {"n": len(data), "loss": 0.0, "accuracy": (data.y == 0).float().mean().item()}

        def to(self, device):
            return self

    problem = Perfect((5, 4, 6))
    run = fedloom.run("fedavg", problem, rounds=1)
    tests = [problem.data(k, "test").y for k in range(3)]
    shares = [(y == 0).float().mean().item() for y in tests]
    assert run.final["personal_test_accuracy"] == pytest.approx(np.mean(shares))
    assert run.final["personal_test_accuracy_std"] == pytest.approx(np.std(shares))
    assert run.final["worst_client_accuracy"] == pytest.approx(min(shares))
    assert run.clients["clients"] == [{"id": k, "accuracy": pytest.approx(shares[k]), "n": 12} for k in range(3)]


WRONG = [
    ({"device": "tpu"}, "unknown device 'tpu'"),
    ({"engine": "serail"}, "unknown engine 'serail'; did you mean 'serial'"),
    ({"cohort": 9}, "cohort is 9; there are 2 clients"),
    ({"dropout": 2.0}, "dropout is 2.0; it is a share"),
    ({"fields": {"lr": 1}, "method": "fedavg", "seeds": 3}, "unknown setting 'seeds'; did you mean 'seed'"),
]


@pytest.mark.parametrize(("settings", "complaint"), WRONG)
def test_a_request_that_cannot_be_met_writes_nothing(tmp_path, settings, complaint):
    with pytest.raises(UsageError, match=complaint.replace("(", r"\(")):
        fedloom.run(settings.pop("method", FedAvg()), Toy((5, 4)), out=tmp_path / "run", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("buffers", ["average", "local", "ignore"])
def test_every_policy_for_buffers_is_resumed_bitwise(tmp_path, buffers):
    settings = {"method": "fedavg", "partition": "given", "rounds": 4, "buffers": buffers}
    whole = begun(Spec.of(settings), None)
    whole.go()
    part = begun(Spec.of(settings), tmp_path / "run")

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part.go(stop)
    again = taken_up(tmp_path / "run")
    again.go()
    assert difference(trace(whole), trace(again)) is None
    moved = not torch.equal(whole.server.model.buffers.flat, whole.site.initial.buffers.flat)
    assert moved == (buffers == "average")
    assert bool(whole.engine.states) == (buffers == "local")
