"""Overlapping work: in which order it ends, what is seen meanwhile, and that stopping in the middle changes no bit."""

import contextlib
import heapq
import math
import tracemalloc
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from fedloom import encoding
from fedloom.boundary.timeline import Timeline
from fedloom.calls import Outcome
from fedloom.cohort import Each
from fedloom.engines import build
from fedloom.engines.serial import Serial
from fedloom.errors import NobodyReplied, UsageError
from fedloom.method import Method, client
from fedloom.methods.asynchronous.fedbuff import FedBuff
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.report import write
from fedloom.report.curves import panels
from fedloom.report.timeline import described, window
from fedloom.runs import checkpoint
from fedloom.runs.experiment import Experiment
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, alike, trace
from fedloom.world import Trip

SIZES = (30, 20, 25, 35, 10, 15)
SEEN: list = []
ACT: list = []
WORKED: list = []  # whom `Script` had at work, on an engine of this process


@dataclass(frozen=True)
class Async(Method):
    """Whoever is idle trains on the newest model; the next `k` are mixed in as they come."""

    k: int = 2
    lr: float = 0.1
    seconds: float | None = None  # that a step waits

    def setup(self, server, clients):
        server.moves = 0

    def round(self, server, cohort):
        marks = Each({key: [server.round, server.moves] for key in cohort.idle})
        cohort.idle.submit(self.local, model=server.model, mark=marks)
        began = cohort.now
        replies = cohort.wait(min(self.k, len(cohort)), deadline=self.seconds)
        for reply in replies:
            server.model = server.model + reply.delta / (1 + reply.staleness)
            assert reply.mark[1] == server.moves - reply.staleness, "the model has moved so often since"
        ages = [(r.client, server.round - r.mark[0], r.seconds) for r in replies]
        SEEN.append((ages, replies.missing, cohort.now - began))
        server.moves = server.moves + bool(replies)
        server.log(staleness=sum(reply.staleness for reply in replies))

    @client
    def local(self, client, model, mark):
        client.state["worked"] = client.state.get("worked", 0) + 1
        w, steps = client.descend(model, lr=self.lr, batch=10)
        return {"delta": 0.3 * (w - model), "steps": steps, "mark": mark}

    @client
    def predict(self, client, model):
        client.log(worked=client.state.get("worked", 0))
        return model


def ran(method=None, sizes=SIZES, engine="serial", **settings):
    SEEN.clear()
    made = Lab(method or Async()).experiment(Toy(sizes), build(engine, workers=2), **{"rounds": 6} | settings)
    return made, list(SEEN)


WORLD = {"speed": "lognormal:1.0,within=10", "step_seconds": 1.0, "bandwidth": "0.01", "latency": 0.1}


def by_hand(made, rounds, k):
    """The order of arrival from a simulation of the queue in plain Python: (client, staleness, seconds) by round."""
    world, steps = made.world, [math.ceil(n / 10) for n in SIZES]
    sizes = {"down": None, "up": None}
    for line in made.record.ledger:
        if line["kind"] == "train" and line["round"] == 1:
            way = line["direction"]
            sizes[way] = (sizes[way] or Counter()) + Counter({line["field"]: line["bytes"]})
    down, up = (sum(sizes[way].values()) for way in ("down", "up"))
    now, queue, free, out, number = 0.0, [], set(range(len(SIZES))), [], 0
    for round in range(1, rounds + 1):
        for each in sorted(free):
            speed = world.profile(each)["speed"]
            seconds = 2 * 0.1 + (down + up) / (0.01 * 125_000) + steps[each] / speed
            heapq.heappush(queue, (now + seconds, number, each, round, seconds))
            number += 1
        free.clear()
        arrived = [heapq.heappop(queue) for _ in range(k)]
        now = arrived[-1][0]
        free |= {entry[2] for entry in arrived}
        out.append([(client, round - begun, seconds) for _, _, client, begun, seconds in arrived])
    return out


def test_work_ends_in_the_order_of_the_clock():
    made, seen = ran(**WORLD)
    expected = by_hand(made, 6, 2)
    for (got, missing, _), wanted in zip(seen, expected, strict=True):
        assert missing == ()
        assert [entry[:2] for entry in got] == [entry[:2] for entry in wanted]
        assert [entry[2] for entry in got] == pytest.approx([entry[2] for entry in wanted])
    assert any(staleness > 1 for got, _, _ in seen for _, staleness, _ in got), "the slow ones are overtaken"
    total = sum(row["virtual_seconds"] for row in made.record.metrics)
    assert total == pytest.approx(made.boundary.clock.now)
    assert [row["virtual_seconds"] for row in made.record.metrics] == pytest.approx([took for *_, took in seen])


