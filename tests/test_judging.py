"""What is judged: several models and several tests by name, values that are no model, and who is told for whom."""

import io
from dataclasses import dataclass, replace

import pytest
import torch
from problems import ran
from rich.console import Console

import fedloom
from fedloom.cli.tables import print_run, results, summary
from fedloom.cohort import Each
from fedloom.comparison import measures
from fedloom.comparison.table import table
from fedloom.errors import CodecError, UsageError
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.trust.ccvr import CCVR
from fedloom.methods.trust.fcp import FCP
from fedloom.quality import ACCURACY
from fedloom.report import exports
from fedloom.report.comparison import write as write_comparison
from fedloom.report.curves import panels
from fedloom.report.printed import print_table
from fedloom.runs import evaluation
from fedloom.runs.experiment import Experiment
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.runs.telling import Telling
from fedloom.task import Data
from fedloom.tasks.saddle import Saddle
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab
from fedloom.testing.lab import alike, trace
from fedloom.vector import Vector

SIZES = (8, 9, 10, 11)


@dataclass(frozen=True)
class Two(FedAvg):
    """Judges its model, and the same one halfway to zero, in this order or the other."""

    first: str = "whole"

    def two(self, model):
        both = {"whole": model, "half": 0.5 * model}
        return {name: both[name] for name in sorted(both, key=lambda name: name != self.first)}

    def observe(self, server, clients):
        return self.two(server.model)

    @client
    def predict(self, client, model):
        return self.two(model)


class Domains(Toy):
    """Toy with two further tests."""

    def global_tests(self):
        return {"even": self.joined(0, 2), "odd": self.joined(1, 3)}

    def joined(self, *clients):
        return Data(self.x, self.y, torch.cat([self.data(k, "test").rows for k in clients]))


def by_hand(made, w, data):
    """Loss and accuracy without any code that evaluates."""
    net = made.task.network()
    torch.nn.utils.vector_to_parameters(w.flat, net.parameters())
    with torch.no_grad():
        out = net(data.x)
    right = (out.argmax(1) == data.y).double().mean()
    return float(torch.nn.functional.cross_entropy(out, data.y)), float(right)


@pytest.fixture(scope="module")
def two():
    return ran(Two(), Domains(SIZES), rounds=2)


def test_every_model_is_measured_on_every_global_test(two):
    row, task, w = two.record.final, two.task, two.server.model
    tests = {"": task.global_test()} | {f"@{name}": data for name, data in task.global_tests().items()}
    for test, data in tests.items():
        for model, judged in (("", w), ("@whole", w), ("@half", 0.5 * w)):
            loss, accuracy = by_hand(two, judged, data)
            assert row[f"global_test_accuracy{model}{test}"] == pytest.approx(accuracy, abs=1e-9)
            assert row[f"global_test_loss{model}{test}"] == pytest.approx(loss, rel=1e-5)
    assert {name for name in row if name.startswith("global_test_accuracy")} == {
        f"global_test_accuracy{model}{test}" for model in ("", "@whole", "@half") for test in tests
    }
    assert not any(name.startswith("global_test_n") for name in row)


def test_every_model_is_measured_at_every_client(two):
    row, task, w = two.record.final, two.task, two.server.model
    for split, called in (("test", "personal_test_accuracy"), ("validation", "validation_accuracy")):
        for model, judged in (("", w), ("@whole", w), ("@half", 0.5 * w)):
            each = torch.tensor([by_hand(two, judged, task.data(k, split))[1] for k in range(4)])
            assert row[f"{called}{model}"] == pytest.approx(float(each.mean()))  # as many rows each
            if split == "test":
                assert row[f"personal_test_accuracy_std{model}"] == pytest.approx(float(each.std(unbiased=False)))
    assert not any("personal_test_loss" in name for name in row)
    assert [one["accuracy"] for one in two.record.clients["clients"]] == [
        pytest.approx(by_hand(two, w, task.data(k, "test"))[1]) for k in range(4)
    ]


