"""A label oracle with a budget: whose labels they are, what asking costs, and that nothing overruns the budget."""

from dataclasses import dataclass

import pytest
import torch
from problems import ran, stopped_and_resumed

import fedloom
from fedloom import tasks
from fedloom.calls import ASKED
from fedloom.cli import main
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.node import Client
from fedloom.runs.spec import Spec
from fedloom.site import Site
from fedloom.task import Data
from fedloom.tasks.oracle import Oracle, dealt, toy
from fedloom.tasks.partial import toy as partly
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, check_method
from fedloom.testing.contract import (
    check_lost_clients,
    check_lost_is_unasked,
    check_pool,
    check_resume,
)

TOY = toy()
PARTS = [TOY.allowance(k) for k in range(4)]


@dataclass(frozen=True)
class Greedy(Method):
    """Every client asked has some samples labelled, drawn at random, and says so in a reply that may be lost."""

    few: int = 3
    verb: str = "mean"
    private = ("delta",)
    needs = ("oracle",)

    def round(self, server, cohort):
        if self.verb == "submit":
            cohort.idle.submit(self.local, model=server.model)
            for reply in cohort.wait(2):
                server.model = server.model + 0.25 * reply.delta
        elif self.verb == "call":
            for reply in cohort.call(self.local, model=server.model):
                server.model = server.model + 0.25 * reply.delta
        else:
            server.model = server.model + cohort.mean(self.local, weight="n", model=server.model).delta

    @client
    def local(self, client, model):
        order = torch.randperm(len(client.pool), generator=client.rng("which"))
        client.ask(order[: min(self.few, client.labels_left)])
        w, _ = client.descend(model, lr=0.1, batch=10)
        client.state["last"] = w
        return {"delta": w - model, "n": client.n}


@dataclass(frozen=True)
class Before(FedAvg):
    """Labels are asked for before the first round and after the last, where everybody is told to."""

    needs = ("oracle",)

    def setup(self, server, clients):
        clients.tell(self.buy, few=1)

    def finish(self, server, clients):
        clients.tell(self.buy, few=2)

    @client
    def buy(self, client, few):
        client.ask(torch.arange(few))


@dataclass(frozen=True)
class Judging(Before):
    """Asks for labels when it is judged."""

    @client
    def predict(self, client, model):
        client.ask(torch.arange(1))
        return model


@dataclass(frozen=True)
class Undeclared(FedAvg):
    """Looks at the pool without having declared that it needs an oracle."""

    @client
    def local(self, client, model):
        return {"delta": model * 0, "n": len(client.pool)}


def asking(task=TOY, id=0, kind="train", **more):
    return Client(Site(task, 0, needs=("oracle",)), id, {}, kind, 1, **more)


def bought(made):
    """Labels asked for by each client, from what they remember."""
    return [len(made.engine.states.get(k, {}).get(ASKED, [])) for k in range(made.task.population)]


def counted(made):
    return sum(row["labels"] for row in made.record.metrics)


def test_what_is_asked_for_moves_from_the_pool_to_the_data():
    me = asking()
    labelled, pool, truth = me.data, me.pool, TOY.pool(0)
    assert len(labelled) == len(pool) == 15 and (pool.y == -1).all() and me.asked == 0 and me.labels_left == PARTS[0]
    assert not set(labelled.rows.tolist()) & set(pool.rows.tolist())
    found = me.ask(torch.tensor([4, 1]))
    assert found.tolist() == truth.y[[4, 1]].tolist()
    assert me.n == 17 and me.data.rows.tolist() == [*labelled.rows.tolist(), *pool.rows[[4, 1]].tolist()]
    assert torch.equal(me.data.y[-2:], found) and torch.equal(me.data.x[-2:], pool.x[[4, 1]])
    left = [row for place, row in enumerate(pool.rows.tolist()) if place not in (1, 4)]
    assert me.pool.rows.tolist() == left and (me.pool.y == -1).all()
    assert (me.asked, me.labels, me.labels_left) == (2, 2, PARTS[0] - 2)
    more = me.ask(torch.tensor([0]))
    assert more.tolist() == truth.y[:1].tolist() and me.data.rows[-1] == pool.rows[0] and me.asked == 3
    assert me.ask(torch.zeros(0, dtype=torch.int64)).tolist() == [] and me.asked == 3


