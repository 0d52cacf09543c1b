"""Clients that never train: dealt, kept out of everything, and judged once they have joined."""

import io
from dataclasses import dataclass

import pytest
import torch
from problems import ran
from rich.console import Console

import fedloom
from fedloom import tasks
from fedloom.cli import main
from fedloom.cli.tables import results, summary
from fedloom.comparison.table import table
from fedloom.data.newcomers import held_out
from fedloom.errors import UsageError
from fedloom.method import client
from fedloom.methods.decentralized.dfedsam import DFedSAM
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.trust.fcp import FCP
from fedloom.plugin import Plugin
from fedloom.report import exports
from fedloom.report.curves import panels
from fedloom.runs import evaluation
from fedloom.runs.experiment import Experiment
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy
from fedloom.testing.lab import alike, difference, trace, without_times

SIZES, LATE = (8, 9, 10, 11), (7, 12)


@dataclass(frozen=True)
class Tuned(FedAvg):
    """A newcomer takes `steps` steps from the model before it is judged; members use the model itself."""

    steps: int = 4

    @client
    def join(self, client, model):
        assert not client.state, "nothing is left of an earlier judgement"
        client.state["model"] = client.descend(model, lr=0.1, steps=self.steps, batch=4)[0]

    @client
    def predict(self, client, model):
        return client.state.get("model", model)


@pytest.fixture(scope="module")
def joined():
    return ran(Tuned(), Toy(SIZES, newcomers=LATE), rounds=3, eval_every=1)


def accuracy(task, w, client):
    net, data = task.network(), task.data(client, "test")
    torch.nn.utils.vector_to_parameters(w.flat, net.parameters())
    return float((net(data.x).argmax(1) == data.y).double().mean())


def test_newcomers_are_judged_by_what_they_have_when_they_have_joined(joined):
    task, row = joined.task, joined.record.final
    each = []
    for k in (4, 5):
        node = fedloom.Client(joined.site, k, {}, "evaluate", 3, 1)
        each.append(accuracy(task, node.descend(joined.server.model, lr=0.1, steps=4, batch=4)[0], k))
    assert row["newcomer_test_accuracy"] == pytest.approx(sum(each) / 2)
    assert row["newcomer_test_accuracy_std"] == pytest.approx(abs(each[0] - each[1]) / 2)
    assert joined.record.clients["newcomers"] == [
        {"id": k, "accuracy": pytest.approx(one), "n": 12} for k, one in zip((4, 5), each, strict=True)
    ]
    assert [one["id"] for one in joined.record.clients["clients"]] == [0, 1, 2, 3]
    untrained = ran(FedAvg(), Toy(SIZES, newcomers=LATE), rounds=3).record.final
    assert untrained["newcomer_test_accuracy"] == pytest.approx(
        sum(accuracy(task, joined.server.model, k) for k in (4, 5)) / 2
    )


def test_what_newcomers_keep_is_forgotten_and_asks_nothing_of_training(joined):
    assert not {4, 5} & {*joined.engine.states}
    asked = {line["function"] for line in joined.record.ledger if {4, 5} & {*line["clients"]}}
    assert asked == {"judge_newcomer"}
    assert {line["kind"] for line in joined.record.ledger if line["function"] == "judge_newcomer"} == {"evaluate"}
    plain = ran(FedAvg(), Toy(SIZES), rounds=3, eval_every=1)
    assert torch.equal(plain.server.model.flat, joined.server.model.flat)
    for row, other in zip(plain.record.metrics, joined.record.metrics, strict=True):
        assert row["gradient_steps"] == other["gradient_steps"] and row["up_bytes"] == other["up_bytes"]
        assert row["virtual_seconds"] == other["virtual_seconds"]


def test_they_choose_no_round():
    made = ran(Tuned(), Toy(SIZES, newcomers=LATE), rounds=4, eval_every=1)
    plain = ran(FedAvg(), Toy(SIZES), rounds=4, eval_every=1)
    assert [r["validation_accuracy"] for r in made.record.metrics] == [
        r["validation_accuracy"] for r in plain.record.metrics
    ]
    assert made.record.selected["round"] == plain.record.selected["round"]


@pytest.mark.parametrize("engine", ["loopback", "pool"])
def test_engines_agree(joined, engine):
    other = ran(Tuned(), Toy(SIZES, newcomers=LATE), rounds=3, eval_every=1, engine=engine)
    alike(trace(joined), trace(other), engine)