def test_the_first_is_the_main_one_and_chooses_the_round():
    half, whole = (ran(Two(first=first), Toy(SIZES), rounds=4, eval_every=1) for first in ("half", "whole"))
    for one, other in zip(half.record.metrics, whole.record.metrics, strict=True):
        for name in ("global_test_accuracy", "personal_test_accuracy", "validation_accuracy", "global_test_loss"):
            assert one[name] == one[f"{name}@half"] if f"{name}@half" in one else True
            assert one.get(f"{name}@whole") == other.get(f"{name}@whole"), "the order changes no measure"
            assert other[name] == other.get(f"{name}@whole", other[name])
    best = max(half.record.metrics, key=lambda row: row["validation_accuracy@half"])
    assert half.record.selected == best


def test_one_model_has_no_named_measures():
    made = ran(FedAvg(), Toy(SIZES), rounds=1)
    assert not any("@" in name for name in made.record.final)


def test_all_engines_measure_the_same(two):
    for engine in ("loopback", "pool", "vectorized"):
        other = ran(Two(), Domains(SIZES), rounds=2, engine=engine, workers=2 if engine == "pool" else 0)
        if engine == "vectorized":
            assert other.record.final.keys() - {"note"} == two.record.final.keys() - {"note"}
        else:
            alike(trace(two), trace(other), engine)


def test_a_blind_run_looks_at_no_test_under_any_name():
    class Watched(Domains):
        def global_test(self):
            raise AssertionError("looked")

        global_tests = global_test

    row = ran(Two(), Watched(SIZES), rounds=1, blind=True).record.final
    assert row["validation_accuracy@half"] is not None
    assert not any(name.startswith(("global_test_accuracy@", "personal_test_accuracy@")) for name in row)


@dataclass(frozen=True)
class Told(FedAvg):
    """Judges what it is told to by a function of the model, the round and, at clients, the client."""

    said: int = 0
    where: str = "observe"

    def setup(self, server, clients):
        server.now = 0

    def round(self, server, cohort):
        FedAvg.round(self, server, cohort)
        server.now = server.round

    def observe(self, server, clients):
        return SAID[self.said](server.model, server.round, 0) if self.where == "observe" else None

    @client
    def predict(self, client, model, now):
        return SAID[self.said](model, now, client.id) if self.where == "predict" else model


SAID = [
    lambda model, round, client: {},
    lambda model, round, client: {"a@b": model},
    lambda model, round, client: {1: model},
    lambda model, round, client: {" a": model},
    lambda model, round, client: model.flat,
    lambda model, round, client: {"a": 3},
    lambda model, round, client: {"first": model, "second": model} if round < 2 else {"second": model, "first": model},
    lambda model, round, client: model if round < 2 else {"first": model},
    lambda model, round, client: {"even" if client % 2 == 0 else "odd": model},
    lambda model, round, client: {"a": model, "b": model} if client else {"b": model, "a": model},
    lambda model, round, client: {"a": model} if client else model,
]
COMPLAINTS = [
    r"what is judged is an empty dict; expected at least one entry by name",
    r"what is judged has the name 'a@b'; expected letters, digits, spaces and",
    r"what is judged has the name 1; expected",
    r"what is judged has the name ' a'; expected",
    r"what is judged is a Tensor; a Toy judges a Vector, or a function from inputs to scores; several of them are",
    r"what is judged is a int; a Toy judges a Vector",
    r"{} named 'first' first in an earlier round, and now 'second'",
    r"{} named 'nothing' first in an earlier round, and now 'first'",
    r"predict names what is judged differently: client 0 \['even'\], client 1 \['odd'\]; give the same names",
    r"predict names what is judged differently: client 0 \['b', 'a'\], client 1 \['a', 'b'\]",
    r"predict names what is judged differently: client 0 one without a name, client 1 \['a'\]",
]


@pytest.mark.parametrize("where", ["observe", "predict"])
@pytest.mark.parametrize("said", range(8))
def test_what_cannot_be_judged_is_told(said, where):
    with pytest.raises((UsageError, fedloom.errors.RunError), match=COMPLAINTS[said].format(where)):
        ran(Told(said=said, where=where), Toy(SIZES), rounds=2, eval_every=1)


