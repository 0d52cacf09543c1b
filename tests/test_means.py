"""A mean a group in one call: each is what `mean` of the group's clients alone would be."""

from dataclasses import dataclass

import pytest
import torch

from fedloom import encoding
from fedloom.cohort import ByGroup, Each
from fedloom.engines import build
from fedloom.errors import RunError, UsageError
from fedloom.message import Sparse
from fedloom.method import Method, client
from fedloom.report.words import privacy_statement
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, difference, trace

SIZES = (9, 12, 7, 15, 8, 11, 10)
GROUPS = {0: "a", 1: "b", 2: "a", 3: "b", 4: "a", 5: "b", 6: "a"}
SEEN: list = []


@dataclass(frozen=True)
class Grouped(Method):
    """FedAvg in groups: in one call, or (`apart`) a mean a group."""

    apart: bool = False
    weighted: bool = True
    lone: int = 99  # a client that is a group of its own
    other: bool = False  # group a, the larger one, learns something more
    global_model = False
    compressible = ("delta",)
    private = ("delta",)
    updates = {"delta": "model"}  # noqa: RUF012

    def setup(self, server, clients):
        server.models = {"a": server.model, "b": server.model, "c": server.model}

    def round(self, server, cohort):
        groups = {k: "c" if k == self.lone else GROUPS[k] for k in cohort}
        weight = "n" if self.weighted else None
        if self.apart:
            named = {g: cohort.where([k for k in cohort if groups[k] == g]) for g in dict.fromkeys(groups.values())}
            means = {g: some.mean(self.local, weight, model=server.models[g]) for g, some in named.items()}
        else:
            means = cohort.means(self.local, groups, weight, model=ByGroup(server.models))
        SEEN.append({g: (mean.count, mean.weight, mean.missing) for g, mean in means.items()})
        server.models = server.models | {g: server.models[g] + mean.delta for g, mean in means.items()}

    @client
    def local(self, client, model):
        client.state["asked"] = client.state.get("asked", 0) + 1
        delta = (client.grad(model, client.data.all()) * -0.1).clone()  # no draws, which differ from call to call
        extra = {"more": torch.ones(3)} if self.other and GROUPS[client.id] == "a" else {}
        return {"delta": delta, **extra} | ({"n": float(client.n)} if self.weighted else {})

    @client
    def predict(self, client, models):
        return models[GROUPS[client.id]]


def ran(method=None, engine="serial", **settings):
    SEEN.clear()
    made = build(engine, 2 if engine == "pool" else 0)
    return Lab(method or Grouped()).experiment(Toy(SIZES), made, **{"rounds": 2} | settings)


def kept(made):
    return [dict(made.server.values), {k: dict(state) for k, state in sorted(made.engine.states.items())}]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("engine", ["serial", "loopback", "pool"])
def test_each_is_the_mean_of_its_clients_alone(engine, weighted):
    together = ran(Grouped(weighted=weighted), engine)
    apart = ran(Grouped(apart=True, weighted=weighted))
    assert difference(kept(together), kept(apart)) is None
    assert together.record.metrics[-1]["up_bytes"] == apart.record.metrics[-1]["up_bytes"]
    assert together.record.metrics[-1]["down_bytes"] == apart.record.metrics[-1]["down_bytes"]
    sizes = {g: sum(n for k, n in enumerate(SIZES) if GROUPS[k] == g) for g in "ab"}
    if not weighted:
        sizes = {g: 4 if g == "a" else 3 for g in "ab"}
    ran(Grouped(weighted=weighted), engine)
    assert [{g: (4 if g == "a" else 3, sizes[g], ()) for g in "ab"}] * 2 == SEEN


def test_by_hand():
    made = ran(rounds=1)
    task, start = made.task, made.site.initial
    for g in "ab":
        total = torch.zeros(len(start.flat), dtype=torch.float64)
        members = [k for k in GROUPS if GROUPS[k] == g]
        for k in members:
            net = task.network()
            torch.nn.utils.vector_to_parameters(start.flat.clone(), net.parameters())
            data = task.data(k, "train")
            torch.nn.functional.cross_entropy(net(data.x), data.y).backward()
            total += SIZES[k] * torch.cat([p.grad.flatten() for p in net.parameters()]).double()
        expected = start.flat - 0.1 * (total / sum(SIZES[k] for k in members)).float()
        assert torch.allclose(made.server.models[g].flat, expected, atol=1e-6)