def test_a_client_remembers_what_it_asked_for():
    me = asking()
    me.ask(torch.tensor([2, 5, 3]))
    again = Client(Site(TOY, 0, needs=("oracle",)), 0, me.state.values_, "train", 2)
    assert torch.equal(again.data.rows, me.data.rows) and again.asked == 3 and again.labels == 0
    assert torch.equal(again.pool.rows, me.pool.rows)


@pytest.mark.parametrize(
    ("places", "complaint"),
    [
        (torch.arange(12), r"client 0 asks for 12 labels, and may ask for 8 more; ask for at most client.labels_left"),
        (torch.tensor([1, 1]), "a place in the pool twice"),
        (torch.tensor([0, 15]), "places from 0 to 15; the pool has 15"),
        (torch.tensor([-1]), "places from -1 to -1"),
        (torch.tensor([0.0]), r"got torch.float32 \[1\]; expected places in client.pool, as int64 \[b\]"),
        (torch.tensor([[0]]), r"torch.int64 \[1, 1\]"),
        ([0], "got list"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(places, complaint):
    me = asking()
    with pytest.raises(UsageError, match=complaint):
        me.ask(places)
    assert me.asked == me.labels == 0


def test_evaluation_asks_for_nothing():
    with pytest.raises(UsageError, match="in an evaluation, which leaves no trace"):
        asking(kind="evaluate").ask(torch.tensor([0]))
    with pytest.raises(fedloom.RunError, match="in an evaluation"):
        ran(Judging(), TOY, rounds=1)


def test_a_method_declares_that_it_needs_an_oracle_and_a_problem_has_one():
    with pytest.raises(fedloom.RunError, match=r'declare needs = \("oracle",\)'):
        ran(Undeclared(), TOY, rounds=1)
    with pytest.raises(UsageError, match="kafal needs a problem of the kind oracle"):
        fedloom.run("kafal", data="digits", clients=3, rounds=1)
    with pytest.raises(UsageError, match="kafal needs a problem of the kind oracle"):
        fedloom.run("kafal", data="digits", problem="partial:0.1", clients=3, rounds=1)


def test_a_pool_in_another_storage_is_refused():
    class Apart(Oracle):
        def pool(self, client):
            pool = super().pool(client)
            return Data(pool.inputs.clone(), pool.labels, pool.rows)

    with pytest.raises(UsageError, match=r"Apart\.pool lies in another storage"):
        _ = asking(Apart(Toy(), 0.5)).pool


def test_the_problem_is_partial_with_the_rest_for_sale():
    few, task = (tasks.build(Spec(clients=5, problem=f"{kind}:0.2")) for kind in ("partial", "oracle"))
    whole = tasks.build(Spec(clients=5))
    assert task.offers == {"partial", "oracle"} and task.describe()["budget"] is None
    for k in range(5):
        assert torch.equal(task.data(k, "train").rows, few.data(k, "train").rows)
        pool = task.pool(k)
        assert torch.equal(pool.y, whole.federation.y[pool.rows]) and task.allowance(k) == len(pool)
        rows = torch.cat([pool.rows, few.data(k, "train").rows]).sort().values
        assert torch.equal(rows, whole.data(k, "train").rows)
        assert (task.data(k, "unlabelled").y == -1).all()
    assert few.pool(0) is None and few.allowance(0) == 0


def test_who_asks_for_nothing_trains_as_on_partly_labelled_data():
    some, none = ran(FedAvg(), TOY, rounds=2), ran(FedAvg(), partly(), rounds=2)
    assert torch.equal(some.server.model.flat, none.server.model.flat)
    assert [row["labels"] for row in some.record.metrics] == [0, 0]
    assert all("labels" not in row for row in none.record.metrics)


@pytest.mark.parametrize("budget", [0, 1, 7, 99, 100, 101, 5000])
def test_the_budget_is_dealt_out_in_proportion(budget):
    pools = [40, 1, 0, 13, 46]
    parts = dealt(budget, pools)
    assert sum(parts) == min(budget, 100) and all(part <= pool for part, pool in zip(parts, pools, strict=True))
    assert all(abs(part - min(budget, 100) * pool / 100) < 1 for part, pool in zip(parts, pools, strict=True))


def test_the_greatest_rests_come_first():
    assert dealt(3, [5, 5, 5, 5]) == [1, 1, 1, 0] and dealt(5, [30, 28, 42]) == [2, 1, 2]


def test_the_settings_budget_is_that_of_the_clients():
    task = tasks.build(Spec(clients=5, problem="oracle:0.2,budget=77"))
    parts = [task.allowance(k) for k in range(5)]
    assert sum(parts) == 77 and parts == dealt(77, [len(task.pool(k)) for k in range(5)])
    late = tasks.build(Spec(clients=6, problem="oracle:0.2,budget=50", partition="iid", newcomers=2))
    assert late.population == 4 and late.allowance(5) == 0 and sum(late.allowance(k) for k in range(4)) == 50


@pytest.mark.parametrize("budget", [-1, 100000])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(UsageError, match=rf"a budget of {budget} labels; there are \d+ to ask for"):
        tasks.build(Spec(clients=5, problem=f"oracle:0.2,budget={budget}"))
    with pytest.raises(UsageError, match="a share of 0 keeps its labels"):
        tasks.build(Spec(clients=5, problem="oracle:0"))


WORLDS = [
    {},
    {"dropout": 0.3},
    {"lost": 0.5},
    {"lost": 1.0},
    {"cohort": 2, "overselect": 2.0},
    {"deadline": 0.02, "speed": "uniform:0.5,2"},
    {"availability": "markov:0.5"},
    {"faults": "duplicate:0.3+lost:0.2+nan:0.2"},
]


@pytest.mark.parametrize("world", WORLDS, ids=str)
@pytest.mark.parametrize("verb", ["mean", "call"])
def test_every_label_is_counted_kept_and_within_the_budget(world, verb):
    made = ran(Greedy(verb=verb), TOY, rounds=6, **world)
    assert counted(made) == sum(bought(made)) <= TOY.budget
    assert all(mine <= part for mine, part in zip(bought(made), PARTS, strict=True))
    if "dropout" not in world and "cohort" not in world and "availability" not in world:
        assert bought(made) == PARTS, "whoever asked three times has all it may"
    for state in made.engine.states.values():
        assert len(state[ASKED].unique()) == len(state[ASKED])


def test_labels_of_overlapping_work_are_kept_too():
    for world in ({}, {"lost": 0.5}, {"faults": "duplicate:0.4"}):
        made = ran(Greedy(verb="submit"), TOY, rounds=8, **world)
        assert 0 < counted(made) == sum(bought(made)) <= TOY.budget


@pytest.mark.parametrize("verb", ["mean", "call"])
def test_a_round_of_which_nobody_was_heard_leaves_the_labels_to_those_who_asked(verb):
    made = ran(Greedy(verb=verb), TOY, rounds=1, lost=1.0)
    assert torch.equal(made.server.model.flat, made.site.initial.flat)
    assert bought(made) == [3, 3, 3, 3] and counted(made) == 12
    assert all(set(state) == {ASKED} for state in made.engine.states.values()), "and nothing else of that round"


def test_the_same_labels_on_every_engine_and_after_a_stop(tmp_path):
    plain = ran(Greedy(), TOY, rounds=4, lost=0.3)
    for engine in ("loopback", "pool", "vectorized"):
        made = ran(Greedy(), TOY, rounds=4, lost=0.3, engine=engine, workers=2)
        for k in range(4):
            assert torch.equal(made.engine.states[k][ASKED], plain.engine.states[k][ASKED])
        assert [row["labels"] for row in made.record.metrics] == [row["labels"] for row in plain.record.metrics]
    spec = Spec.of({"method": Greedy().to_spec(), "partition": "given", "rounds": 4, "lost": 0.3})
    again = stopped_and_resumed(spec, TOY, Greedy(), tmp_path / "run", after=2)
    assert bought(again) == bought(plain) and counted(again) == counted(plain)
    assert torch.equal(again.server.model.flat, plain.server.model.flat)


def test_labels_of_setup_and_finish_are_in_the_first_and_the_last_row():
    made = ran(Before(), TOY, rounds=3)
    assert [row["labels"] for row in made.record.metrics] == [4, 0, 8] and bought(made) == [3, 3, 3, 3]


@pytest.mark.parametrize("check", [check_lost_is_unasked, check_lost_clients, check_pool, check_resume])
@pytest.mark.parametrize("verb", ["mean", "call", "submit"])
def test_a_method_that_asks_in_replies_passes_the_contract(check, verb):
    check_method(Greedy(verb=verb), [check])


def test_attackers_tamper_with_what_they_asked_for():
    seen = []

    class Noting(Oracle):
        def loss(self, net, batch):
            seen.append(batch.y.clone())
            return super().loss(net, batch)

    ran(Greedy(few=30), Noting(Toy(), 0.5, budget=30), rounds=2, attack="label_flip:4")
    later = torch.cat(seen[len(seen) // 2 :])
    assert len(later) > sum(len(TOY.data(k, "train")) for k in range(4))
    honest = torch.cat([torch.cat([TOY.data(k, "train").y, TOY.pool(k).y]) for k in range(4)])
    assert torch.bincount(later, minlength=3).tolist() != torch.bincount(honest, minlength=3).tolist()


def test_privacy_of_samples_refuses_to_look_at_the_pool():
    pytest.importorskip("opacus")
    with pytest.raises(UsageError, match=r"client\.pool"):
        ran(Greedy(), TOY, rounds=1, dp="sample:noise=1.0,clip=1.0")


def test_the_command_line_and_a_comparison_reach_it(tmp_path, capsys):
    words = ["run", "kafal", "--problem", "oracle:0.1,budget=60", "--clients", "3", "--model", "mlp:8", "--rounds", "2"]
    assert main([*words, "--cycle", "1", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["show", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    total = sum(row["labels"] for row in fedloom.Run(tmp_path / "run").metrics)
    assert 0 < total <= 60 and f"{total} labels asked for" in said
    assert f'<b>{total}</b><span class="soft">labels asked for' in (tmp_path / "run" / "report.html").read_text()
    results = fedloom.compare(
        ["fedavg", {"name": "kafal", "cycle": 1}], data="digits", clients=3, model="mlp:8", rounds=2, seeds=1,
        problem="oracle:0.1,budget=60", out=tmp_path / "c",
    )  # fmt: skip
    assert results.methods[0] == "fedavg" and not results.failed
    assert "labels" in (tmp_path / "c" / "report.csv").read_text()


def test_the_toy_asks_as_the_problem_does():
    assert sum(PARTS) == TOY.budget == 30 and dealt(30, [len(TOY.pool(k)) for k in range(4)]) == PARTS
    assert Lab(Greedy).toy().offers == TOY.offers


@pytest.mark.parametrize(
    ("problem", "complaint"),
    [
        ("oracle:0.1+partial:0.5", "an oracle does not lie upon partial, which says already what has a label"),
        ("stream:2,rounds=1+oracle:0.1", "an oracle does not lie upon stream, where what comes later"),
        ("oracle:0.1+graph", "not upon graph"),
    ],
)
def test_what_an_oracle_does_not_lie_upon_is_refused(problem, complaint):
    with pytest.raises(UsageError, match=complaint):
        tasks.build(Spec(clients=4, problem=problem, rounds=3))