def test_vectorized_agrees_nearly(joined):
    other = ran(Tuned(), Toy(SIZES, newcomers=LATE), rounds=3, eval_every=1, engine="vectorized")
    assert difference(trace(joined)["metrics"], trace(other)["metrics"], nearly=0.1) is None


def test_numbers_of_the_population_are_those_of_the_members():
    seen = {}

    @dataclass(frozen=True)
    class Seeing(FedAvg):
        def setup(self, server, clients):
            seen["setup"] = (server.population, len(clients))

        def select(self, server, clients):
            seen["select"] = len(clients)

        def finish(self, server, clients):
            seen["finish"] = (len(clients), len(clients.everybody))

        def observe(self, server, clients):
            seen["observe"] = len(clients)

        def predict_message(self, server, clients):
            seen.setdefault("judged", []).append([*clients])
            return {"model": server.model}

    made = ran(Seeing(), Toy(SIZES, newcomers=LATE), rounds=1)
    assert seen == {"setup": (4, 4), "select": 4, "finish": (4, 4), "observe": 4, "judged": [[0, 1, 2, 3], [4, 5]]}
    assert made.world.population == made.boundary.population == 4 and made.record.metrics[0]["cohort"] == 4
    partition = made.record.partition
    assert partition["population"] == 4 and len(partition["clients"]) == 4
    assert [one["train"] for one in partition["newcomers"]] == [*LATE]
    with pytest.raises(UsageError, match="cohort is 5; there are 4 clients"):
        ran(FedAvg(), Toy(SIZES, newcomers=LATE), rounds=1, cohort=5)


@pytest.mark.parametrize(
    "settings",
    [
        {"dp": "client:noise=1.0,clip=1.0", "cohort": 2},
        {"participation": "weighted", "cohort": 2},
        {"participation": "poisson", "cohort": 2},
        {"speed": "uniform:0.5,2", "bandwidth": "lognormal:1.0"},
        {"availability": "bernoulli:0.7"},
        {"attack": "sign_flip:0.5"},
        {"lost": 0.3, "dropout": 0.2},
    ],
    ids=str,
)
def test_under_every_circumstance_members_are_as_without_newcomers(settings):
    with_, without = (ran(FedAvg(), task, rounds=3, **settings) for task in (Toy(SIZES, newcomers=LATE), Toy(SIZES)))
    assert torch.equal(with_.server.model.flat, without.server.model.flat)
    for row, other in zip(with_.record.metrics, without.record.metrics, strict=True):
        names = [name for name in other if not name.startswith("eval_") and "seconds" not in name]
        assert {name: row[name] for name in names} == {name: other[name] for name in names}, "epsilon included"
        assert row["virtual_seconds"] == other["virtual_seconds"]


def test_of_many_newcomers_some_stand_for_all(monkeypatch):
    monkeypatch.setattr(evaluation, "JUDGED_CLIENTS", 2)
    made = ran(FedAvg(), Toy(SIZES, newcomers=(5, 6, 7, 8, 9)), rounds=1)
    ids = [one["id"] for one in made.record.clients["newcomers"]]
    assert len(ids) == 2 and set(ids) <= {4, 5, 6, 7, 8}


def test_a_blind_run_judges_no_newcomer():
    made = ran(Tuned(), Toy(SIZES, newcomers=LATE), rounds=1, blind=True)
    assert made.record.final["newcomer_test_accuracy"] is None
    assert not any(line["function"] == "judge_newcomer" for line in made.record.ledger)


@dataclass(frozen=True)
class Nothing(Plugin):
    """Adds nothing to its inner method."""


def test_a_plugin_lets_newcomers_join_as_its_inner_method_does(joined):
    row = ran(FCP(inner=Tuned()), Toy(SIZES, newcomers=LATE), rounds=3).record.final
    assert row["newcomer_test_accuracy"] == joined.record.final["newcomer_test_accuracy"]
    assert row["newcomer_test_coverage"] is not None
    row = ran(Nothing(inner=Tuned()), Toy(SIZES, newcomers=LATE), rounds=3).record.final
    assert row["newcomer_test_accuracy"] == joined.record.final["newcomer_test_accuracy"]


# Who they are


