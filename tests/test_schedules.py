"""Optimizers and rates over rounds as settings: effect or refusal, and the same on every engine."""

import math
from dataclasses import dataclass

import pytest
import torch

import fedloom
from fedloom.engines.pool import Pool
from fedloom.engines.vectorized import Vectorized
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.fedspeed import FedSpeed
from fedloom.methods.optimize.moon import Moon
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.optimizers import Adam
from fedloom.plugin import Plugin
from fedloom.runs import steps
from fedloom.runs.act import acting
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.schedules import schedule
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, difference, trace

TASK = Toy((12, 20, 9))


def factors(text, rounds):
    made = schedule(text, rounds)
    return [made.factor(round, rounds) for round in range(1, rounds + 1)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("exponential:0.5", [1, 0.5, 0.25, 0.125]),
        ("step:2", [1, 1, 0.1, 0.1]),
        ("step:1,decay=0.5", [1, 0.5, 0.25, 0.125]),
        ("linear:0.4", [1, 0.8, 0.6, 0.4]),
        ("cosine", [(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]),
        ("cosine:0.5", [0.5 + 0.25 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]),
        ("warmup:2", [0.5, 1, 1, 1]),
        ("warmup:2+exponential:0.5", [0.5, 0.5, 0.25, 0.125]),
    ],
)
def test_factors_by_hand(text, expected):
    assert factors(text, 4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosin", "unknown schedule 'cosin'.*cosine"),
        ("exponential", "exponential needs decay, as in exponential:0.99"),
        ("exponential:1", "leaves the learning rate as it is in all of 5 rounds"),
        ("step:9", "leaves the learning rate as it is in all of 5 rounds"),
        ("exponential:0", "decay is 0.0; it must be greater than 0"),
        ("step:0", "every is 0; it must be greater than 0"),
        ("warmup:2,3", "2 values without a name"),
    ],
)
def test_a_wrong_text_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        fedloom.run("fedavg", TASK, rounds=5, schedule=text)


def rounds_by_hand(cls, rates, **fields):
    """Runs one round after the other, each with the method's rate set by hand."""
    lab = Lab(cls)
    made = lab.begun(TASK, rounds=len(rates), schedule="exponential:0.5")
    seen = iter(rates)
    made.schedule, made.boundary.pace = None, None
    made.engine.start(made.method, made.site, made.states)
    with acting(made.boundary, made.server, "setup", 0):
        made.method.setup(made.server, made.everybody)
    for round in range(1, len(rates) + 1):
        made.method = made.boundary.method = cls(lr=next(seen))
        made.engine.start(made.method, made.site, made.states)
        steps.train(made, made.states, round)
    return dict(made.server.values), {k: dict(v) for k, v in made.states.items()}


@pytest.mark.parametrize("cls", [FedAvg, Scaffold, FedSpeed, Moon])
def test_a_schedule_is_the_methods_rate_set_by_hand_in_every_round(cls):
    """Also where an equation uses the rate, as SCAFFOLD's of its control variates, and in loops in the open."""
    lr = cls().lr
    server, states = rounds_by_hand(cls, [lr, 0.5 * lr, 0.25 * lr])
    for engine in (None, Pool(2)):
        run = trace(Lab(cls()).experiment(TASK, engine, rounds=3, schedule="exponential:0.5"))
        assert difference(server, run["server"]) is None and difference(states, run["states"]) is None


@dataclass(frozen=True)
class Wrapped(Plugin):
    """Nothing around a method."""

    inner: Method = "fedavg"


def test_a_schedule_reaches_the_method_that_a_plug_in_wraps():
    bare = trace(Lab(FedAvg).experiment(TASK, rounds=3, schedule="exponential:0.5"))
    around = trace(Lab(Wrapped).experiment(TASK, rounds=3, schedule="exponential:0.5"))
    assert difference(bare["server"], around["server"]) is None


@dataclass(frozen=True)
class Rateless(Method):
    """Counts rounds."""

    def setup(self, server, clients):
        server.rounds = 0

    def round(self, server, cohort):
        server.rounds = server.rounds + 1


