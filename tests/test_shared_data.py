"""Public data without labels at both ends: whose rows they are, what they cost, and who may use them."""

from dataclasses import dataclass

import pytest
import torch
from problems import ran

import fedloom
from fedloom import encoding, tasks
from fedloom.cli import main
from fedloom.data.load import load
from fedloom.data.partition import federate
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.report.words import privacy_statement
from fedloom.runs.spec import Spec
from fedloom.task import Data
from fedloom.tasks.several import Several
from fedloom.tasks.toy import Toy

X = Toy().shared_data().x
BYTES = len(encoding.encode({"x": X}))


@dataclass(frozen=True)
class Looking(Method):
    """Sends the mean of the shared inputs, and the server keeps the distance from its own."""

    needs = ("shared_data",)

    def setup(self, server, clients):
        server.off = 1.0

    def round(self, server, cohort):
        up = cohort.mean(self.look)
        server.off = float((up.seen - server.shared_data.x.mean(0)).abs().max())

    @client
    def look(self, client):
        assert (client.shared_data.y == -1).all()
        return {"seen": client.shared_data.x.mean(0)}

    @client
    def join(self, client, **message):
        assert len(client.shared_data) == 36

    @client
    def predict(self, client, model):
        return model


@dataclass(frozen=True)
class Undeclared(Looking):
    """Uses what it doesn't ask for."""

    needs = ()


def shipped(made):
    return [line for line in made.record.ledger if line["verb"] == "ship"]


def test_shared_rows_are_nobodys_and_leave_the_servers_as_they_are():
    source = load("digits")
    n = len(source.train.y)
    public, both = (federate(source, "iid", 10, 0.1, seed=3, public=0.1, shared_data=share) for share in (0.0, 0.2))
    assert len(public.shared) == 0 and len(both.shared) == round(0.2 * n)
    assert torch.equal(public.public, both.public)
    rows = torch.cat([both.train.rows, both.validation.rows, both.test.rows, both.public, both.shared])
    assert len(rows.unique()) == len(rows) == len(both.y)
    again, other = (federate(source, "iid", 10, 0.1, seed=seed, shared_data=0.2) for seed in (3, 4))
    assert torch.equal(again.shared, federate(source, "iid", 10, 0.1, seed=3, shared_data=0.2).shared)
    assert not torch.equal(again.shared, other.shared)
    counts = torch.bincount(both.y[both.shared], minlength=10)
    assert counts.unique().numel() > 1, "they are drawn without a look at their labels"


def test_they_have_no_labels_and_are_no_other_data():
    task = tasks.build(Spec(data="digits", clients=4, shared_data=0.1))
    data = task.shared_data()
    assert task.offers == {"shared_data"} and task.public() is None
    assert (data.y == -1).all() and data.y.dtype == torch.int64
    assert torch.equal(data.x, task.federation.x[task.federation.shared])
    assert all((batch.y == -1).all() for batch in data.pieces(7))
    both = tasks.build(Spec(data="digits", clients=4, shared_data=0.1, public=0.1))
    assert both.offers == {"shared_data", "public"} and (both.public().y >= 0).all()
    several = Several([task, both])
    assert torch.equal(several.shared_data().rows, data.rows)


def test_a_share_that_leaves_nobody_anything_is_refused():
    with pytest.raises(UsageError, match=r"shared_data=0.999 is .* leaves none for the clients; expected a smaller"):
        tasks.build(Spec(data="digits", clients=4, shared_data=0.999, public=0.01))


def test_everybody_has_the_same():
    made = ran(Looking(), Toy(), rounds=2)
    assert made.server.off < 1e-6


@pytest.mark.parametrize("engine", ["serial", "loopback", "pool", "vectorized"])
def test_they_are_booked_once_for_every_client_whoever_is_asked(engine):
    made = ran(Looking(), Toy(), rounds=3, cohort=2, engine=engine, workers=2)
    lines = shipped(made)
    assert {line["round"] for line in lines} == {0} and {line["kind"] for line in lines} == {"setup"}
    assert all(line["clients"] == [0, 1, 2, 3] and line["direction"] == "down" for line in lines)
    assert sum(line["bytes"] for line in lines) == BYTES
    first, *others = made.record.metrics
    assert first["down_bytes"] - others[0]["down_bytes"] == 4 * BYTES and len(others) == 2


def test_a_method_that_needs_none_is_sent_none():
    made = ran(FedAvg(), Toy(), rounds=1)
    assert not shipped(made) and "shared_data" not in made.record.manifest
    with pytest.raises(fedloom.RunError, match=r'for methods that declare needs = \("shared_data",\)'):
        ran(Undeclared(), Toy(), rounds=1)