@pytest.mark.parametrize("said", range(8, 11))
def test_names_are_the_same_at_all_clients(said):
    with pytest.raises(UsageError, match=COMPLAINTS[said]):
        ran(Told(said=said, where="predict"), Toy(SIZES), rounds=1)


def test_the_main_one_stays_the_same_after_a_resume(tmp_path):
    method = Told(said=6)

    def stop(row):
        raise KeyboardInterrupt

    spec = Spec.of({"method": method.to_spec(), "partition": "given", "rounds": 3})
    with pytest.raises(KeyboardInterrupt):
        Experiment(spec, Toy(SIZES), method).begin(tmp_path / "run").go(stop)
    record = Run(tmp_path / "run")
    with pytest.raises(UsageError, match="named 'first' first in an earlier round"):
        Experiment(record.spec, Toy(SIZES), method).take_up(record).go()


class Clashing(Domains):
    def global_tests(self):
        return {"half": self.joined(0)}


class Hollow(Domains):
    def global_tests(self):
        return {"none": Data(self.x, self.y, torch.arange(0))}


class Odd(Domains):
    def global_tests(self):
        return {"a/b": self.joined(0)}


class Undeclared(Toy):
    """A task whose class says nothing of what its judge gives."""

    gives = ("mae", "rmse")

    def judge(self, scores, data):
        right = float((scores(data.x).argmax(1) == data.y).double().mean())
        return {"n": len(data), "loss": 1 - right} | dict.fromkeys(self.gives, 1 - right)


class Nothing(Undeclared):
    gives = ("wrongness",)


def test_a_task_that_declares_no_measure_is_judged_by_those_that_it_gives(tmp_path):
    assert [one.name for one in Undeclared().qualities] == ["mae", "rmse"] and Toy().qualities == (ACCURACY,)
    run = fedloom.run("fedavg", Undeclared(), rounds=3, out=tmp_path / "run")
    assert all({"mae", "rmse"} <= one.keys() for one in run.clients["clients"])
    best = min(run.metrics, key=lambda row: row["validation_mae"])
    assert run.selected["round"] == best["round"]
    results = fedloom.compare(
        ["fedavg", "local"], Undeclared(), seeds=3, rounds=3, out=tmp_path / "c", baseline="local"
    )
    lines = (tmp_path / "c" / "report.md").read_text().splitlines()
    assert results.spec.metric in (None, "personal_test_mae") and "personal test MAE" in next(
        line for line in lines if "method" in line
    )
    (reference,) = (line for line in lines if line.startswith("| local"))
    assert "| (the reference) |" in reference
    assert "(the reference)" not in next(line for line in lines if line.startswith("| fedavg"))
    told = "Nothing.judge gives n, loss, wrongness, and no measure .* error: lower is better"
    for begin in (lambda: fedloom.run("fedavg", Nothing(), rounds=1), lambda: fedloom.compare(["fedavg"], Nothing())):
        with pytest.raises(UsageError, match=told):
            begin()


class Marked(Toy):
    def judge(self, scores, data):
        return {"n": len(data), "accuracy@now": 1.0}


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (Clashing, r"Clashing.global_tests and what is judged both have the name 'half'; rename one"),
        (Hollow, r"Hollow.global_tests has no samples under 'none'; leave it out"),
        (Odd, r"Odd.global_tests has the name 'a/b'; expected letters"),
        (Marked, r"Marked.judge calls a measure 'accuracy@now'; what stands behind an @"),
    ],
)
def test_tests_that_cannot_be_told_apart_are_told(task, told):
    with pytest.raises(UsageError, match=told):
        ran(Two(), task(SIZES), rounds=1)


# Who is judged


@dataclass(frozen=True)
class Own(FedAvg):
    """The server keeps a model for each client, and sends each that is judged its own."""

    def predict_message(self, server, clients):
        return {"model": Each({k: (k + 1) * server.model for k in clients})}


