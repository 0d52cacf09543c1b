"""The content cache: what a client surely holds costs its hash, and nothing else does."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from problems import Streaming, stopped_and_resumed

from fedloom import encoding
from fedloom.boundary.cache import HELD, NAME, Cache, name_of, weigh
from fedloom.calls import Call
from fedloom.cohort import Each
from fedloom.engines import build
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.registry import catalogue
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, difference, trace
from fedloom.vector import Layout, Vector

NAMED = encoding.sizes({"model": bytes(NAME)})["model"]


@dataclass(frozen=True)
class Still(Method):
    """A server whose model moves in some rounds only; `own` clients get one of their own."""

    moves: tuple[int, ...] = ()
    own: tuple[int, ...] = ()

    def round(self, server, cohort):
        if server.round in self.moves:
            server.model = server.model + 1.0
        if self.own:
            models = {k: server.model + float(k) if k in self.own else server.model for k in cohort}
            cohort.call(self.local, model=Each(models), number=3)
        else:
            cohort.mean(self.local, model=server.model, number=3)

    @client
    def local(self, client, model, number):
        return {"n": client.n}


def down(made, field="model", kind="train"):
    """Bytes of a field by (round, client)."""
    booked = {}
    for line in made.record.ledger:
        if line["direction"] == "down" and line["field"] == field and line["kind"] == kind:
            for k in line["clients"]:
                booked[line["round"], k] = booked.get((line["round"], k), 0) + line["bytes"]
    return booked


def ran(method=None, task=None, engine=None, **settings):
    return Lab(method or Still()).experiment(task or Toy((4, 5, 6)), engine, **{"rounds": 4, "cache": True} | settings)


def whole(made):
    return encoding.sizes({"model": made.site.initial})["model"]


@pytest.mark.parametrize("engine", ["serial", "loopback", "pool"])
def test_a_value_that_did_not_change_costs_its_hash(engine):
    made = ran(Still(moves=(3,)), engine=build(engine, workers=2))
    full = whole(made)
    assert full > 300 and NAMED < 30
    assert down(made) == {(r, k): full if r in (1, 3) else NAMED for r in (1, 2, 3, 4) for k in range(3)}
    numbers = encoding.sizes({"number": 3})["number"]
    assert set(down(made, "number").values()) == {numbers}, "a small value costs itself"
    row, rest = made.record.metrics[1], len(encoding.encode({})) + numbers
    assert row["down_bytes"] == 3 * (rest + NAMED) == 3 * len(encoding.encode({"model": bytes(NAME), "number": 3}))


def test_clients_values_of_their_own_are_told_apart():
    made = ran(Still(own=(1, 2)))
    full = whole(made)
    assert down(made) == {(r, k): full if r == 1 else NAMED for r in (1, 2, 3, 4) for k in range(3)}
    moved = ran(Still(moves=(3,), own=(1,)))
    assert down(moved)[3, 0] == full, "client 0 was never sent what client 1 held"


def test_the_server_counts_only_on_messages_that_were_answered():
    for settings in ({"lost": 0.4}, {"dropout": 0.4}, {"lost": 0.3, "dropout": 0.3}):
        made = ran(rounds=10, **settings)
        world, full, holds, expected = made.world, whole(made), set(), {}
        for r in range(1, 11):
            for k in range(3):
                expected[r, k] = NAMED if k in holds else full
                silent = settings.get("dropout") and world.silent(r, 0, k)
                lost = settings.get("lost") and world.loses(r, 0, k)
                (holds.discard if silent or lost else holds.add)(k)
        assert down(made) == expected
        assert {NAMED, full} == set(list(expected.values())[3:])


def test_who_sat_out_a_round_still_holds_what_it_had():
    made = ran(cohort=1, rounds=12, task=Toy((4, 5, 6)))
    seen = set()
    for (r, k), size in sorted(down(made).items()):
        assert size == (NAMED if k in seen else whole(made)), r
        seen.add(k)
    assert len(seen) > 1


def test_only_the_last_values_are_held():
    @dataclass(frozen=True)
    class Many(Still):
        def round(self, server, cohort):
            for shift in (*range(HELD + 1), HELD - 1, 0):
                cohort.call(self.local, model=server.model + float(shift), number=shift)

    made = ran(Many(), rounds=1)
    costs = down(made)
    assert costs == dict.fromkeys(costs, (HELD + 2) * whole(made) + NAMED)
    held = made.boundary.books.memory["cache"]["held"]
    names = [name_of(made.server.model + float(shift)) for shift in (*range(2, HELD - 1), HELD, HELD - 1, 0)]
    assert all(kept == b"".join(names) for kept in held.values())
    assert len(names) == HELD


def test_a_value_that_stands_twice_in_a_message_is_held_once():
    @dataclass(frozen=True)
    class Twice(Still):
        def round(self, server, cohort):
            cohort.call(self.pair, model=server.model, number=server.model)

        @client
        def pair(self, client, model, number):
            return {}

    made = ran(Twice(), rounds=2)
    assert set(made.boundary.books.memory["cache"]["held"].values()) == {name_of(made.server.model)}
    assert {size for (r, _), size in down(made, "number").items() if r == 2} == {
        encoding.sizes({"number": bytes(NAME)})["number"]
    }


def test_only_values_of_more_than_64_bytes_have_names():
    for length in range(20, 80):
        value = b"x" * length
        size = encoding.sizes({"f": value})["f"]
        whole, short, name = weigh("f", value)
        named = (encoding.sizes({"f": bytes(16)})["f"], name_of(value))
        assert (whole, short, name) == ((size, *named) if size > 64 else (size, size, b""))
    assert {encoding.sizes({"f": b"x" * length})["f"] for length in range(20, 80)} >= {64, 65}


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"lost": 0.5}])
def test_calls_of_earlier_rounds_are_forgotten_whoever_was_silent(settings):
    made = ran(rounds=8, **settings)
    assert len(made.pipeline.one(Cache).sent(made.boundary.books)) <= 1


def test_evaluation_neither_uses_the_cache_nor_fills_it():
    often, seldom = ran(FedAvg()), ran(FedAvg(), eval_every=4)
    assert down(often) == down(seldom)
    full = encoding.sizes({"model": often.site.initial})["model"]
    assert set(down(often, kind="evaluate").values()) == {full}
    plain = ran(FedAvg(), cache=False)
    assert down(often) == down(plain), "a model that moves every round is never held"


@pytest.mark.parametrize("name", [entry.name for entry in catalogue()])
def test_it_changes_nothing_but_bytes_and_never_adds_any(name):
    lab = Lab(next(entry for entry in catalogue() if entry.name == name).load(Method))
    made = trace(lab.experiment(cache=True))
    assert difference([made["server"], made["states"]], [lab.serial["server"], lab.serial["states"]]) is None
    for row, before in zip(made["metrics"], lab.serial["metrics"], strict=True):
        assert row["down_bytes"] <= before["down_bytes"]
        assert row | {"down_bytes": 0} == before | {"down_bytes": 0}


def test_a_stream_that_nobody_listens_to_any_more():
    made = Lab(Streaming()).experiment(cache=True, rounds=2)
    plain = Lab(Streaming()).experiment(rounds=2)
    assert difference(dict(made.server.values), dict(plain.server.values)) is None
    assert sum(down(made).values()) <= sum(down(plain).values())


@dataclass(frozen=True)
class Overlap(Still):
    """Submitted work that comes back a round later."""

    def round(self, server, cohort):
        cohort.idle.submit(self.local, model=server.model, number=3)
        cohort.wait(2)


def test_submitted_work_is_acknowledged_when_it_lands():
    made = ran(Overlap(), rounds=6, speed="lognormal:1.0")
    first = {}
    for (r, k), size in sorted(down(made).items()):
        assert size == (NAMED if k in first else whole(made))
        first[k] = r
    assert NAMED in down(made).values()
    still_out = made.boundary.pending.busy
    waiting = [k for _, clients, _ in made.pipeline.one(Cache).sent(made.boundary.books).values() for k in clients]
    assert sorted(waiting) == sorted(still_out), "nothing is kept of calls that have ended"


@pytest.mark.parametrize("method", [Still(moves=(2,)), Overlap()], ids=["mean", "submit"])
def test_a_resumed_run_has_the_same_books(tmp_path, method):
    task = Toy((4, 5, 6))
    settings = {"partition": "given", "rounds": 4, "cache": True, "speed": "lognormal:1.0"}
    spec = Spec.of({"method": method.to_spec(), **settings})
    one = Experiment(spec, task, method).begin(None)
    one.go()
    again = stopped_and_resumed(spec, task, method, tmp_path / "run", after=2)
    assert difference(trace(one)["ledger"], trace(again)["ledger"]) is None
    assert NAMED in [size for (r, _), size in down(again).items() if r > 2]


def test_a_name_tells_values_apart_that_differ_in_anything():
    values = [
        torch.zeros(3),
        torch.zeros(3, 1),
        torch.zeros(3).double(),
        -torch.zeros(3),
        [torch.zeros(3)],
        b"\x00" * 12,
        {"a": torch.zeros(3)},
        *(Vector(torch.zeros(3), Layout((name,), (shape,), 1)) for name in "ab" for shape in ((3,), (3, 1))),
    ]
    assert len({name_of(value) for value in values}) == len(values)
    assert name_of(torch.ones(2, 2)) == name_of(torch.ones(2, 2).T)


def test_byte_budgets_count_what_the_cache_saves():
    budget = 3 * 2 * 500
    plain, cached = (ran(rounds=30, cache=cache, max_bytes=budget) for cache in (False, True))
    assert len(cached.record.metrics) > 2 * len(plain.record.metrics)
    assert "max_bytes" in plain.manifest["stopped_because"]


def test_two_calls_of_one_round_are_told_apart_and_ended_ones_forgotten():
    cache, books, model = Cache(), SimpleNamespace(memory={}), torch.ones(100)
    calls = [Call("submit", "local", (k,), {"model": model * (k + 1)}, {}, "train", 1, nth=k) for k in (0, 1)]
    for call in calls:
        list(cache.message_sizes(books, call, None))
    cache.begin(books)  # a new server step, while both are at work
    for k, call in enumerate(calls):
        cache.call_ended(books, call, k, arrived=True)
        assert cache.held(books)[k] == name_of(model * (k + 1)), "of its own call"
    assert cache.sent(books) == {}, "nobody is at work for them any more"


def test_a_field_called_inbox_is_counted_unless_peers_sent_it():
    sent = {k: {"inbox": torch.full((100,), float(k))} for k in (0, 1)}
    for verb, counted in (("call", True), ("exchange", False)):
        call = Call(verb, "local", (0, 1), {}, sent, "train", 1, nth=0)
        groups = list(Cache().message_sizes(SimpleNamespace(memory={}), call, None))
        assert all(("inbox" in sizes) == counted for _, sizes in groups) and groups