def test_a_method_without_a_rate_is_refused():
    with pytest.raises(UsageError, match="schedule=cosine changes the learning rate `lr`, and test_schedules has none"):
        Lab(Rateless).begun(TASK, schedule="cosine")


@dataclass(frozen=True)
class ByAdam(FedAvg):
    """FedAvg whose clients ask for Adam themselves."""

    @client
    def local(self, client, model):
        w, _ = client.descend(model, self.lr, self.epochs, batch=self.batch, optimizer=Adam(beta2=0.9))
        return {"delta": w - model, "n": client.n}


def test_the_setting_is_what_a_method_could_ask_for_itself():
    own = trace(Lab(ByAdam).experiment(TASK))
    for engine in (None, Pool(2)):
        asked = trace(Lab(FedAvg).experiment(TASK, engine, optimizer="adam:beta2=0.9"))
        assert difference(own["server"], asked["server"]) is None
    together = trace(Lab(FedAvg).experiment(TASK, Vectorized(), optimizer="adam:beta2=0.9"))
    assert difference(own["server"], together["server"], "server", 1e-5) is None


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("scaffold", "scaffold does not go with optimizer=adam: its control variates"),
        ("fednova", "fednova does not go with optimizer=adam: its weights"),
        ("fedspeed", "the clients of fedspeed take none by it: they step on gradients in the open"),
        ("dfedsam", "the clients of dfedsam take none by it"),
    ],
)
def test_methods_whose_steps_are_their_own_refuse_an_optimizer(method, message):
    with pytest.raises(UsageError, match=message):
        fedloom.run(method, TASK, rounds=2, optimizer="adam")


def test_an_optimizer_beside_the_methods_own_is_refused_before_the_first_round():
    with pytest.raises(UsageError, match=r"optimizer=.*this method has an optimizer of its own"):
        Lab(ByAdam).begun(TASK, optimizer="sgd:0.9")


def test_an_optimizer_and_privacy_of_samples_go_together_and_a_look_back_does_not():
    runs = [
        trace(Lab(FedAvg).experiment(TASK, dp="sample:noise=1.0,clip=0.5", optimizer=name)) for name in (None, "adam")
    ]
    assert difference(runs[0]["server"], runs[1]["server"])
    with pytest.raises(UsageError, match="takes a second gradient of every batch, and one is accounted for"):
        Lab(FedAvg).begun(TASK, dp="sample:noise=1.0,clip=0.5", optimizer="delta_sgd")


def test_adam_learns_what_plain_steps_learn():
    accuracies = [
        fedloom.run("fedavg", Toy((40, 40, 40)), rounds=8, fields={"lr": lr}, optimizer=rule).metrics[-1]
        for lr, rule in ((0.1, None), (0.01, "adam"))
    ]
    assert all(row["global_test_accuracy"] > 0.8 for row in accuracies)
    assert torch.isfinite(torch.tensor([row["train_loss"] for row in accuracies])).all()


@pytest.mark.parametrize(("text", "fixed"), [("cosine", True), ("warmup:9+linear:0.1", True), ("step:2", False)])
def test_a_schedule_over_the_whole_run_fixes_its_rounds_and_others_do_not(tmp_path, text, fixed):
    def stop(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    settings = {"partition": "given", "data": "a Toy given in Python", "schedule": text}
    made = Experiment(Spec.of(settings | {"rounds": 3}), TASK, FedAvg()).begin(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        made.go(stop)
    stands = made.record.path / "spec.yaml"
    stands.write_text(stands.read_text().replace("rounds: 3", "rounds: 5"))
    again = Experiment(made.record.spec, TASK, FedAvg())
    if fixed:
        with pytest.raises(UsageError, match=r"rounds=3; spec\.yaml says rounds=5 now"):
            again.take_up(made.record)
        return
    run = again.take_up(made.record).go()
    whole = Experiment(Spec.of(settings | {"rounds": 5}), TASK, FedAvg()).begin(None).go()
    assert torch.equal(run.model.flat, whole.model.flat)