def test_values_for_single_clients_are_made_and_sent_for_those_that_are_judged(monkeypatch):
    monkeypatch.setattr(evaluation, "JUDGED_CLIENTS", 2)
    made = ran(Own(), Toy(SIZES * 2), rounds=1)
    lines = [line for line in made.record.ledger if line["kind"] == "evaluate" and line["direction"] == "down"]
    asked = [one["id"] for one in made.record.clients["clients"]]
    assert len(asked) == 2 and {k for line in lines for k in line["clients"]} == set(asked)
    task, w = made.task, made.server.model
    for one in made.record.clients["clients"]:
        k = one["id"]
        assert one["accuracy"] == pytest.approx(by_hand(made, (k + 1) * w, task.data(k, "test"))[1])


def test_of_many_clients_a_draw_by_the_seed_stands_for_all(monkeypatch):
    monkeypatch.setattr(evaluation, "JUDGED_CLIENTS", 2)

    def judged(seed):
        return tuple(one["id"] for one in ran(FedAvg(), Toy((9,) * 9), rounds=1, seed=seed).record.clients["clients"])

    drawn = [judged(seed) for seed in range(5)]
    assert len(set(drawn)) > 2 and judged(0) == drawn[0] and all(len(set(two)) == 2 for two in drawn)


@dataclass(frozen=True)
class Parity(FedAvg):
    """Clients hear the model if an even number of them is judged, and else its opposite."""

    def predict_message(self, server, clients):
        return {"model": (-1) ** len(clients) * server.model}


def test_the_message_is_made_for_those_that_are_judged(monkeypatch):
    monkeypatch.setattr(evaluation, "JUDGED_CLIENTS", 2)
    made = ran(Parity(lr=0.2, epochs=3), Toy((9,) * 7), rounds=6)
    for one in made.record.clients["clients"]:
        assert one["accuracy"] == pytest.approx(by_hand(made, made.server.model, made.task.data(one["id"], "test"))[1])
    assert made.record.final["personal_test_accuracy"] > 0.5, "where the opposite of the model is mostly wrong"


class Unseen(Toy):
    """Client 1 has no test rows."""

    def data(self, client, split):
        whole = super().data(client, split)
        return replace(whole, rows=whole.rows[:0]) if (client, split) == (1, "test") else whole


def test_who_has_no_test_rows_is_not_among_those_that_were_judged():
    made = ran(FedAvg(), Unseen((9,) * 4), rounds=1)
    assert [one["id"] for one in made.record.clients["clients"]] == [0, 2, 3]
    assert made.record.final["personal_test_accuracy"] is not None


# Values that are no model


class Counted(Toy):
    """How often does each class come? Judged is an estimate of the shares [3], by its distance from the truth."""

    judges_values = True
    goal = ("right", 0.9)

    def judge(self, scores, data):
        shares = scores["shares"] if isinstance(scores, dict) else scores
        truth = torch.bincount(data.y, minlength=3) / len(data)
        return {"n": len(data), "right": 1 - float((shares - truth).abs().sum()) / 2}


@dataclass(frozen=True)
class Count(Method):
    """Sums counts; `form` says how they are judged."""

    form: str = "tensor"

    def setup(self, server, clients):
        server.shares = torch.zeros(3)

    def round(self, server, cohort):
        counts = cohort.mean(self.count).counts
        server.shares = counts / counts.sum()

    @client
    def count(self, client):
        return {"counts": torch.bincount(client.data.y, minlength=3).float()}

    def observe(self, server, clients):
        shares = server.shares
        forms = {
            "tensor": shares,
            "named": {"all": shares, "even": torch.full((3,), 1 / 3)},
            "dict": {"found": {"shares": shares, "more": [1, "two"]}},
            "function": lambda x: x,
            "set": {1, 2},
        }
        return forms[self.form]

    @client
    def predict(self, client, shares):
        return shares


def shared(y):
    return torch.bincount(y, minlength=3) / len(y)


