"""A plug-in at the clients of another method: their data and losses, what goes along with messages, and weights."""

from dataclasses import dataclass

import pytest
import torch
from problems import trained_together

import fedloom
from fedloom.cohort import Each
from fedloom.errors import UsageError
from fedloom.method import Method, build, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.moon import Moon
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.plugin import Plugin
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.task import Data
from fedloom.tasks.toy import Toy
from fedloom.testing import difference, trace


@dataclass(frozen=True)
class Doubled(Plugin):
    """Every loss twice."""

    inner: Method = FedAvg()

    def around(self, client, inner):
        client.wrap_loss(self.twice)
        return inner()

    def twice(self, loss, net, batch):
        return 2 * loss(net, batch)


@dataclass(frozen=True)
class Squared(Plugin):
    """Every loss squared; `twice`: doubled after that."""

    inner: Method = FedAvg()
    twice: bool = False

    def around(self, client, inner):
        client.wrap_loss(self.squared)
        return inner()

    def squared(self, loss, net, batch):
        value = loss(net, batch)
        return (2 if self.twice else 1) * (value * value)


@dataclass(frozen=True)
class Mirrored(Plugin):
    """Every client trains with its labels mirrored."""

    inner: Method = FedAvg()
    every: int = 1  # client

    def around(self, client, inner):
        if client.id % self.every == 0:
            x, y = client.data.all()
            client.given = Data(x, client.task.classes - 1 - y)
        return inner()


@dataclass(frozen=True)
class Holding(Plugin):
    """A value of the server for all, and one for each, go along; clients log them, and send one as a field."""

    inner: Method = FedAvg()

    def setup(self, server, clients):
        self.inner.setup(server, clients)
        server.round_before = 0

    def round(self, server, cohort):
        server.round_before = server.round - 1
        self.inner.round(server, cohort)

    def held(self, server):
        return {"before": server.round_before, "own": Each({k: 10.0 * k for k in range(server.population)})}

    def around(self, client, inner, before, own):
        assert before == client.round - 1 and own == 10.0 * client.id
        client.log(before=before, own=own)
        return inner()


@dataclass(frozen=True)
class Favouring(Plugin):
    """The server says how much clients count."""

    inner: Method = FedAvg()
    of: tuple[float, ...] = (3.0, 0.0, 1.0, 2.0)

    def weigh(self, server, cohort):
        return dict(zip(cohort, self.of, strict=False))


@dataclass(frozen=True)
class BySamples(Plugin):
    """Clients count by their samples."""

    inner: Method = FedAvg()

    def weigh(self, server, cohort):
        return {k: cohort.info(k)["n"] for k in cohort}


@dataclass(frozen=True)
class OwnLoop(Method):
    """Takes its gradients by itself, of the task's loss; `meters` them, or says nothing."""

    lr: float = 0.1
    meters: bool = True

    def round(self, server, cohort):
        server.model = server.model + cohort.mean(self.local, model=server.model).delta

    @client
    def local(self, client, model):
        net = client.net(model).requires_grad_(True)
        value = client.task.loss(net, client.data.all())
        with torch.no_grad():
            for param, g in zip(net.parameters(), torch.autograd.grad(value, list(net.parameters())), strict=True):
                param -= self.lr * g
        if self.meters:
            client.meter(1, client.n)
        return {"delta": fedloom.Vector.of(net, model.layout) - model}


@dataclass(frozen=True)
class Blind(Method):
    """Its clients look at no data."""

    def round(self, server, cohort):
        server.model = server.model + cohort.mean(self.local, model=server.model).delta

    @client
    def local(self, client, model):
        return {"delta": client.n * 0.001 * model}


def ran(method, engine="serial", **settings):
    given = {"method": method.to_spec(), "partition": "given", "rounds": 3, "engine": engine, **settings}
    made = Experiment(Spec.of(given), Toy(), method).begin(None)
    made.go()
    return made


def left(method, *args, parts=("server", "states"), **settings):
    return [trace(ran(method, *args, **settings))[part] for part in parts]


ENGINES = pytest.mark.parametrize("engine, workers", [("serial", 0), ("loopback", 0), ("pool", 2)])


@ENGINES
@pytest.mark.parametrize("inner", [FedAvg, Scaffold, Moon])
def test_twice_the_loss_is_twice_the_rate_to_the_last_bit(inner, engine, workers):
    # Moon gives a loss of its own, of features: that one is doubled too.
    doubled = left(Doubled(inner(lr=0.05)), engine, workers=workers)
    if inner is Scaffold:  # whose control variates are gradients
        assert difference(doubled[0]["model"], left(inner(lr=0.1))[0]["model"]) is None
    else:
        assert difference(doubled, left(inner(lr=0.1))) is None