@dataclass(frozen=True)
class Script(Method):
    """Does in its only round what a test has put into ACT."""

    def round(self, server, cohort):
        SEEN.append(ACT[0](self, server, cohort))

    def send(self, server, cohort, clients):
        cohort.where(clients).submit(self.work, model=server.model)

    @client
    def work(self, client, model):
        WORKED.append(client.id)
        client.descend(model, lr=0.1, batch=5)
        return {"x": torch.ones(3)}


def scripted(act, sizes=(5, 5, 5), **settings):
    SEEN.clear()
    ACT[:] = [act]
    WORKED.clear()
    made = Lab(Script()).experiment(Toy(sizes), rounds=1, **{"step_seconds": 1.0} | settings)
    return made, SEEN[0]


def test_jobs_that_end_at_one_moment_come_in_the_order_in_which_they_were_submitted():
    def act(self, server, cohort):
        for clients in ([1], [2, 0]):
            self.send(server, cohort, clients)
        return [reply.client for reply in cohort.wait()]

    assert scripted(act)[1] == [1, 0, 2]


def test_a_job_that_ends_at_the_deadline_itself_is_in_time():
    def act(self, server, cohort):
        self.send(server, cohort, [0, 1, 2])
        replies = cohort.wait(deadline=2.0)
        return [reply.client for reply in replies], cohort.now

    assert scripted(act, (5, 10, 15))[1] == ([0, 1], 2.0)


def test_a_wait_ends_with_its_last_job_when_that_is_before_the_deadline():
    def act(self, server, cohort):
        self.send(server, cohort, [0, 1, 2])
        return len(cohort.wait(2, deadline=50.0)), cohort.now

    assert scripted(act, (5, 10, 15))[1] == (2, 2.0)


def test_a_job_begins_when_it_is_submitted():
    def act(self, server, cohort):
        self.send(server, cohort, [0])
        cohort.wait()
        self.send(server, cohort, [1])
        self.send(server, cohort, [0])
        return [(reply.client, reply.seconds) for reply in cohort.wait()], cohort.now

    assert scripted(act, (5, 10))[1] == ([(0, 1.0), (1, 2.0)], 3.0)


def test_work_goes_on_while_others_are_called():
    def act(self, server, cohort):
        self.send(server, cohort, [1])
        cohort.where([0]).call(self.work, model=server.model)
        between = cohort.now
        return between, [reply.seconds for reply in cohort.wait()], cohort.now

    assert scripted(act, (5, 10))[1] == (1.0, [2.0], 2.0)


def test_who_does_not_react_is_missed_as_soon_as_a_message_could_have_gone_to_and_fro():
    def act(self, server, cohort):
        self.send(server, cohort, [0, 1])
        replies = cohort.wait(2)
        return [*replies], replies.missing, cohort.now

    made, seen = scripted(act, dropout=1.0, latency=0.5)
    assert seen == ([], (0, 1), 1.0) and len(made.boundary.pending) == 0


def test_nobody_can_wait_for_more_than_work():
    def act(self, server, cohort):
        self.send(server, cohort, [0, 1])
        return len(cohort.wait(3))

    with pytest.raises(UsageError, match=r"wait\(3\) with only 2 clients at work; submit first"):
        scripted(act)
    assert scripted(act, availability="bernoulli:1.0")[1] == 2, "who is not there cannot have been asked"


def test_where_nobody_can_be_reached_a_wait_is_no_mistake_of_the_method():
    def act(self, server, cohort):
        with pytest.raises(NobodyReplied, match="none of the clients that can be reached is at work in round 1"):
            cohort.wait(1)
        return "told"

    assert scripted(act, availability="bernoulli:1.0")[1] == "told"


@pytest.mark.parametrize("lost", [0.0, 1.0])
def test_bytes_and_steps_of_work_count_whether_its_reply_arrives_or_not(lost):
    def act(self, server, cohort):
        self.send(server, cohort, [0, 1])
        replies = cohort.wait()
        return len(replies), replies.missing

    made, seen = scripted(act, (5, 10), lost=lost)
    assert seen == ((2, ()) if not lost else (0, (0, 1)))
    (row,) = made.record.metrics
    up = [line for line in made.record.ledger if line["direction"] == "up" and line["function"] == "work"]
    assert {client for line in up for client in line["clients"]} == {0, 1} and row["gradient_steps"] == 3
    assert row["replies"] == len(made.engine.states) + (0 if lost else 2)