def test_a_number_or_a_share_of_the_clients_is_drawn_by_the_seed():
    five = [held_out(5, None, 20, seed) for seed in range(3)]
    assert all(len(set(late)) == 5 and late == sorted(late) and max(late) < 20 for late in five)
    assert five[0] != five[1] and held_out(5, None, 20, 0) == five[0]
    assert len(held_out(0.2, None, 20, 0)) == 4 and len(held_out(0.01, None, 20, 0)) == 1
    assert held_out(None, None, 20, 0) == held_out(0.0, None, 20, 0) == []
    assert held_out("b", ["a", "b", "c"], 3, 0) == [1] and held_out("c, a", ["a", "b", "c"], 3, 0) == [0, 2]
    assert held_out("a,b", ["a,b", "a", "b"], 3, 0) == [0], "a name may have a comma"


@pytest.mark.parametrize(
    ("wanted", "names", "told"),
    [
        (3.0, None, "newcomers=3.0 are all of the 3 clients; leave at least one"),
        (7.0, None, "are all of the 3 clients"),
        (0.9, None, "are all of the 3 clients"),
        ("a,b,c", ["a", "b", "c"], "newcomers=a,b,c are all of the 3 clients"),
        ("photo", None, "newcomers='photo' names clients, which have names where a column does it: set partition="),
        ("bb", ["a", "b", "c"], "unknown client among newcomers 'bb'"),
    ],
)
def test_who_cannot_be_held_out_is_told(wanted, names, told):
    with pytest.raises(UsageError, match=told):
        held_out(wanted, names, 3, 0)


@pytest.mark.parametrize("wrong", [-1, 1.5, -0.2])
def test_a_share_is_below_one_and_a_number_is_whole(wrong):
    with pytest.raises(UsageError, match="newcomers is"):
        Spec(newcomers=wrong)


def built(**settings):
    return tasks.build(Spec.of({"data": "digits", "clients": 6, "partition": "dirichlet:0.5", **settings}))


def test_held_out_clients_are_the_last_ones_with_what_they_would_have_had():
    whole, held = built(), built(newcomers=2)
    f, late = held.federation, held_out(2, None, 6, 0)
    order = [k for k in range(6) if k not in late] + late
    assert (held.population, held.newcomers, len(f.train)) == (4, 2, 6)
    for split in ("train", "validation", "test"):
        for place, k in enumerate(order):
            assert torch.equal(held.data(place, split).rows, whole.data(k, split).rows)
    members = torch.cat([held.data(k, "test").rows for k in range(4)]).sort().values
    assert torch.equal(held.global_test().rows, members), "the global test is the population's"
    assert [one["name"] for one in f.table()["clients"] + f.table()["newcomers"]] == [str(k) for k in order]
    told = f.table()
    assert told["population"] == 4 and [one["id"] for one in told["newcomers"]] == [4, 5]
    for one in told["clients"] + told["newcomers"]:
        y = held.data(one["id"], "train").y
        assert one["train"] == len(y) and one["labels"] == torch.bincount(y, minlength=10).tolist()


def test_the_normalization_knows_members_only():
    held = built(newcomers=2)
    x = held.federation.x
    members = torch.cat([x[held.data(k, "train").rows] for k in range(4)])
    assert abs(float(members.mean())) < 1e-5 < abs(float(x[held.federation.train.rows].mean()))
    assert float(members.std()) == pytest.approx(1.0, abs=1e-3)


@pytest.fixture
def domains(tmp_path):
    lines = ["a,b,domain,label"]
    generator = torch.Generator().manual_seed(0)
    for domain, shift in (("art", 0.0), ("photo", 2.0), ("sketch", 5.0)):
        for i in range(40):
            a, b = (torch.randn(2, generator=generator) + shift).tolist()
            lines.append(f"{a:.3f},{b:.3f},{domain},{'yes' if i % 2 else 'no'}")
    path = tmp_path / "domains.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_a_domain_is_left_out_by_its_name(domains, tmp_path):
    settings = {"data": domains, "label": "label", "partition": "column:domain", "newcomers": "photo", "rounds": 2}
    run = fedloom.run("fedavg", **settings, out=tmp_path / "run")
    assert [one["name"] for one in run.partition["clients"]] == ["art", "sketch"]
    assert [one["name"] for one in run.partition["newcomers"]] == ["photo"]
    assert run.partition["population"] == 2 and run.spec.newcomers == "photo"
    assert run.metrics[0]["cohort"] == 2 and run.final["newcomer_test_accuracy"] is not None
    with pytest.raises(UsageError, match="unknown client among newcomers 'foto'; did you mean 'photo'"):
        fedloom.run("fedavg", **settings | {"newcomers": "foto"})
    with pytest.raises(UsageError, match="the server's public rows would be the newcomers' too"):
        fedloom.run("fedavg", **settings | {"public": 0.1})