def test_it_is_one_call():
    slow = {"speed": "uniform:0.3,2", "step_seconds": 1.0}
    together, apart = ran(**slow), ran(Grouped(apart=True), **slow)
    assert together.record.metrics[-1]["virtual_seconds"] < apart.record.metrics[-1]["virtual_seconds"]
    first = {(li["verb"], li["function"]) for li in together.record.ledger if li["kind"] == "train"}
    assert first == {("means", "local")}
    assert privacy_statement(together.record.manifest)[0] == (
        "local: the server learns only the (weighted) average, group by group, of: delta, n."
    )


def test_each_engine_leaves_the_same_when_replies_are_lost():
    plain = trace(ran(lost=0.4, dropout=0.2, rounds=4))
    assert any(missing for row in SEEN for _, _, missing in row.values())
    for row in SEEN:
        for g, (count, _, missing) in row.items():
            assert count + len(missing) == (4 if g == "a" else 3) and all(GROUPS[k] == g for k in missing)
    for engine in ("loopback", "pool"):
        assert difference(plain, trace(ran(engine=engine, lost=0.4, dropout=0.2, rounds=4))) is None


def test_a_group_without_a_reply_is_absent_and_the_others_go_on():
    made = ran(Grouped(lone=6), lost=0.5, rounds=6)
    assert {frozenset(row) for row in SEEN} >= {frozenset("abc"), frozenset("ab")}
    asked = sum(count for row in SEEN for count, _, _ in row.values())
    assert sum(state["asked"] for state in made.engine.states.values()) == asked
    before = made.record.metrics
    assert all("note" not in row for row in before)
    gone = ran(lost=1.0)
    assert not SEEN and all("none of the 7 clients replied to local" in row["note"] for row in gone.record.metrics)


@pytest.mark.parametrize("rule", ["median", "krum:f=0", "ida", "l_dawa"])
def test_a_robust_rule_acts_in_each_group(rule):
    pytest.importorskip("sklearn")
    together, apart = (ran(Grouped(apart=apart, weighted=False), aggregate=rule, rounds=1) for apart in (False, True))
    assert difference(together.server.models, apart.server.models) is None
    assert difference(together.server.models, ran(Grouped(weighted=False), rounds=1).server.models)
    assert "the server sees each client's" in privacy_statement(together.record.manifest)[0]


def test_what_a_rule_remembers_is_the_groups_own():
    made = ran(Grouped(weighted=False), aggregate="centred_clip:0.001")
    memory = [made.boundary.books.memory[f"aggregate local of '{g}'"] for g in "ab"]
    assert difference(*memory) is not None


def test_a_group_too_small_for_a_rule_is_absent():
    ran(Grouped(lone=6, weighted=False), aggregate="krum:f=0", rounds=3)
    assert {frozenset(row) for row in SEEN} == {frozenset("ab")}


def test_masks_are_those_of_a_group():
    pytest.importorskip("cryptography")
    plain, masked = ran(Grouped(lone=6)), ran(Grouped(lone=6), secure="bonawitz")
    assert {frozenset(row) for row in SEEN} == {frozenset("ab")}, "a group of one has nothing but its reply"
    rows = masked.record.metrics
    assert [row["secure_withheld"] for row in rows] == [1, 1]
    for g in "ab":
        assert torch.allclose(
            masked.server.models[g].flat, plain.server.models[g].flat, atol=2 * rows[0]["secure_error"]
        )
    fields = {line["field"] for line in masked.record.ledger if line["kind"] == "train" and line["direction"] == "up"}
    assert fields and all(field.startswith("secure.") for field in fields)
    asked = {client for line in masked.record.ledger if line["direction"] == "up" for client in line["clients"]}
    assert 6 not in {
        k for li in masked.record.ledger if li["direction"] == "up" and li["kind"] == "train" for k in li["clients"]
    }
    assert asked >= set(range(6)) and masked.engine.states.get(6, {}) == {}