def test_in_real_time_a_lost_reply_is_missing_too():
    def act(self, server, cohort):
        self.send(server, cohort, [0, 1])
        replies = cohort.wait()
        return len(replies), sorted(replies.missing)

    made, seen = scripted(act, clock="real", lost=1.0, step_seconds=0.0)
    assert seen == (0, [0, 1]) and len(made.boundary.pending) == 0


def test_in_real_time_work_is_begun_once_however_often_is_waited():
    def act(self, server, cohort):
        self.send(server, cohort, [0, 1])
        first = [reply.client for reply in cohort.wait(1)]
        self.send(server, cohort, [2])
        return sorted(first + [reply.client for reply in cohort.wait(2)])

    assert scripted(act, clock="real", step_seconds=0.0)[1] == [0, 1, 2] and sorted(WORKED) == [0, 1, 2]


def test_a_reply_that_is_turned_away_is_missing():
    def act(self, server, cohort):
        self.send(server, cohort, [0, 1])
        replies = cohort.wait()
        return len(replies), replies.missing

    made, seen = scripted(act, faults="nan:1.0")
    assert seen == (0, (0, 1)) and made.record.metrics[0]["replies"] == 0


def test_a_reply_that_comes_twice_counts_once():
    def act(self, server, cohort):
        self.send(server, cohort, [0, 1])
        return [reply.client for reply in cohort.wait()]

    once, twice = (scripted(act, faults=f"duplicate:{share}") for share in (0, 1))
    assert once[1] == twice[1] == [0, 1]
    one, two = (made.record.metrics[0] for made, _ in (once, twice))
    assert [row["replies"] for row in (one, two)] == [2, 2] and two["up_bytes"] == 2 * one["up_bytes"]
    assert one["gradient_steps"] == two["gradient_steps"]


def test_who_worked_remembers_it_although_its_reply_comes_twice():
    made, seen = ran(faults="duplicate:1.0")
    counted = Counter(client for ages, _, _ in seen for client, _, _ in ages)
    assert {k: state["worked"] for k, state in made.engine.states.items()} == counted and counted


def test_steps_of_work_that_broke_off_were_taken():
    made, _ = ran(rounds=20, eval_every=20, **WORLD, availability="markov:0.5,period=2,cycle=4")
    events = [(event["fate"], event["client"]) for event in made.record.lines("events.jsonl")]
    assert {"arrived", "broken"} <= {fate for fate, _ in events}
    taken = sum(math.ceil(SIZES[client] / 10) for fate, client in events if fate != "silent")
    assert sum(row["gradient_steps"] for row in made.record.metrics) == taken


def test_work_that_was_done_needs_its_message_no_more():
    def act(self, server, cohort):
        self.send(server, cohort, [0, 1, 2])
        return len(cohort.wait(1))

    made, _ = scripted(act)
    frames = [encoding.encode(frame) for frame in made.boundary.pending.frames()]
    model = len(encoding.encode({"model": made.server.model}))
    assert len(frames) == 2 and all(b"outcomes" in frame and len(frame) < model for frame in frames)


def test_alike_clients_that_all_are_waited_for_are_never_stale():
    _, seen = ran(Async(k=6), sizes=(20,) * 6, step_seconds=1.0)
    assert all([(c, s) for c, s, _ in got] == [(c, 0) for c in range(6)] for got, _, _ in seen)


def test_a_client_keeps_its_state_when_its_work_ends():
    """Evaluation meanwhile sees the state from before."""
    kept = []

    @dataclass(frozen=True)
    class Peek(Async):
        def observe(self, server, clients):
            kept.append({c: s["worked"] for c, s in peeked[0].engine.states.items()})

    peeked = []
    method = Peek()
    fields = {"method": method.to_spec(), "partition": "given", "rounds": 4, "eval_every": 1}
    peeked.append(Experiment(Spec.of(fields | WORLD), Toy(SIZES), method).begin(None))
    SEEN.clear()
    peeked[0].go()
    ended = Counter()
    for (got, _, _), state in zip(SEEN, kept, strict=True):
        ended.update(client for client, _, _ in got)
        assert state == ended