def test_plugins_around_plugins_act_from_the_outermost_to_the_innermost():
    both = left(Doubled(Squared(FedAvg(lr=0.1))))
    assert difference(both, left(Squared(FedAvg(lr=0.1), twice=True))) is None
    assert difference(both, left(Squared(Doubled(FedAvg(lr=0.1))))) is not None


@ENGINES
def test_other_data_train_the_clients_as_if_they_were_their_own(engine, workers):
    mirrored = left(Mirrored(FedAvg(lr=0.1)), engine, workers=workers)
    assert difference(mirrored, left(FedAvg(lr=0.1), attack="label_flip:4")) is None
    assert difference(mirrored, left(FedAvg(lr=0.1))) is not None


@ENGINES
def test_what_the_server_holds_goes_along_booked_and_unseen_by_the_inner_method(engine, workers):
    made, alone = ran(Holding(FedAvg(lr=0.1)), engine, workers=workers), ran(FedAvg(lr=0.1))
    assert difference(made.server.values["model"], alone.server.values["model"]) is None
    rows = made.record.metrics
    assert [row["client/before"] for row in rows] == [0, 1, 2] and {row["client/own"] for row in rows} == {15.0}
    held = [line for line in made.record.ledger if line["field"].startswith("_held_") and line["kind"] == "train"]
    assert {(line["field"], line["direction"], line["function"]) for line in held} == {
        ("_held_before", "down", "inner.local"),
        ("_held_own", "down", "inner.local"),
    }
    for field, bytes_of in (("before", 3 * 4), ("own", 3 * 4)):
        lines = [line for line in held if line["field"] == f"_held_{field}"]
        assert sum(len(line["clients"]) for line in lines) == bytes_of and all(line["bytes"] > 0 for line in lines)
    twice = ran(Holding(Holding(FedAvg(lr=0.1))))
    fields = {line["field"] for line in twice.record.ledger if line["field"].startswith("_held")}
    assert fields == {"_held_before", "_held_own", "_held1_before", "_held1_own"}


def batches_of(method):
    """How many clients each descent under `vectorized` trained together."""
    with trained_together() as sizes:
        made = ran(method, "vectorized")
    return sizes, made


def test_clients_whose_loss_a_plugin_wraps_alike_train_as_one_batch():
    sizes, together = batches_of(Doubled(Squared(FedAvg(lr=0.1))))
    assert sizes == [4, 4, 4]
    alone = left(Doubled(Squared(FedAvg(lr=0.1))))
    assert difference(alone[0], dict(together.server.values), nearly=1e-5) is None


def test_a_wrap_and_other_data_hold_under_vectorized_where_clients_differ():
    for method in (Mirrored(FedAvg(lr=0.1), every=2), Doubled(Mirrored(FedAvg(lr=0.1)))):
        assert difference(left(method), left(method, "vectorized"), nearly=1e-5) is None
    for inner in (FedAvg(lr=0.1), Scaffold(lr=0.1)):  # nobody to train with
        assert (
            difference(left(Doubled(inner), cohort=1), left(Doubled(inner), "vectorized", cohort=1), nearly=1e-5)
            is None
        )


def test_privacy_of_samples_holds_for_a_wrapped_loss():
    made = ran(Doubled(FedAvg(lr=0.1)), dp="sample:noise=1.0,clip=0.5")
    plain = ran(FedAvg(lr=0.1), dp="sample:noise=1.0,clip=0.5")
    assert made.record.metrics[-1]["dp/epsilon"] == plain.record.metrics[-1]["dp/epsilon"]
    # Twice as long gradients are clipped to the same bound: with a small one the loss's size is gone.
    tiny = {"dp": "sample:noise=0.5,clip=0.001"}
    doubled, same = (left(m, **tiny)[0]["model"] for m in (Doubled(FedAvg(lr=0.1)), FedAvg(lr=0.1)))
    assert difference(doubled, same, nearly=1e-6) is None


def test_privacy_of_samples_refuses_other_data_before_the_first_round():
    @dataclass(frozen=True)
    class Replaced(Plugin):
        inner: Method = FedAvg()

        def around(self, client, inner):
            client.given = Data(torch.zeros(200, 6), torch.zeros(200, dtype=torch.long))
            return inner()

    ran(Replaced(FedAvg(lr=0.1)))
    with pytest.raises(UsageError, match=r"reads the data that .* puts in place of the client's own"):
        Experiment(Spec.of({"method": "fedavg", "partition": "given", "dp": "sample"}), Toy(), Replaced())
    # Who looks at the client's data to make others of them is stopped there already.
    with pytest.raises(UsageError, match=r"reads client\.data"):
        Experiment(Spec.of({"method": "fedavg", "partition": "given", "dp": "sample"}), Toy(), Mirrored())


