"""Planned rounds and phases: where a run stands, what is refused before it, and what a resumed run may change."""

from dataclasses import dataclass

import pytest

import fedloom
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.phases import Phase, Scheduled, missed, one_of_each, spans
from fedloom.plugin import Plugin
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy
from fedloom.testing import difference, trace


@dataclass(frozen=True)
class Stages(Method):
    """Trains together, asks everybody once, and trains on."""

    lr: float = 0.1
    warm: int = 2

    compressible = ("delta",)
    private = ("delta",)

    def phases(self, server):
        return [("warm", self.warm), ("look", 1), ("on", None)]

    def setup(self, server, clients):
        server.seen = []
        server.sizes = {}

    def select(self, server, clients):
        return clients if server.phase.name == "look" else None

    def round(self, server, cohort):
        server.seen = [*server.seen, [server.phase.name, server.phase.round, server.phase.rounds]]
        if server.phase.name == "look":
            server.sizes = {up.client: up.size for up in cohort.call(self.look)}
        else:
            server.model = server.model + cohort.mean(self.local, model=server.model).delta

    @client
    def look(self, client):
        return {"size": client.n}

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, batch=10)
        return {"delta": w - model}


@dataclass(frozen=True)
class Fading(FedAvg):
    """Its rate falls to nothing over the rounds that are planned."""

    scheduled = True

    def round(self, server, cohort):
        share = 1 - (server.round - 1) / server.planned
        server.model = server.model + share * cohort.mean(self.local, weight="n", model=server.model).delta