def test_a_deadline_leaves_work_under_way():
    made, seen = ran(Async(k=6, seconds=2.0), **WORLD)
    for got, missing, took in seen:
        assert missing == () and len(got) < 6
        assert took == pytest.approx(2.0)
        assert all(seconds <= 2.0 * (1 + staleness) + 1e-9 for _, staleness, seconds in got)
    assert made.boundary.clock.now == pytest.approx(12.0)
    arrived = [client for got, _, _ in seen for client, _, _ in got]
    assert Counter(arrived) == {c: state["worked"] for c, state in made.engine.states.items()}


def test_a_deadline_that_nobody_meets_is_no_hang():
    made, seen = ran(Async(k=3, seconds=1e-6), **WORLD)
    assert all(got == [] and missing == () for got, missing, _ in seen)
    assert made.boundary.clock.now == pytest.approx(6e-6) and len(made.boundary.pending) == 6


@dataclass(frozen=True)
class Meddling(Async):
    """Calls clients that still work."""

    def round(self, server, cohort):
        cohort.submit(self.local, model=server.model, mark=1)
        cohort.where([1, 4]).call(self.local, model=server.model, mark=1)


def test_who_works_is_not_called():
    with pytest.raises(UsageError, match=r"call to clients \[1, 4\] that still work; use cohort.idle"):
        ran(Meddling(), rounds=1)


@pytest.mark.parametrize("settings", [{"dropout": 0.4}, {"lost": 0.4}, {"availability": "markov:0.5,period=2,cycle=4"}])
def test_every_job_ends_exactly_once(settings):
    made, seen = ran(rounds=40, eval_every=40, **WORLD, **settings)
    ended = Counter()
    for got, missing, _ in seen:
        assert len(got) + len(missing) == len({*missing, *(c for c, _, _ in got)})
        ended.update([*missing, *(c for c, _, _ in got)])
    sent = Counter(
        c
        for line in made.record.ledger
        if line["function"] == "local" and line["direction"] == "down" and line["field"] == "envelope"
        for c in line["clients"]
    )
    assert sent - ended == Counter(made.boundary.pending.busy)
    assert sum(len(missing) for _, missing, _ in seen) > 5 and not ended - sent


ENGINES = ["serial", "loopback", "pool", "vectorized"]
CIRCUMSTANCES = [
    {"dropout": 0.1, "lost": 0.1},
    {"availability": "markov:0.6,period=3,cycle=6,correlation=0.3"},
    {"availability": "bernoulli:0.7", "cohort": 4},
]


@pytest.mark.parametrize("settings", CIRCUMSTANCES)
@pytest.mark.parametrize("engine", ["loopback", "pool"])
def test_engines_agree_about_overlapping_work(engine, settings):
    one = trace(ran(**WORLD, **settings)[0])
    alike(one, trace(ran(engine=engine, **WORLD, **settings)[0]), engine)


@pytest.mark.parametrize("settings", CIRCUMSTANCES)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_stopped_in_the_middle_of_work_goes_on_with_the_same_bits(tmp_path, monkeypatch, engine, settings):
    monkeypatch.setattr(checkpoint, "SHARE", math.inf)

    def stop(row):
        raise KeyboardInterrupt

    method = Async()
    whole = {"rounds": 5, "engine": engine, "workers": 2 if engine == "pool" else 0, "partition": "given"}
    spec = Spec.of({"method": method.to_spec()} | whole | WORLD | settings)
    through = Experiment(spec, Toy(SIZES), method).begin(tmp_path / "through")
    through.go()
    begun = Experiment(spec, Toy(SIZES), method).begin(tmp_path / "stopped")
    under_way = []
    for _ in range(5):
        with contextlib.suppress(KeyboardInterrupt):
            begun.go(stop)
        under_way.append(len(begun.boundary.pending))
        record = Run(tmp_path / "stopped")
        begun = Experiment(record.spec, Toy(SIZES), method).take_up(record)
    begun.go()
    assert sum(under_way) > 3
    alike(trace(through), trace(begun), f"a resumed run on {engine}")
    events = [list(record.lines("events.jsonl")) for record in (through.record, begun.record)]
    assert events[0] == events[1] and events[0]


@dataclass(frozen=True)
class Early(Async):
    """Submits at the end of a round, so that work waits in the checkpoint with the model it began from."""

    def round(self, server, cohort):
        if len(cohort.idle) < len(cohort):
            for reply in cohort.wait(self.k):
                server.model = server.model + reply.delta / (1 + reply.staleness)
        cohort.idle.submit(self.local, model=server.model, mark=Each({key: [0, 0] for key in cohort.idle}))