def test_newcomers_get_them_too_and_that_is_booked_as_evaluation():
    made = ran(Looking(), Toy(newcomers=(9, 8)), rounds=2)
    late = [line for line in shipped(made) if line["kind"] == "evaluate"]
    assert all(line["clients"] == [4, 5] for line in late) and sum(line["bytes"] for line in late) == BYTES
    plain = ran(Looking(), Toy(), rounds=2)
    assert made.record.metrics[0]["down_bytes"] == plain.record.metrics[0]["down_bytes"]


def test_the_first_round_waits_for_the_slowest_to_have_them():
    settings = {"bandwidth": "classes:1x0.5,4x0.5", "latency": 0.25}
    made = ran(Looking(), Toy(), rounds=2, **settings)
    assert made.world.has_timing
    slowest = max(0.25 + BYTES / made.world._trip[1](k) for k in range(4))
    first, second = (row["virtual_seconds"] for row in made.record.metrics)
    assert first - second == pytest.approx(slowest)


def test_resumed_they_are_not_sent_again(tmp_path):
    settings = {"data": "digits", "clients": 3, "shared_data": 0.1, "model": "mlp:8", "rounds": 3, "eval_every": 3}

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedloom.run("fedmd", **settings, out=tmp_path / "run", on_round=stop)
    resumed = fedloom.resume(tmp_path / "run")
    whole = fedloom.run("fedmd", **settings, out=tmp_path / "whole")
    ships = [[line for line in run.ledger if line["verb"] == "ship"] for run in (resumed, whole)]
    assert ships[0] == ships[1] and len(ships[0]) == 2
    assert resumed.final["personal_test_accuracy"] == whole.final["personal_test_accuracy"]


def test_the_privacy_statement_says_it():
    made = ran(Looking(), Toy(), rounds=1)
    assert made.record.manifest["shared_data"] == {"samples": 36, "bytes": BYTES}
    first, second = privacy_statement(made.record.manifest)[:2]
    assert first == (
        f"36 samples without labels are public: the server and every client have them (sent once, {BYTES} B a client)."
    )
    assert second == "look: the server learns only the (weighted) average of: seen."


def test_a_run_without_them_is_refused_with_what_to_set():
    with pytest.raises(UsageError, match=r"fedmd needs data without labels .*: set shared_data=0\.05"):
        fedloom.run("fedmd", data="digits", clients=3, rounds=1)
    with pytest.raises(UsageError, match=r"fedmd needs data without labels"):
        fedloom.run("fedmd", data="digits", clients=3, rounds=1, public=0.1)
    with pytest.raises(UsageError, match="does not read shared_data"):
        fedloom.run("split_learning", problem="vertical:50", rounds=1, shared_data=0.1)
    with pytest.raises(UsageError, match="does not read shared_data"):
        fedloom.run("fedavg", problem="graph:sbm", rounds=1, shared_data=0.1)


def test_newcomers_of_a_column_would_be_among_them(tmp_path):
    lines = ["a,domain,label", *(f"{i % 7}.5,{'pq'[i % 2]},{i // 2 % 2}" for i in range(80))]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    settings = {"data": str(tmp_path / "t.csv"), "partition": "column:domain", "newcomers": "q", "rounds": 1}
    with pytest.raises(UsageError, match=r"shared_data=0.1 and newcomers=q: the shared public rows"):
        fedloom.run("fedavg", **settings, shared_data=0.1)


def test_the_command_line_and_a_comparison_reach_them(tmp_path, capsys):
    words = ["run", "fedmd", "--shared-data", "0.1", "--clients", "3", "--model", "mlp:8", "--rounds", "1"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["show", str(tmp_path / "run")]) == 0
    assert "samples without labels are public" in " ".join(capsys.readouterr().out.split())
    results = fedloom.compare(
        ["fedmd", "local"], data="digits", clients=3, model="mlp:8", rounds=1, shared_data=0.1, seeds=1,
        out=tmp_path / "c", report=False,
    )  # fmt: skip
    assert results.methods == ("fedmd", "local") and not results.failed and not results.unfinished


def test_samples_without_labels_keep_nothing_of_them():
    data = Data(torch.zeros(5, 2), torch.arange(5), torch.tensor([1, 3])).without_labels()
    assert len(data) == 2 and data.y.tolist() == [-1, -1] and torch.equal(data.rows, torch.tensor([1, 3]))
    assert data.labels.unique().tolist() == [-1]