@dataclass(frozen=True)
class Both(Stages):
    """Phases that are shares of what is planned."""

    scheduled = True

    def phases(self, server):
        return [("warm", server.planned // 2), ("look", 1), ("on", None)]


@dataclass(frozen=True)
class Around(Plugin):
    """Nothing of its own."""

    inner: Method = FedAvg()


def begun(method, out=None, **settings):
    given = {"method": method.to_spec(), "partition": "given", "rounds": 5, **settings}
    return Experiment(Spec.of(given), Toy(), method).begin(out)


def ran(method, out=None, **settings):
    made = begun(method, out, **settings)
    made.go()
    return made


def test_spans_of_phases():
    given = [("a", 2), ("b", 0), ("c", 1), ("d", None)]
    assert [(s.name, s.first, s.rounds) for s in spans(given)] == [("a", 1, 2), ("c", 3, 1), ("d", 4, None)]
    assert [(s.name, s.first, s.rounds) for s in spans(given, 9)][-1] == ("d", 4, 6)
    assert [s.name for s in spans(given, 3)] == ["a", "c"], "nothing is left for d"
    assert spans([]) == []


@pytest.mark.parametrize(
    "wrong, why",
    [
        ([("a", 1)], "a has 1 rounds.*the last"),
        ([("a", None), ("b", None)], "a has None rounds"),
        ([("a", -1), ("b", None)], "a has -1 rounds"),
        ([("a", 1.5), ("b", None)], "a has 1.5 rounds"),
        ([("a", True), ("b", None)], "a has True rounds"),
        ([("a", 1), ("a", None)], "a name of its own"),
    ],
)
def test_phases_that_are_none_are_told_before_the_first_round(wrong, why):
    with pytest.raises(UsageError, match=why):
        spans(wrong)

    @dataclass(frozen=True)
    class Wrong(Stages):
        def phases(self, server):
            return wrong

    with pytest.raises(UsageError, match=why):
        Experiment(Spec.of({"method": "fedavg", "partition": "given"}), Toy(), Wrong())


def test_where_a_run_stands():
    stands = Scheduled()
    stands.plan_rounds(7)
    for round, expected in {1: ("a", 1, 2), 2: ("a", 2, 2), 3: ("b", 1, 5), 7: ("b", 5, 5)}.items():
        stands.enter([("a", 2), ("b", None)], round)
        assert stands.phase == Phase(*expected)
    stands.enter([("a", 2), ("b", None)], 0)
    with pytest.raises(UsageError, match="in rounds and after them"):
        stands.phase  # noqa: B018


@pytest.mark.parametrize("engine", ["serial", "loopback", "pool"])
def test_a_method_is_told_its_phase_in_every_box(engine):
    made = ran(Stages(), engine=engine, workers=2 if engine == "pool" else 0, cohort=2)
    expected = [["warm", 1, 2], ["warm", 2, 2], ["look", 1, 1], ["on", 1, None], ["on", 2, None]]
    assert made.server.seen == expected and sorted(made.server.sizes) == [0, 1, 2, 3]
    assert [row["cohort"] for row in made.record.metrics] == [2, 2, 4, 2, 2]
    assert made.server.phase == Phase("on", 2, None), "also after the last round"
    around = ran(Around(Stages()), cohort=2)
    assert difference(trace(made)["server"], trace(around)["server"]) is None


def test_the_last_phase_of_a_scheduled_method_knows_its_rounds():
    made = ran(Both(), rounds=7)
    assert made.server.seen[-1] == ["on", 3, 3] and made.server.seen[2] == ["warm", 3, 3]
    assert Around(Both()).scheduled and not Around(Stages()).scheduled


def test_planned_rounds_are_for_methods_that_say_so():
    @dataclass(frozen=True)
    class Secretly(Fading):
        scheduled = False

    with pytest.raises(UsageError, match="declares scheduled = True"):
        ran(Secretly())
    one, other = ran(Fading(lr=0.1), rounds=2), ran(Fading(lr=0.1), rounds=4)
    assert difference(one.record.metrics[0]["train_loss"], other.record.metrics[0]["train_loss"]) is None
    assert difference(one.server.model, other.server.model) is not None


def stopped(method, folder):
    """A run of five rounds that stops after two."""

    def stop(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    made = begun(method, folder)
    with pytest.raises(KeyboardInterrupt):
        made.go(stop)
    return made.record


@pytest.mark.parametrize("method", [Fading(lr=0.1), Both(), Around(Both())])
def test_the_rounds_of_a_scheduled_method_are_fixed_once_its_run_has_begun(method, tmp_path):
    record = stopped(method, tmp_path / "run")
    text = (record.path / "spec.yaml").read_text()
    (record.path / "spec.yaml").write_text(text.replace("rounds: 5", "rounds: 9"))
    again = Experiment(record.spec, Toy(), method)
    with pytest.raises(UsageError, match=r"planned for, and these were rounds=5; spec\.yaml says rounds=9 now"):
        again.take_up(record)
    (record.path / "spec.yaml").write_text(text)
    again = Experiment(record.spec, Toy(), method).take_up(record)
    again.go()
    assert difference(trace(again)["server"], trace(ran(method))["server"]) is None


def test_the_rounds_of_other_methods_may_change_and_their_phases_go_on(tmp_path):
    record = stopped(Stages(), tmp_path / "run")
    text = (record.path / "spec.yaml").read_text()
    (record.path / "spec.yaml").write_text(text.replace("rounds: 5", "rounds: 6"))
    again = Experiment(record.spec, Toy(), Stages()).take_up(record)
    again.go()
    assert difference(trace(again)["server"], trace(ran(Stages(), rounds=6))["server"]) is None


def test_phases_to_which_a_run_does_not_come_are_in_its_manifest():
    made = ran(Stages(warm=4))
    assert made.record.manifest["notes"] == ["rounds=5 end before the phase on, which begins with round 6"]
    assert missed([("a", 9), ("b", 0), ("c", None)], 3) == [
        "rounds=3 end before the phase c, which begins with round 10"
    ]
    assert "notes" not in ran(Stages()).record.manifest


def test_a_trial_sees_two_rounds_of_each_phase():
    assert one_of_each([]) == [1, 2]
    assert one_of_each([("a", 20), ("b", 1), ("c", None)]) == [1, 2, 21, 22, 23]
    assert one_of_each([("a", 0), ("b", 1), ("c", None)]) == [1, 2, 3]


def test_what_a_later_phase_does_is_refused_before_the_first_round():
    late = Stages(warm=20)
    with pytest.raises(UsageError, match=r"epsilon=3 was asked for, but look\.size leaves the clients unprotected"):
        begun(late, rounds=30, dp="sample:noise=5,epsilon=3")
    with pytest.raises(UsageError, match="asks for each reply of look by call"):
        begun(late, rounds=30, secure="bonawitz")
    made = begun(late, rounds=30, dp="sample:noise=1")
    assert made.pipeline.stages[0].known == ("look.size",)


@dataclass(frozen=True)
class Sharper(Plugin):
    """Every loss twice."""

    inner: Method = FedAvg()

    def around(self, client, inner):
        client.wrap_loss(lambda loss, net, batch: 2 * loss(net, batch))
        return inner()


def test_a_plugin_is_tried_in_the_phase_in_which_clients_train():
    @dataclass(frozen=True)
    class LookFirst(Stages):
        def phases(self, server):
            return [("look", 20), ("on", None)]

    begun(Sharper(LookFirst()), rounds=30)


def test_a_phase_is_no_server_value():
    @dataclass(frozen=True)
    class Own(FedAvg):
        def setup(self, server, clients):
            server.phase = "warm"

    with pytest.raises(UsageError, match=r"server\.phase is the node's own"):
        ran(Own())
    with pytest.raises(UsageError, match="of a method that gives phases"):
        ran(FedAvg()).server.phase  # noqa: B018
    assert fedloom.Server.planned.__doc__


def test_a_rule_in_place_of_the_mean_acts_in_the_phases_that_take_one():
    made, plain = ran(Stages(), aggregate="median"), ran(Stages())
    assert difference(made.server.model, plain.server.model) is not None
    assert made.server.sizes == plain.server.sizes