@pytest.mark.parametrize("engine", ENGINES)
def test_work_that_has_not_begun_comes_through_too(tmp_path, monkeypatch, engine):
    def stop(row):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "SHARE", math.inf)
    workers = 2 if engine == "pool" else 0
    settings = {"rounds": 5, "engine": engine, "workers": workers, "partition": "given", "lost": 0.1, "dropout": 0.1}
    spec = Spec.of({"method": Early().to_spec()} | settings | WORLD)
    through = Experiment(spec, Toy(SIZES), Early()).begin(tmp_path / "through")
    through.go()
    begun = Experiment(spec, Toy(SIZES), Early()).begin(tmp_path / "stopped")
    for _ in range(5):
        with contextlib.suppress(KeyboardInterrupt):
            begun.go(stop)
        assert begun.boundary.pending.waiting, "nobody has waited for it"
        begun = Experiment(Run(tmp_path / "stopped").spec, Toy(SIZES), Early()).take_up(Run(tmp_path / "stopped"))
    begun.go()
    alike(trace(through), trace(begun), f"a resumed run on {engine}")


def test_whose_reply_will_get_lost_is_in_the_checkpoint(tmp_path, monkeypatch):
    def stop(row):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "SHARE", math.inf)
    spec = Spec.of({"method": Early().to_spec(), "rounds": 4, "partition": "given", "lost": 0.5} | WORLD)
    through = Experiment(spec, Toy(SIZES), Early()).begin(tmp_path / "through")
    through.go()
    begun, doomed = Experiment(spec, Toy(SIZES), Early()).begin(tmp_path / "stopped"), set()
    for _ in range(4):
        with contextlib.suppress(KeyboardInterrupt):
            begun.go(stop)
        doomed |= {client for submission in begun.boundary.pending.waiting for client in submission.lost}
        begun = Experiment(Run(tmp_path / "stopped").spec, Toy(SIZES), Early()).take_up(Run(tmp_path / "stopped"))
    begun.go()
    assert doomed
    alike(trace(through), trace(begun), "a resumed run")
    assert max(state["worked"] for state in begun.engine.states.values()) > 1, "somebody has come twice"


@dataclass(frozen=True)
class Large(Method):
    """Leaves everybody under way on one large message."""

    def round(self, server, cohort):
        server.log(busy=len(cohort) - len(cohort.idle))
        cohort.submit(self.local, blob=torch.zeros(250_000))

    @client
    def local(self, client, blob):
        return {"n": client.n}


def test_a_message_is_kept_once_for_all_who_work_on_it(tmp_path):
    spec = Spec.of({"method": Large().to_spec(), "partition": "given", "rounds": 1})
    made = Experiment(spec, Toy((5,) * 50), Large()).begin(tmp_path / "run")
    tracemalloc.start()
    made.go()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(made.boundary.pending) == 50
    assert (tmp_path / "run" / "checkpoint" / "state.bin").stat().st_size < 2 * 1_000_000
    assert held < 20_000_000, "fifty copies would be as many megabytes"


class Instant(Serial):
    """No training at all."""

    def run(self, call, clients):
        for one in clients:
            if call.kind == "evaluate":
                reply = {"test": {"n": 0}, "validation": {"n": 0}}
            else:
                reply = {"delta": 0.0 * call.shared["model"], "steps": 1, "mark": call.own[one]["mark"]}
            yield Outcome(one, reply, {"envelope": 1}, {}, 10)


def test_memory_does_not_grow_with_the_rounds():
    held = []

    def look(row):
        if row["round"] in (100, 200, 300):
            held.append(tracemalloc.get_traced_memory()[0])

    method = Async(k=10)
    spec = Spec.of(
        {"method": method.to_spec(), "partition": "given", "rounds": 300, "eval_every": 300, "speed": "lognormal:1"}
    )
    made = Experiment(spec, Toy((5,) * 40), method).begin(None)
    made.engine = made.boundary.arrivals.engine = Instant()
    tracemalloc.start()
    made.go(look)
    tracemalloc.stop()
    SEEN.clear()
    assert held[2] - held[1] < 200_000