@pytest.mark.parametrize("form", ["tensor", "named", "dict"])
def test_a_value_is_judged_in_place_of_scores(form):
    task = Counted(SIZES)
    made = ran(Count(form=form), task, rounds=1)
    found = shared(torch.cat([task.data(k, "train").y for k in range(4)]))
    row, whole = made.record.final, task.global_test().y
    right = 1 - float((found - shared(whole)).abs().sum()) / 2
    assert row["global_test_right"] == pytest.approx(right)
    apart = [1 - float((found - shared(task.data(k, "test").y)).abs().sum()) / 2 for k in range(4)]
    assert row["personal_test_right"] == pytest.approx(sum(apart) / 4)
    if form == "named":
        even = 1 - float((1 / 3 - shared(whole)).abs().sum()) / 2
        assert row["global_test_right@even"] == pytest.approx(even)
        assert row["global_test_right@all"] == row["global_test_right"]
    if form == "dict":
        assert row["global_test_right@found"] == row["global_test_right"]


def test_values_cross_to_clients_on_every_engine():
    plain = trace(ran(Count(), Counted(SIZES), rounds=2))
    for engine in ("loopback", "pool", "vectorized"):
        alike(plain, trace(ran(Count(), Counted(SIZES), rounds=2, engine=engine, workers=0)), engine)


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("function", r"what is judged is a function; a Counted judges message values, such as a tensor; several"),
        ("set", r"what is judged: .*set"),
    ],
)
def test_what_is_no_message_value_is_told(form, told):
    with pytest.raises((UsageError, CodecError), match=told):
        ran(Count(form=form), Counted(SIZES), rounds=1)


def test_a_graph_is_judged_by_its_edges():
    """An adjacency matrix, estimated from means of products at the clients, against the one that made the data."""

    class Chain(Counted):
        truth = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0]])

        def judge(self, scores, data):
            assert scores.dtype == torch.bool
            wrong = (scores != self.truth.bool()).sum()
            return {"n": len(data), "shd": float(wrong), "f1": float((scores & self.truth.bool()).sum()) / 2}

    @dataclass(frozen=True)
    class Given(Count):
        def observe(self, server, clients):
            return torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]]).bool()

        @client
        def predict(self, client, shares):
            return torch.zeros(3, 3, dtype=torch.bool)

    row = ran(Given(), Chain(SIZES), rounds=1).record.final
    assert (row["global_test_shd"], row["personal_test_shd"]) == (1.0, 2.0)
    assert (row["global_test_f1"], row["personal_test_f1"]) == (1.0, 0.0)


def test_a_saddle_point_is_judged_as_the_numbers_that_it_is():
    task = Saddle(width=4, reg=2.0, sizes=(4,) * 3)
    site = Lab(FedAvg).begun(task).site
    node = fedloom.Server(site, 3)
    assert node.evaluate(site.initial)["solved"] == pytest.approx(0.0)
    assert node.evaluate(Vector(task.solution(), site.initial.layout))["solved"] == pytest.approx(1.0)


# Whoever reads the record


NAMED = ("@whole", "@half", "@even", "@odd", "@half@odd")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return fedloom.run(Two(), Domains(SIZES), rounds=2, out=tmp_path_factory.mktemp("named") / "run")


def test_the_report_of_a_run_shows_every_name(recorded):
    page = (recorded.path / "report.html").read_text()
    for name in NAMED:
        assert f"Global model, test accuracy {name}<" in page
    assert "Personal test accuracy @half<" in page and "Validation accuracy @half<" in page
    titles = {panel.title: [curve.label for curve in panel.curves] for panel in panels(recorded)}
    assert set(titles["Global model: one by one"]) >= set(NAMED)
    assert titles["Personal: one by one"] == ["@half", "@whole"]
    plain = fedloom.run("fedavg", Toy(SIZES), rounds=1)
    assert not any("one by one" in panel.title for panel in panels(plain))