@pytest.mark.parametrize(
    "plugin, inner, why",
    [
        (Doubled, OwnLoop(), "changes the loss that clients train with, and the method inside takes gradients without"),
        (Doubled, OwnLoop(meters=False), "changes the loss that clients train with"),
        (Doubled, build("fedkseed"), "changes the loss that clients train with"),
        (Mirrored, Blind(), "changes the data that clients train with"),
        (Doubled, build("centralized"), "centralized asks nothing of them in its rounds"),
        (Doubled, Doubled(OwnLoop()), "changes the loss"),
    ],
)
def test_a_change_of_which_nothing_would_come_is_refused_before_the_first_round(plugin, inner, why):
    with pytest.raises(UsageError, match=why):
        Experiment(Spec.of({"method": "fedavg", "partition": "given"}), Toy(), plugin(inner))
    if plugin is Mirrored or isinstance(inner, OwnLoop):
        ran(Mirrored(OwnLoop()))  # whose loop does read the data that it was given


def test_a_change_that_only_the_real_run_shows_without_effect_is_refused_as_it_happens():
    @dataclass(frozen=True)
    class Late(Doubled):
        inner: Method = FedAvg()

        def around(self, client, inner):
            if client.round > 2:
                client.wrap_loss(self.twice)
            return inner()

    late = Late(OwnLoop())
    made = Experiment(Spec.of({"method": "fedavg", "partition": "given", "rounds": 3}), Toy(), late).begin(None)
    with pytest.raises(fedloom.RunError, match=r"round 3.*changes the loss that clients train with"):
        made.go()


@ENGINES
def test_the_server_says_how_much_clients_count(engine, workers):
    start = ran(FedAvg(lr=0.1), rounds=1).site.initial.flat.double()
    models = {}
    for k in range(4):
        alone = tuple(float(k == other) for other in range(4))
        models[k] = ran(Favouring(FedAvg(lr=0.1), of=alone), rounds=1).server.model.flat.double()
        assert not torch.equal(models[k], start)
    made = ran(Favouring(FedAvg(lr=0.1)), engine, workers=workers, rounds=1)
    expected = sum(weight * models[k] for k, weight in enumerate((3.0, 0.0, 1.0, 2.0))) / 6
    assert torch.allclose(made.server.model.flat.double(), expected, atol=1e-7)


def test_clients_that_count_by_their_samples_are_fedavg_bitwise():
    assert difference(left(BySamples(FedAvg(lr=0.1))), left(FedAvg(lr=0.1))) is None
    lossy = {"lost": 0.5, "cohort": 3}
    assert difference(left(BySamples(FedAvg(lr=0.1)), **lossy), left(FedAvg(lr=0.1), **lossy)) is None
    assert difference(left(BySamples(Scaffold(lr=0.1))), left(Scaffold(lr=0.1))) is not None


def test_weights_that_nobody_would_heed_are_refused_before_the_first_round():
    for method, settings, why in (
        (Favouring(BySamples()), {}, "favouring|test_plugin_clients"),
        (Favouring(build("fedbuff")), {}, "fedbuff asks for none in its rounds"),
        (Favouring(build("dfedsam")), {}, "dfedsam asks for none in its rounds"),
        (Favouring(), {"secure": "bonawitz"}, "secure=bonawitz.*under masks"),
        (Favouring(), {"aggregate": "median"}, "aggregate=median.*a robust rule takes the place"),
        (Favouring(), {"dp": "client"}, "dp=client.*count alike"),
        (Favouring(), {"dp": "local:gaussian,epsilon=5"}, "dp=local.*count alike"),
        (Doubled(Favouring()), {"secure": "bonawitz"}, "secure=bonawitz"),
    ):
        with pytest.raises(UsageError, match=why):
            Experiment(Spec.of({"method": "fedavg", "partition": "given", **settings}), Toy(), method)
    ran(Favouring(FedAvg(lr=0.1)), dp="sample:noise=1.0,clip=0.5")  # where replies are private by themselves


def test_weights_that_are_none_are_told():
    for of in ((1.0, -1.0, 1.0, 1.0), (1.0,), (1.0, 1.0, float("inf"), 1.0)):
        with pytest.raises(UsageError, match=r"weigh gives client \d the weight .*; every client asked needs one"):
            ran(Unsound(FedAvg(lr=0.1), of=str(of)))


@dataclass(frozen=True)
class Unsound(Plugin):
    """Weights from a text, which may be anything."""

    inner: Method = FedAvg()
    of: str = ""

    def weigh(self, server, cohort):
        return dict(zip(cohort, eval(self.of, {"inf": float("inf")}), strict=False))  # noqa: S307