@pytest.mark.parametrize("engine", ["serial", "pool", "vectorized"])
def test_in_real_time_every_update_is_accounted_for(tmp_path, monkeypatch, engine):
    monkeypatch.setattr(checkpoint, "SHARE", math.inf)
    method = Async(k=2)
    settings = {"rounds": 12, "engine": engine, "workers": 2 if engine == "pool" else 0, "clock": "real", "lost": 0.2}
    spec = Spec.of({"method": method.to_spec(), "partition": "given", **settings})
    SEEN.clear()

    def stop(row):
        if row["round"] in (3, 7):
            raise KeyboardInterrupt

    begun = Experiment(spec, Toy(SIZES), method).begin(tmp_path / "run")
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            begun.go(stop)
        record = Run(tmp_path / "run")
        begun = Experiment(record.spec, Toy(SIZES), method).take_up(record)
    begun.go()
    ended = Counter(c for got, missing, _ in SEEN for c in [*missing, *(client for client, _, _ in got)])
    sent = Counter(
        c
        for line in begun.record.ledger
        if line["function"] == "local" and line["direction"] == "down" and line["field"] == "envelope"
        for c in line["clients"]
    )
    assert sum(ended.values()) == 24
    assert sent - ended == Counter(begun.boundary.pending.busy) and not ended - sent
    assert all(row["virtual_seconds"] > 0 for row in begun.record.metrics)


def test_a_wait_in_real_time_ends_at_its_deadline():
    made, seen = ran(Async(k=6, seconds=0.0), engine="pool", clock="real", rounds=2)
    assert len(seen) == 2 and all(took < 30 for *_, took in seen)
    assert sum(len(got) for got, _, _ in seen) + len(made.boundary.pending) >= 6


def test_waiting_for_all_at_once_is_federated_averaging():
    @dataclass(frozen=True)
    class Buffered(FedAvg):
        def round(self, server, cohort):
            cohort.submit(self.local, model=server.model)
            up = cohort.wait().mean(weight="n")
            server.model = server.model + up.delta

    one = Lab(FedAvg()).experiment(rounds=4, speed="lognormal:1")
    other = Lab(Buffered()).experiment(rounds=4, speed="lognormal:1")
    assert torch.equal(one.server.model.flat, other.server.model.flat)
    assert [row["virtual_seconds"] for row in one.record.metrics] == [
        row["virtual_seconds"] for row in other.record.metrics
    ]


def test_the_report_draws_who_worked_when(tmp_path):
    spec = Spec.of({"method": Async().to_spec(), "partition": "given", "rounds": 6, "dropout": 0.3} | WORLD)
    made = Experiment(spec, Toy(SIZES), Async()).begin(tmp_path / "run")
    SEEN.clear()
    record = made.go()
    write(record)
    shown = window(record)
    ended = {c for got, missing, _ in SEEN for c in [*missing, *(client for client, _, _ in got)]}
    assert shown.clients == sorted(ended) and len(shown.ends) == 6
    assert shown.ends[-1] == pytest.approx(made.boundary.clock.now)
    for event in shown.events:
        assert event["began"] >= 0 and event["fate"] in ("arrived", "silent") and event["round"] <= 6
        if event["fate"] == "arrived":
            seconds = [entry[2] for got, _, _ in SEEN for entry in got if entry[0] == event["client"]]
            assert any(event["down"] + event["work"] + event["up"] == pytest.approx(s) for s in seconds)
    assert f"{len(ended)} clients over" in described(shown) and "silent" in described(shown)
    html = (record.path / "report.html").read_text()
    assert "Who worked when" in html and "virtual seconds" in html and described(shown) in html
    assert "Accuracy for time" in [panel.title for panel in panels(record)]
    still = Lab(FedAvg()).experiment(rounds=2)
    assert window(still.record) is None and "Accuracy for time" not in [p.title for p in panels(still.record)]


def test_only_the_first_rounds_are_recorded_and_not_all_of_them():
    made = Lab(Async(k=1)).experiment(Toy((2,) * 3), rounds=30, eval_every=30, speed="uniform:1,2")
    events = list(made.record.lines("events.jsonl"))
    assert {event["round"] for event in events} == set(range(1, 21))
    SEEN.clear()
    one, other = Timeline(), Timeline()
    notes = [(1, "local", c, 0.1 * (c % 7), Trip(0.0, 1.0, 0.0), "arrived") for c in range(9000)]
    for note in notes:
        one.note(*note)
    for note in reversed(notes):
        other.note(*note)
    lines = one.close(1)
    assert lines == other.close(1) and 0 < len(lines) < 1000 and one.close(1) == []


def test_a_deadline_of_rounds_is_refused_by_submitted_work():
    with pytest.raises(UsageError, match=r"deadline=5.0 is for rounds that wait .* fedbuff submits work without"):
        Lab(FedBuff).experiment(Toy(), rounds=1, deadline=5.0)