def test_the_command_line_shows_every_name(recorded, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = Console(file=io.StringIO(), width=200)
    out.print(results(summary(recorded)))
    lines = {line.split()[0]: line.split()[1:] for line in out.file.getvalue().splitlines() if "@" in line}
    assert lines.keys() >= {*NAMED}
    assert f"{recorded.selected['global_test_accuracy@half']:.4f}" in lines["@half"]
    assert f"{recorded.selected['personal_test_accuracy@half']:.4f}" in lines["@half"]
    print_run(summary(recorded))
    assert "@half@odd" in capsys.readouterr().out


def test_a_line_of_a_round_has_every_name():
    telling = Telling(1)
    row = {"global_test_accuracy": 0.5, "personal_test_accuracy": 0.4, "global_test_accuracy@a": 0.25}
    telling._count(row | {"up_bytes": 0, "down_bytes": 0, "peer_bytes": 0})
    assert (telling.value, telling.each) == (0.5, " (a 0.2500)")
    row = {"global_test_accuracy": None, "personal_test_accuracy": 0.4, "personal_test_accuracy@b": 0.125}
    telling._count(row | {"up_bytes": 0, "down_bytes": 0, "peer_bytes": 0})
    assert (telling.value, telling.each) == (0.4, " (b 0.1250)")


HALF = '''
from dataclasses import dataclass
from fedloom import client
from fedloom.methods.optimize.fedavg import FedAvg


@dataclass(frozen=True)
class Half(FedAvg):
    """Is half of a model as good?"""

    def observe(self, server, clients):
        return {"whole": server.model, "half": 0.5 * server.model}

    @client
    def predict(self, client, model):
        return {"whole": model, "half": 0.5 * model}
'''


def test_a_comparison_has_a_column_for_every_name(tmp_path):
    (tmp_path / "halves.py").write_text(HALF)
    done = fedloom.compare(
        [{"name": str(tmp_path / "halves.py"), "label": "two"}, "fedavg"],
        Domains(SIZES),
        out=tmp_path / "c",
        seeds=2,
        rounds=1,
        metric="global_test_accuracy@even",
    )
    made = table(done)
    two, fedavg = made.rows
    assert len(two.measures["global_test_accuracy@half"].values) == 2
    assert not fedavg.measures["global_test_accuracy@half"].values, "whoever has none shows none"
    assert len(fedavg.measures["global_test_accuracy@odd"].values) == 2
    assert fedavg.score.mean == fedavg.measures["global_test_accuracy@even"].mean is not None
    columns = exports.wide_columns(made)
    assert "global_test_accuracy@odd" in columns and "personal_test_accuracy@half" in columns
    assert "global_test_accuracy@even" not in columns, "it is the score"
    plain = [name.partition("@")[0] for name in columns]
    assert plain == [name for name in (*made.metrics, *exports.COSTS) for _ in range(plain.count(name))], (
        "each behind its measure"
    )
    assert "global test accuracy @odd (%)" in exports.markdown(made, [])
    assert "global_test_accuracy@odd_low" in exports.rows_csv(made).splitlines()[0]
    assert "global test accuracy @odd, %" in write_comparison(done).read_text()
    out = Console(file=io.StringIO(), width=900)
    print_table(out, done)
    assert "global test accuracy @even, %" in out.file.getvalue() and "@half@odd" in out.file.getvalue()


@pytest.mark.parametrize("wrong", ["global_test_acuracy@a", "worst_decile_accuracy@a", "loss@a"])
def test_a_metric_by_name_is_one_that_is_recorded(wrong):
    with pytest.raises(UsageError, match="unknown metric"):
        measures.metric(wrong)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow", "ignore:The ``noload``:DeprecationWarning")
def test_mlflow_takes_the_names_in_its_own_form(tmp_path):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    run = fedloom.run(Two(), Toy(SIZES), rounds=1, out=tmp_path / "run", track="mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{run.path / 'track' / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedloom")
    told = client.search_runs([experiment.experiment_id])[0].data.metrics
    assert told["global_test_accuracy/half"] == pytest.approx(run.final["global_test_accuracy@half"])


def test_a_plugin_passes_on_what_its_inner_method_judges():
    plain = ran(Two(), Domains(SIZES), rounds=2).record.final
    around = ran(CCVR(inner=Two()), Domains(SIZES), rounds=2).record.final
    assert plain.keys() <= around.keys()
    measured = ran(FCP(inner=Two(first="half")), Toy(SIZES), rounds=1).record.final
    assert "personal_test_coverage" in measured and "personal_test_accuracy@half" in measured