def test_what_the_inner_method_needs_and_is_the_plugin_needs_and_is():
    assert Doubled(build("fedlabel")).needs == build("fedlabel").needs and Doubled(FedAvg()).needs == ()
    assert Doubled.needs == () and Doubled.rough is False
    for name in ("one_shot", "rough"):
        having = [e.name for e in fedloom.registry.catalogue() if getattr(e.load(Method), name) is True]
        assert having and all(getattr(Doubled(build(one)), name) for one in having)


def test_a_field_of_training_is_found_in_the_method_that_trains():
    assert Doubled(FedAvg(batch=7)).of_training("batch") == 7 and Blind().of_training("batch") is None


@dataclass(frozen=True)
class Looking(Method):
    """Asks for a number of samples first, and trains in a second call."""

    lr: float = 0.1

    def round(self, server, cohort):
        total = cohort.mean(self.count).n
        server.model = server.model + cohort.mean(self.local, model=server.model, total=total).delta

    @client
    def count(self, client):
        return {"n": float(client.n)}

    @client
    def local(self, client, model, total):
        w, _ = client.descend(model, lr=self.lr, batch=10)
        return {"delta": client.n / total * (w - model)}


def test_a_function_that_does_not_train_need_not_ask_for_what_a_plugin_changed():
    for plugin in (Doubled, Mirrored):
        ran(plugin(Looking()))

    @dataclass(frozen=True)
    class LookingLast(Looking):
        def round(self, server, cohort):
            super().round(server, cohort)
            cohort.mean(self.count)

    ran(Doubled(LookingLast()))


def test_a_plugin_that_looked_at_the_data_itself_is_no_reason_to_take_it_for_used():
    with pytest.raises(UsageError, match="changes the data that clients train with"):
        Experiment(Spec.of({"method": "fedavg", "partition": "given"}), Toy(), Mirrored(Mirrored(Blind())))


def test_plugins_act_in_rounds_only():
    @dataclass(frozen=True)
    class Strict(Holding):
        def around(self, client, inner, before, own):
            assert client.key[2] == "train"
            return inner()

    made = ran(Strict(build("ccvr")))  # which asks its clients once more at the end
    assert any(line["kind"] == "finish" for line in made.record.ledger)
    assert not [x for x in made.record.ledger if x["field"].startswith("_held") and x["kind"] != "train"]


def test_a_robust_rule_with_data_at_the_server_trains_there_as_its_clients_do():
    doubled = left(Doubled(FedAvg(lr=0.05)), aggregate="fltrust")
    assert difference(doubled, left(FedAvg(lr=0.1), aggregate="fltrust")) is None


@dataclass(frozen=True)
class Working(Method):
    """Its clients work without a message, and are asked what came of it."""

    lr: float = 0.1

    def round(self, server, cohort):
        cohort.work(self.train)
        server.model = cohort.mean(self.give).model

    @client
    def train(self, client):
        client.state["model"], _ = client.descend(client.state.get("model", client.initial), lr=self.lr, batch=10)

    @client
    def give(self, client):
        return {"model": client.state["model"].clone()}


def test_a_plugin_acts_around_work_without_a_message_if_it_sends_nothing_along():
    assert difference(left(Doubled(Working(lr=0.05))), left(Working(lr=0.1))) is None
    with pytest.raises(UsageError, match=r"sends before, own along .* without any message"):
        Experiment(Spec.of({"method": "fedavg", "partition": "given"}), Toy(), Holding(Working()))


@dataclass(frozen=True)
class Crowded(Plugin):
    """Clients count by their samples and by how many are asked with them."""

    inner: Method = FedAvg()

    def weigh(self, server, cohort):
        return {k: cohort.info(k)["n"] ** (len(cohort) - 1) for k in cohort}


@dataclass(frozen=True)
class Grouped(Method):
    """A mean of clients 0 and of all others: in one call, or in two."""

    lr: float = 0.1
    once: bool = True

    def setup(self, server, clients):
        server.means = {}

    def round(self, server, cohort):
        if self.once:
            ups = cohort.means(self.local, groups={k: int(k > 0) for k in cohort}, model=server.model)
        else:
            ups = {g: cohort.where(lambda k, g=g: (k > 0) == g).mean(self.local, model=server.model) for g in (0, 1)}
        server.means = {g: up.model for g, up in ups.items()}

    @client
    def local(self, client, model):
        return {"model": client.descend(model, lr=self.lr, batch=0)[0]}


def test_each_group_of_means_is_weighed_as_the_cohort_that_it_is():
    assert difference(left(Crowded(Grouped())), left(Crowded(Grouped(once=False)))) is None
    assert difference(left(Crowded(Grouped())), left(Grouped())) is not None
