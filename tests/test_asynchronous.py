"""What all asynchronous methods share: real time on workers, worlds without clients, and two problems on real data."""

import contextlib
import math
from collections import Counter

import pytest

from fedloom.method import build
from fedloom.runs import checkpoint
from fedloom.runs.experiment import Experiment
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.tasks.several import toy
from fedloom.tasks.toy import Toy
from fedloom.testing import alike, trace

METHODS = ["fedasync", "fedbuff", "fedasmu", "fedcompass", "fedast", "async_local_sgd"]
SIZES = (30, 20, 25, 35)
SLOW = {"speed": "lognormal:1.0,within=10", "step_seconds": 0.05}


def made(name, out=None, fields=None, **settings):
    method = build(name, fields or {})
    spec = Spec.of({"method": method.to_spec(), "partition": "given", "eval_every": 50} | settings)
    return Experiment(spec, toy(SIZES) if name == "fedast" else Toy(SIZES), method).begin(out)


def went(name, **settings):
    one = made(name, **settings)
    one.go()
    return one


@pytest.mark.parametrize("lost", [0.0, 0.3])
@pytest.mark.parametrize("name", METHODS)
def test_in_real_time_on_workers_every_update_is_accounted_for(monkeypatch, name, lost):
    """Whoever got a message has answered, is booked as lost, or still works, client by client."""
    rounds = 8
    one = made(name, engine="pool", workers=2, clock="real", lost=lost, rounds=rounds)
    ended = Counter()
    booked = one.boundary.arrivals.book_arrival

    def note(call, client, began, trip, fate, outcomes):
        if call.verb == "submit":
            ended[client, fate] += 1
        return booked(call, client, began, trip, fate, outcomes)

    monkeypatch.setattr(one.boundary.arrivals, "book_arrival", note)
    one.go()
    sent, answered = (
        Counter(
            client
            for line in one.record.ledger
            if line["verb"] == "submit" and line["direction"] == direction and line["field"] == "envelope"
            for client in line["clients"]
        )
        for direction in ("down", "up")
    )
    came = Counter()
    for (client, _), count in ended.items():
        came[client] += count
    assert sent - came == Counter(one.boundary.pending.busy) and not came - sent
    assert answered == came, "a lost reply was sent, too"
    rows = one.record.metrics
    arrived = sum(count for (_, fate), count in ended.items() if fate == "arrived")
    assert len(rows) == rounds and sum(row["replies"] for row in rows) == arrived > 0
    assert lost or sum(ended.values()) == arrived
    assert all(row["virtual_seconds"] > 0 for row in rows)


@pytest.mark.parametrize("name", METHODS)
def test_a_trace_that_ends_ends_the_run(tmp_path, name):
    trace_file = tmp_path / "trace.csv"
    trace_file.write_text("client,start,stop\n0,0,2\n1,0,2.5\n")
    one = went(name, rounds=500, availability=f"trace:{trace_file}", **SLOW)
    assert "nobody can ever be reached" in one.record.manifest["stopped_because"]
    assert one.record.manifest["status"] == "finished" and len(one.record.metrics) < 500
    assert one.boundary.clock.now <= 2.5 + 1e-9 and not one.boundary.pending


@pytest.mark.parametrize("name", METHODS)
def test_without_anybody_the_model_stays_and_each_round_says_why(name):
    one = went(name, rounds=4, availability="bernoulli:0.0")
    assert [row["note"] for row in one.record.metrics] == [f"nobody could be reached in round {r}" for r in range(1, 5)]
    assert not one.boundary.pending and (one.server.model.flat == one.site.initial.flat).all()


@pytest.mark.parametrize("world", [{"dropout": 1.0}, {"lost": 1.0}], ids=["silent", "lost"])
@pytest.mark.parametrize("name", METHODS)
def test_where_no_reply_ever_comes_rounds_end_and_the_model_stays(name, world):
    one = went(name, rounds=3, **SLOW, **world)
    rows = one.record.metrics
    assert len(rows) == 3 and not any(row["replies"] for row in rows)
    assert (one.server.model.flat == one.site.initial.flat).all()


@pytest.mark.parametrize("name", METHODS)
def test_where_clients_break_off_each_round_ends(name):
    one = went(name, rounds=6, availability="markov:0.3,period=0.02", **SLOW)
    assert len(one.record.metrics) == 6
    assert sum(row["broken"] for row in one.record.metrics) > 0


def test_two_problems_on_real_data_go_on_bitwise_after_a_stop(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(checkpoint, "SHARE", math.inf)
    settings = {
        "method": {"name": "fedast", "epochs": 1, "buffer": 2},
        "data": "digits",
        "problem": "several:breast_cancer",
        "clients": 8,
        "partition": "dirichlet:0.5",
        "rounds": 60,
        "eval_every": 30,
        "speed": "lognormal:1.0,within=10",
    }
    through = Experiment(Spec.of(settings)).begin(tmp_path / "through")
    through.go()
    final = through.record.final
    assert final["server/part_0_accuracy"] > 0.5 and final["server/part_1_accuracy"] > 0.8
    assert all(part["version"] > 8 for part in through.server.parts)

    def stop(row):
        if row["round"] in (7, 33):
            raise KeyboardInterrupt

    begun, under_way = Experiment(Spec.of(settings)).begin(tmp_path / "stopped"), []
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            begun.go(stop)
        under_way.append(len(begun.boundary.pending))
        record = Run(tmp_path / "stopped")
        begun = Experiment(record.spec).take_up(record)
    begun.go()
    assert min(under_way) > 0
    alike(trace(through), trace(begun), "FedAST resumed on two problems")
