"""The one place where messages pass: the books are exact, and nothing that may not cross does."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from fedloom import encoding, message
from fedloom.boundary.cache import Cache
from fedloom.boundary.ledger import TOTALS, Ledger
from fedloom.boundary.pipeline import Pipeline
from fedloom.boundary.secure import Secure
from fedloom.calls import Call, ClientError
from fedloom.cohort import Each
from fedloom.engines import build
from fedloom.errors import UsageError
from fedloom.message import Packed, Seed, Sparse
from fedloom.method import Method, client
from fedloom.method import build as build_method
from fedloom.registry import catalogue
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab
from fedloom.vector import Vector

CALL = Call("call", "local", (0, 1, 2), {}, {}, "train", 3, 0)


def test_the_ledger_forgets_the_order_of_arrival():
    charges = [("up", 2, {"x": 5}), ("up", 0, {"x": 5, "y": 1}), ("down", 1, {"m": 9}), ("up", 1, {"x": 6})]
    pages = []
    for order in itertools.permutations(charges):
        ledger = Ledger()
        for direction, party, sizes in order:
            ledger.charge(3, CALL, direction, [party], sizes)
        pages.append(ledger.close())
    assert all(page == pages[0] for page in pages)
    lines, totals = pages[0]
    assert totals == dict.fromkeys(TOTALS, 0) | {"up_bytes": 17, "down_bytes": 9}
    assert [(li["direction"], li["field"], li["bytes"], li["clients"]) for li in lines] == [
        ("down", "m", 9, [1]),
        ("up", "x", 5, [0, 2]),
        ("up", "x", 6, [1]),
        ("up", "y", 1, [0]),
    ]
    assert all((li["round"], li["kind"], li["verb"], li["function"]) == (3, "train", "call", "local") for li in lines)


def test_a_closed_page_is_empty_and_evaluation_has_an_account_of_its_own():
    ledger = Ledger()
    ledger.charge(1, CALL, "peer", [(1, 0)], {"x": 4})
    ledger.charge(1, CALL, "peer", [(0, 1)], {"x": 4})
    ledger.charge(1, Call("call", "predict", (0,), {}, {}, "evaluate", 1, 0), "up", [0], {"x": 4})
    lines, totals = ledger.close()
    assert totals == dict.fromkeys(TOTALS, 0) | {"peer_bytes": 8, "eval_up_bytes": 4}
    assert [li["edges"] for li in lines if li["direction"] == "peer"] == [[(0, 1), (1, 0)]]
    assert ledger.close() == ([], dict.fromkeys(TOTALS, 0))


def test_messages_that_differ_in_anything_are_lines_of_their_own():
    others = [replace(CALL, **other) for other in ({"function": "else"}, {"verb": "mean"}, {"kind": "setup"})]
    ledger, everybody = Ledger(), [2, 0]
    for call in (CALL, *others):
        assert ledger.charge(3, call, "up", everybody, {"x": 5})
    everybody.clear()
    assert ledger.charge(4, CALL, "up", [1], {"x": 5}), "that round, whatever round the call is of"
    assert not ledger.charge(4, CALL, "up", [0], {"x": 5}), "not the first of its like"
    assert not ledger.charge(5, CALL, "up", [], {"x": 5})
    lines, totals = ledger.close()
    assert [(li["round"], li["kind"], li["verb"], li["function"], li["clients"]) for li in lines] == [
        (3, "setup", "call", "local", [0, 2]),
        (3, "train", "call", "else", [0, 2]),
        (3, "train", "call", "local", [0, 2]),
        (3, "train", "mean", "local", [0, 2]),
        (4, "train", "call", "local", [0, 1]),
    ]
    assert totals["up_bytes"] == 5 * 10


@pytest.mark.parametrize("name", [entry.name for entry in catalogue()])
def test_the_ledgers_lines_add_up_to_the_metrics(name):
    lab = Lab(next(e for e in catalogue() if e.name == name).load(Method))
    world = {setting: 0.2 for setting in ("dropout", "lost") if setting not in lab.cls.refuses}
    made = lab.experiment(lab.toy(sizes=(6, 9, 4)), **world)
    lines = list(made.record.ledger)
    for row in made.record.metrics:
        # What `setup` and `finish` sent is in the first and the last round's totals.
        first = [0] if row["round"] == 1 else []
        for total in TOTALS:
            direction = total.removesuffix("_bytes").removeprefix("eval_")
            booked = sum(
                line["bytes"] * len(line.get("clients", line.get("edges", ())))
                for line in lines
                if line["round"] in [row["round"], *first]
                and line["direction"] == direction
                and (line["kind"] == "evaluate") == total.startswith("eval_")
            )
            assert booked == row[total], (row["round"], total)


@dataclass(frozen=True)
class Talk(Method):
    """A method that sends what a test asks for."""

    def setup(self, server, clients):
        server.enrolled = len(clients.call(self.enrol))

    def round(self, server, cohort):
        cohort.call(self.local, **self.sent(server, cohort))

    def sent(self, server, cohort):
        return {"model": server.model}

    @client
    def enrol(self, client):
        return {"n": client.n}

    @client
    def local(self, client, **sent):
        return self.reply(client, **sent)

    def reply(self, client, **sent):
        return {"n": client.n}


def talk(monkeypatch, sent=None, reply=None, engine="serial", **settings):
    if sent:
        monkeypatch.setattr(Talk, "sent", sent)
    if reply:
        monkeypatch.setattr(Talk, "reply", reply)
    return Lab(Talk()).experiment(Toy((4, 5)), build(engine), rounds=1, **settings)


VALUES = {
    "nothing": None,
    "number": 3,
    "long": 2**40,
    "text": "grüß",
    "raw": b"\x00" * 300,
    "mask": Packed(torch.ones(100, dtype=torch.bool), 1),
    "few": Sparse(torch.tensor([1, 5]), torch.ones(2), 1000),
    "seed": Seed(2**62),
    "half": torch.ones(3, 2, dtype=torch.bfloat16),
    "nested": {"a": [1, (2.0, {"b": None})], 3: torch.ones(0)},
}


@pytest.mark.parametrize("engine", ["serial", "loopback"])
def test_bytes_are_those_of_the_encoded_message(monkeypatch, engine):
    made = talk(monkeypatch, lambda self, server, cohort: VALUES, lambda self, client, **sent: sent, engine)
    size = len(encoding.encode(VALUES))
    row = made.record.metrics[0]
    assert row["down_bytes"] == 2 * (size + len(encoding.encode({})))
    assert row["up_bytes"] == 2 * (size + len(encoding.encode({"n": 4})))
    fields = {
        li["field"]: li["bytes"] for li in made.record.ledger if li["function"] == "local" and li["direction"] == "up"
    }
    assert fields == encoding.sizes(VALUES)
    masked = fields["mask"]
    assert masked < 13 + 40, "a mask is one bit an entry"


def test_who_enrols_in_setup_is_there_whatever_the_world(monkeypatch):
    made = talk(monkeypatch, dropout=1.0, lost=1.0)
    assert made.server.enrolled == 2
    assert {li["kind"] for li in made.record.ledger if li["round"] == 0} == {"setup"}


def test_measuring_is_not_disturbed_by_the_world(monkeypatch):
    undisturbed, disturbed = (talk(monkeypatch, lost=share).record for share in (0.0, 1.0))
    measures = ("global_test_accuracy", "validation_accuracy", "personal_test_accuracy", "worst_client_accuracy")
    assert all(undisturbed.final[name] == disturbed.final[name] for name in measures)
    assert disturbed.final["replies"] == 0 and [c["id"] for c in disturbed.clients["clients"]] == [0, 1]


def test_the_privacy_statement_lists_what_the_server_saw(monkeypatch):
    made = talk(monkeypatch, reply=lambda self, client, **sent: {"delta": sent["model"] * 0.5, "extra": 1})
    assert made.record.manifest["privacy"] == [
        {"verb": "call", "function": "enrol", "fields": ["n"]},
        {"verb": "call", "function": "local", "fields": ["delta", "extra"]},
    ]


def test_the_privacy_statement_lists_what_only_one_client_told(monkeypatch):
    made = talk(monkeypatch, reply=lambda self, client, **sent: {"n": 1, f"of_{client.id}": 2})
    assert made.record.manifest["privacy"][-1] == {"verb": "call", "function": "local", "fields": ["n", "of_0", "of_1"]}
    alone = talk(monkeypatch, reply=lambda self, client, **sent: {"n": 1}, cohort=1)
    assert alone.record.manifest["privacy"][-1] == {"verb": "call", "function": "local", "fields": ["n"]}


NAN = float("nan")
BAD = [
    (lambda c: {"x": torch.tensor([1.0, NAN])}, "ValueError: the field 'x' of the reply has NaN or infinite numbers"),
    (lambda c: {"x": Vector(c.initial.flat + float("inf"), c.layout)}, "the field 'x' of the reply has NaN"),
    (lambda c: {"x": [1, {"y": (NAN,)}]}, "the field 'x' of the reply has NaN"),
    (lambda c: {"x": [1, {"y": (float("-inf"),)}]}, "the field 'x' of the reply has NaN or infinite numbers"),
    (lambda c: {"x": Sparse(torch.tensor([1]), torch.tensor([NAN]), 3)}, "the field 'x' of the reply has NaN"),
    (lambda c: {"x": torch.tensor([complex(1, NAN)])}, "the field 'x' of the reply has NaN"),
    (lambda c: {"x": torch.tensor([NAN]).to(torch.float8_e4m3fn)}, "the field 'x' of the reply has NaN"),
    (lambda c: {"x": torch.tensor([NAN], dtype=torch.bfloat16)}, "the field 'x' of the reply has NaN"),
    (lambda c: {"net": nn.Linear(1, 1)}, "CodecError: field 'net'"),
    (lambda c: {"x": {1, 2}}, "CodecError: field 'x'"),
    (lambda c: {"x": torch.ones(1, requires_grad=True)}, "requires grad may not cross: detach it"),
    (lambda c: {"not a name": 1}, "a field is called by an identifier"),
    (lambda c: {"client": 1}, "a reply has no field called 'client'; choose another name"),
    (lambda c: {"fields": 1}, "a reply has no field called 'fields'; choose another name"),
    (lambda c: [1, 2], "TypeError: a client function returns a dict of fields or None, not a list"),
    (lambda c: c.initial @ 3, "AttributeError"),
]


@pytest.mark.parametrize("engine", ["serial", "loopback"])
@pytest.mark.parametrize(("answer", "complaint"), BAD)
def test_a_reply_that_may_not_leave_its_client_stops_the_run(monkeypatch, engine, answer, complaint):
    with pytest.raises(ClientError) as failed:
        talk(monkeypatch, reply=lambda self, client, **sent: answer(client) if client.id == 1 else None, engine=engine)
    told = str(failed.value)
    assert told.startswith("client 1, round 1, test_boundary.local: ") and complaint in told
    assert told.endswith("[sent: model: Vector[83]]") and "\n" not in told


FINE = [
    {"x": torch.full((3,), 3e38)},  # finite, though the sum is not
    {"x": torch.full((3,), 6e4, dtype=torch.float16)},
    {"x": torch.tensor([448.0]).to(torch.float8_e4m3fn)},
    {"x": torch.tensor([complex(1, 2)])},
    {"x": torch.ones(0)},
    {"x": 1e308, "y": torch.tensor([2**62, 2**62])},
]


@pytest.mark.parametrize("reply", FINE)
def test_finite_replies_pass(monkeypatch, reply):
    made = talk(monkeypatch, reply=lambda self, client, **sent: reply)
    assert made.record.final["replies"] == 2


@pytest.mark.parametrize("engine", ["serial", "loopback"])
def test_what_a_server_may_not_send_is_refused_by_name(monkeypatch, engine):
    with pytest.raises(message.CodecError, match="field 'net'"):
        talk(monkeypatch, sent=lambda self, server, cohort: {"net": nn.Linear(1, 1)}, engine=engine)
    with pytest.raises(message.CodecError, match="field 'net'"):
        each = Each({0: nn.Linear(1, 1), 1: None})
        talk(monkeypatch, sent=lambda self, server, cohort: {"net": each}, engine=engine)


@pytest.mark.parametrize("engine", ["serial", "loopback"])
def test_vectors_that_came_are_readonly_wherever_they_stand(monkeypatch, engine):
    seen = []

    def reply(self, client, model, deep, own):
        seen.append([model.readonly, deep["x"][0][0].readonly, own.readonly])
        client.state["mine"] = client.initial.clone()
        return {"v": client.initial.clone()}

    def sent(self, server, cohort):
        vector = server.model.clone()
        return {"model": vector, "deep": {"x": [(vector,)]}, "own": Each({0: vector, 1: vector})}

    talk(monkeypatch, sent, reply, engine)
    assert seen == [[True, True, True]] * 2


@pytest.mark.parametrize("engine", ["serial", "loopback"])
def test_what_a_client_remembers_comes_back_readonly(monkeypatch, engine):
    """Otherwise a gradient would move remembered statistics in place, on one engine and not on another."""
    kept = []

    def sent(self, server, cohort):
        cohort.call(self.enrol)
        return {}

    def enrol(self, client):
        vector = client.state.get("mine", client.initial.clone())
        kept.append(vector.readonly)
        client.state["mine"] = vector.clone()

    enrol.__client__ = True
    monkeypatch.setattr(Talk, "enrol", enrol)
    talk(monkeypatch, sent, engine=engine)
    assert kept == [False, False, True, True]


@dataclass(frozen=True)
class Tally(Method):
    """Each client counts what it was asked, the server what it heard of each."""

    verb: str = "call"

    def setup(self, server, clients):
        server.heard = {}

    def round(self, server, cohort):
        replies = []
        if self.verb == "submit":
            cohort.idle.submit(self.count, model=server.model)
            replies = cohort.wait(min(2, cohort.working))
        elif self.verb == "exchange":
            cohort.exchange(self.count, self.mix, {k: list(cohort) for k in cohort}, model=server.model)
        elif self.verb == "mean":
            cohort.mean(self.count, weight="n", model=server.model)
        else:
            replies = getattr(cohort, self.verb)(self.count, model=server.model)
        for reply in replies:
            server.heard = server.heard | {reply.client: server.heard.get(reply.client, 0) + 1}
            assert reply.asked == server.heard[reply.client], "the client counts as the server does"

    @client
    def count(self, client, model):
        client.state["asked"] = client.state.get("asked", 0) + 1
        moved = model.merge(model.params + (1.0 + client.id) * (1.0 + client.id**2))  # no two alike, none between two
        return {"model": moved, "asked": client.state["asked"], "n": 1.0}

    @client
    def mix(self, client, inbox, model):
        client.state["mixed"] = client.state.get("mixed", 0) + 1


SLOW = {"speed": "lognormal:1.0", "step_seconds": 1.0, "latency": 0.5, "bandwidth": "uniform:0.001,0.01"}
UNCOUNTED = {
    "lost": {"lost": 0.4},
    "late": {"deadline": 3.0} | SLOW,
    "surplus": {"cohort": 3, "overselect": 1.7} | SLOW,
    "broken": {"availability": "markov:0.6,cycle=4,period=2"} | SLOW,
    "door": {"faults": "nan:0.4"},
    "on the way": {"faults": "lost:0.2+late:0.2+duplicate:0.2"},
    "all at once": {"lost": 0.2, "cohort": 3, "overselect": 1.7, "deadline": 4.0, "faults": "nan:0.2"} | SLOW,
}


@pytest.mark.parametrize("engine", ["serial", "loopback", "pool", "vectorized"])
@pytest.mark.parametrize("verb", ["call", "stream", "submit"])
@pytest.mark.parametrize("why", UNCOUNTED)
def test_a_client_whose_reply_does_not_count_is_as_if_it_had_not_been_asked(why, verb, engine):
    if verb == "submit" and "deadline" in UNCOUNTED[why]:
        pytest.skip("submitted work refuses the deadline of rounds")
    made = Lab(Tally(verb)).experiment(
        Toy((9, 12, 7, 15, 8)), build(engine, 2 if engine == "pool" else 0), rounds=8, **UNCOUNTED[why]
    )
    states = {k: state["asked"] for k, state in made.engine.states.items()}
    asked = sum(
        len(line["clients"]) for line in made.record.ledger if line["field"] == "model" and line["direction"] == "down"
    )
    assert states == made.server.heard and 0 < sum(states.values()) < asked, "the setting bites, but not always"


@pytest.mark.parametrize("engine", ["serial", "pool"])
def test_under_mean_only_replies_that_count_move_their_client(engine):
    for settings in UNCOUNTED.values():
        made = Lab(Tally("mean")).experiment(Toy((9, 12, 7, 15, 8)), build(engine, 2), rounds=8, **settings)
        counted = sum(row["replies"] for row in made.record.metrics if "note" not in row)
        assert sum(state["asked"] for state in made.engine.states.values()) == counted > 0


@pytest.mark.parametrize(("rule", "taken"), [("krum:f=1", 1), ("multi_krum:f=1,m=3", 3), ("median", 6)])
def test_whom_a_robust_rule_rejects_is_as_if_it_had_not_been_asked(rule, taken):
    made = Lab(Tally("mean")).experiment(Toy((9, 12, 7, 15, 8, 8)), rounds=4, aggregate=rule)
    assert sum(state["asked"] for state in made.engine.states.values()) == 4 * taken


def test_peers_owe_the_server_no_reply():
    made = Lab(Tally("exchange")).experiment(Toy((9, 12, 7)), rounds=5, lost=0.5)
    assert [dict(state) for state in made.engine.states.values()] == [{"asked": 5, "mixed": 5}] * 3


def pipeline(method="fedavg", **settings):
    spec = Spec.of({"method": method, **settings})
    return Pipeline.of(spec, build_method(method), Toy())


def on_the_way(made):
    return [type(stage).__name__ for stage in made.with_hook("outcomes")]


def test_a_reply_meets_the_attack_the_mechanism_and_the_compression_in_this_order():
    pytest.importorskip("dp_accounting")
    made = pipeline(
        attack="alie:0.25,z=1.5+nan:0.25", dp="local:laplace,epsilon=1,clip=1", compress="topk:0.1", faults="late:0.1"
    )
    kinds = [type(layer).__module__.split(".")[2] for layer in made.layers]
    assert kinds == ["attack", "privacy", "compress"], "compression is undone last where the reply arrives"
    transits = on_the_way(made)
    assert transits[-1] == "Faults", "the door is behind whatever was done"
    assert len(transits) == 3


def test_a_passage_has_what_is_asked_for_and_no_more():
    assert pipeline() == Pipeline()
    assert pipeline(cache=True).stages == (Cache(),) and pipeline(aggregate="median").stages[0].rule.name() == "median"
    assert on_the_way(pipeline(attack="sign_flip:0.2")) == ["Faults"], "a door"


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, set()),
        ({"cache": True, "compress": "sign"}, set()),
        ({"aggregate": "median"}, {"train"}),
        ({"secure": "bonawitz"}, {"train"}),
        ({"faults": "lost:0.1"}, {"train", "finish"}),
        ({"attack": "sign_flip:0.2"}, {"train", "finish"}),
    ],
)
def test_replies_are_needed_one_by_one_where_something_acts_on_each(settings, kinds):
    made = pipeline(**settings)
    assert {kind for kind in ("setup", "train", "finish", "evaluate") if made.whole(kind)} == kinds


SENSELESS = [
    ("fedavg", {"aggregate": "median", "secure": "bonawitz"}, "a robust rule must see every reply"),
    ("fedavg", {"compress": "sign", "secure": "bonawitz"}, "masks make every number as long as any other"),
    ("fedavg", {"faults": "nan:0.1", "secure": "bonawitz"}, "under a mask every number is a whole one of the field"),
    ("fedavg", {"attack": "nan:0.2", "secure": "bonawitz"}, "under a mask every number is a whole one of the field"),
    ("fedma", {"faults": "corrupt:0.1"}, "fedma does not go with faults=corrupt:0.1"),
    ("fedma", {"attack": "nan:0.2"}, "fedma does not go with attack=nan:0.2"),
    ("fedbuff", {"aggregate": "median"}, "aggregate=median takes the place of the mean that a server asks for"),
    ("fedbuff", {"secure": "bonawitz"}, "secure=bonawitz masks the sums that a server asks for"),
    ("centralized", {"faults": "lost:0.1"}, "on what clients do in a round, and those of centralized do nothing"),
    ("power_of_choice", {"secure": "bonawitz"}, "only what a method sums by mean is secure"),
]


@pytest.mark.parametrize(("method", "settings", "told"), SENSELESS)
def test_what_makes_no_sense_together_is_refused_before_anything_runs(method, settings, told):
    with pytest.raises(UsageError, match=told):
        pipeline(method, **settings)


def test_damage_that_masks_can_bear_is_taken():
    assert pipeline(secure="bonawitz", faults="corrupt:0.1+lost:0.1").one(Secure)
    assert pipeline(secure="bonawitz", attack="sign_flip:0.2").one(Secure)