def test_privacy_of_clients_is_refused_and_other_levels_hold():
    pytest.importorskip("dp_accounting")
    with pytest.raises(UsageError, match="takes a mean a group: how many clients a group has"):
        ran(dp="client:noise=1.0")
    quiet, loud = ran(), ran(dp="local:gaussian,epsilon=50,clip=0.5")
    assert "epsilon" in loud.record.manifest["dp"][0] and "no guarantee" not in loud.record.manifest["dp"][0]
    assert difference(quiet.server.models, loud.server.models)
    assert SEEN[-1]["a"][1] == 4, "all count alike"


def test_compression_attacks_and_faults_act_as_under_mean():
    small = ran(compress="topk:0.1")
    assert small.record.metrics[0]["up_bytes"] < ran().record.metrics[0]["up_bytes"] / 2
    for settings in ({"attack": "sign_flip:0.3"}, {"attack": "alie:0.3"}, {"compress": "topk:0.1"}, {"cache": True}):
        together, apart = (ran(Grouped(apart=apart), rounds=1, **settings) for apart in (False, True))
        if "alie" not in str(settings):  # colluders see all replies of a call
            assert difference(together.server.models, apart.server.models) is None, settings
        assert settings.keys() & {"cache"} or difference(together.server.models, ran(rounds=1).server.models)
    damaged = ran(faults="nan:0.3+duplicate:0.3", rounds=4)
    assert sum(row["fault/refused"] for row in damaged.record.metrics) > 0
    assert all(count <= 4 for row in SEEN for count, _, _ in row.values())


def test_the_door_compares_the_replies_of_one_group():
    ran(Grouped(other=True), faults="duplicate:0.1", aggregate="median")
    assert [{g: count for g, (count, _, _) in row.items()} for row in SEEN] == [{"a": 4, "b": 3}] * 2


def test_an_argument_by_group_goes_to_each_of_its_clients():
    made = ran(rounds=1)
    down = sum(len(encoding.encode({"model": made.server.model})) for _ in SIZES)
    assert made.record.metrics[0]["down_bytes"] == down


def test_replies_may_be_partial():
    @dataclass(frozen=True)
    class Parts(Grouped):
        def round(self, server, cohort):
            means = cohort.means(self.local, GROUPS)
            SEEN.append({g: mean.part.dense().tolist() for g, mean in means.items()})

        @client
        def local(self, client):
            return {"part": Sparse(torch.tensor([client.id % 3]), torch.tensor([float(client.id)]), 3)}

    ran(Parts(), rounds=1)
    assert SEEN == [{"a": [3.0, 4.0, 2.0], "b": [3.0, 1.0, 5.0]}]  # 0 and 6; 4; 2 -- 3; 1; 5


@pytest.mark.parametrize(
    ("action", "complaint"),
    [
        (lambda self, cohort: cohort.means(self.local, {0: "a"}, model=0), "groups=.*lacks the clients \\[1, 2"),
        (
            lambda self, cohort: cohort.means(self.local, [1, 2], model=0),
            "got a list; expected the group of each client",
        ),
        (
            lambda self, cohort: cohort.means(self.local, dict.fromkeys(range(7), 0.5), model=0),
            "client 0 is in 0.5; a group",
        ),
        (lambda self, cohort: cohort.means(self.local, GROUPS, model=ByGroup({"a": 0})), "lacks the groups \\['b'\\]"),
        (
            lambda self, cohort: cohort.mean(self.local, model=ByGroup({"a": 0})),
            "only cohort.means has groups; take Each",
        ),
        (lambda self, cohort: cohort.means(self.local, GROUPS, model=Each({0: 0})), "lacks the clients \\[1, 2"),
    ],
)
def test_what_cannot_be_grouped_is_refused(action, complaint, monkeypatch):
    monkeypatch.setattr(Grouped, "round", lambda self, server, cohort: action(self, cohort))
    with pytest.raises((UsageError, RunError), match=complaint):
        ran()


def test_the_plan_knows_it():
    assert ("train", "means", "local") in {(call.kind, call.verb, call.function) for call in Grouped().plan}