def test_a_resumed_run_has_the_same_newcomers(tmp_path):
    settings = {"data": "digits", "clients": 6, "partition": "iid", "newcomers": 0.4, "rounds": 3, "model": "mlp:8"}

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedloom.run("fedavg", **settings, out=tmp_path / "run", on_round=stop)
    resumed = fedloom.resume(tmp_path / "run")
    through = fedloom.run("fedavg", **settings, out=tmp_path / "through")
    assert [*map(without_times, resumed.metrics)] == [*map(without_times, through.metrics)]
    assert resumed.partition == through.partition and resumed.partition["population"] == 4
    assert resumed.spec.clients == 6 and resumed.spec.newcomers == 0.4
    again = Experiment(Run(tmp_path / "run").spec)
    assert (again.task.population, len(again.newcomers)) == (4, 2)


# Where they make no sense


@pytest.mark.parametrize(
    ("method", "settings", "told"),
    [
        ("dfedsam", {}, "nothing that dfedsam has learned comes to a client that was never asked"),
        ("fed_pub", {"problem": "graph:sbm"}, "newcomers=1.0: the problem graph:sbm holds no clients out"),
        ("fedast", {"problem": "several:digits"}, "newcomers=1.0 does not go with several problems"),
        ("masha", {"problem": "saddle"}, "newcomers=1.0: the problem saddle holds no clients out"),
        ("split_learning", {"problem": "vertical:0.1"}, "newcomers=1.0: the problem vertical:0.1 holds"),
    ],
)
def test_newcomers_without_effect_are_refused_before_the_first_round(method, settings, told, tmp_path):
    with pytest.raises(UsageError, match=told):
        fedloom.run(method, data="digits", clients=4, newcomers=1, rounds=1, out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_task_given_in_python_brings_its_own():
    with pytest.raises(UsageError, match=r"newcomers=1\.0 has no effect on a task given in Python"):
        fedloom.run("fedavg", Toy(SIZES), newcomers=1, rounds=1)
    assert "newcomer_test_accuracy" in fedloom.run("fedavg", Toy(SIZES, newcomers=LATE), rounds=1).final
    with pytest.raises(UsageError, match="nothing that dfedsam"):
        ran(DFedSAM(), Toy(SIZES, newcomers=LATE), rounds=1)
    task = Toy(SIZES)
    task.newcomers = -1
    with pytest.raises(UsageError, match=r"Toy\.newcomers is -1; expected a whole number"):
        fedloom.run("fedavg", task, rounds=1)


# Whoever reads the record


def test_reports_and_tables_show_them(tmp_path, capsys):
    done = fedloom.compare(["fedavg", "fedprox"], Toy(SIZES, newcomers=LATE), out=tmp_path / "c", seeds=2, rounds=1)
    made = table(done)
    assert all(len(row.measures["newcomer_test_accuracy"].values) == 2 for row in made.rows)
    assert "newcomer_test_accuracy" in exports.wide_columns(made)
    assert "newcomers" in (tmp_path / "c" / "report.html").read_text()
    run = done.cells[0].run
    steps = sum(row["gradient_steps"] for row in run.metrics) / 4
    assert done.cells[0].seed == 0 and made.rows[0].measures["steps_per_client"].values[0] == pytest.approx(steps)
    out = Console(file=io.StringIO(), width=200)
    out.print(results(summary(run)))
    assert "newcomers" in out.file.getvalue()
    assert f"{run.final['newcomer_test_accuracy']:.4f}" in out.file.getvalue()
    assert any(curve.label == "newcomers" for panel in panels(run) for curve in panel.curves)
    plain = fedloom.run("fedavg", Toy(SIZES), rounds=1, out=tmp_path / "plain")
    assert "Newcomers" not in (plain.path / "report.html").read_text()
    late = fedloom.run("fedavg", Toy(SIZES, newcomers=LATE), rounds=1, out=tmp_path / "late")
    assert "Newcomers, test accuracy" in (late.path / "report.html").read_text()
    assert main(["data", "digits", "clients=6", "newcomers=2"]) == 0
    said = capsys.readouterr().out
    assert "4 clients with" in said and "2 newcomers beside them" in said
