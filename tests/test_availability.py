"""Who can be reached when: the right shares and spans, and that a run always knows what to do when nobody is."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, alike, trace
from fedloom.world import Trip, World, availability
from fedloom.world.availability.trace import Trace

SIGMAS = 5


def masks(text, population, slots, seed=0):
    there = availability.build(text, population, seed)
    return np.stack([there.mask(slot, 0.0) for slot in range(1, slots + 1)])


def near(share, wanted, draws):
    return abs(share - wanted) <= SIGMAS * math.sqrt(wanted * (1 - wanted) / draws) + 1e-9


def test_bernoulli_is_a_coin_for_each_client_and_round():
    on = masks("bernoulli:0.8", 400, 200)
    assert near(on.mean(), 0.8, on.size)
    assert near((on[1:] & on[:-1]).mean(), 0.64, on.size), "a round says nothing about the next"
    assert near((on[:, 1:] & on[:, :-1]).mean(), 0.64, on.size), "nor a client about another"
    assert masks("bernoulli:1", 50, 3).all() and not masks("bernoulli:0", 50, 3).any()


def test_two_numbers_are_a_share_of_its_own_for_every_client():
    each = masks("bernoulli:0.1,0.9", 300, 600).mean(0)
    assert 0.05 < each.min() < 0.2 and 0.8 < each.max() < 0.95 and abs(each.mean() - 0.5) < 0.08


def test_a_markov_chain_has_its_share_and_its_spans():
    on = masks("markov:0.3,cycle=20", 300, 4000)
    assert abs(on.mean() - 0.3) < 0.01 and abs(on[0].mean() - 0.3) < 0.15, "it begins in its own law"
    begins, stays = on[1:] & ~on[:-1], on[1:] & on[:-1]
    assert abs(begins.sum() / (~on[:-1]).sum() - 1 / 14) < 0.003  # a cycle of 20 slots: 14 off,
    assert abs(stays.sum() / on[:-1].sum() - (1 - 1 / 6)) < 0.005  # and 6 on
    memory = stays[1:].sum() / on[1:-1].sum(), (on[2:] & on[1:-1] & on[:-2]).sum() / (on[1:-1] & on[:-2]).sum()
    assert abs(memory[0] - memory[1]) < 0.01, "only the last slot counts"


@pytest.mark.parametrize("name", ["bernoulli:0.5", "markov:0.5,cycle=6"])
def test_correlated_clients_come_and_go_together_and_alone_are_the_same(name):
    on = {c: masks(f"{name},correlation={c}", 60, 3000) for c in (0, 0.5, 0.95)}
    together = {c: float(np.corrcoef(m.T)[np.triu_indices(60, 1)].mean()) for c, m in on.items()}
    assert abs(together[0]) < 0.02 and together[0] + 0.1 < together[0.5] < together[0.95] - 0.1
    assert np.allclose([m.mean() for m in on.values()], 0.5, atol=0.06)
    if name.startswith("bernoulli"):
        assert abs(together[0.5] - 2 / math.pi * math.asin(0.5)) < 0.03  # of two thresholded normals


def test_a_cycle_of_just_a_slot_off_or_on_is_taken():
    off = ~masks("markov:0.9", 100, 500)  # ten slots a cycle, one of them off
    assert near(off.mean(), 0.1, off.size // 10) and not (off[1:] & off[:-1]).any()
    on = masks("markov:0.1", 100, 500)
    assert near(on.mean(), 0.1, on.size // 10) and not (on[1:] & on[:-1]).any()


@pytest.mark.parametrize("name", ["bernoulli:0.2", "markov:0.2,cycle=8"])
def test_correlated_clients_are_there_as_often_as_others(name):
    on = {c: masks(f"{name},correlation={c}", 60, 3000).mean() for c in (0, 0.5)}
    assert on[0] == pytest.approx(0.2, abs=0.01) and on[0.5] == pytest.approx(0.2, abs=0.03)


def test_the_future_does_not_depend_on_when_it_is_looked_at():
    one, other = (availability.build("markov:0.4,period=10", 30, 1) for _ in range(2))
    looked = [one.mask(0, 10.0 * slot) for slot in range(50)]
    assert np.array_equal(other.mask(0, 495.0), looked[49])
    third = availability.build("markov:0.4,period=10", 30, 1)
    gone = [third.leaves(c, 5.0, 480.0) for c in range(30) if looked[0][c]]
    expected = [
        next((10.0 * slot for slot in range(1, 48) if not looked[slot][c]), None) for c in range(30) if looked[0][c]
    ]
    assert gone == expected and any(gone)
    left = {c: moment for c, moment in zip(np.flatnonzero(looked[0]), gone, strict=True) if moment}
    assert all(third.leaves(c, 5.0, moment) is None for c, moment in left.items()), "work that has ended is not lost"
    assert all(third.leaves(c, 5.0, moment + 0.1) == moment for c, moment in left.items())


def test_a_chain_goes_on_from_what_a_checkpoint_keeps():
    one = availability.build("markov:0.4", 40, 2)
    for round in range(1, 30):
        one.mask(round, 0.0)
    other = availability.build("markov:0.4", 40, 2)
    other.restore(one.state())
    other._drawn = lambda slot, draw=other._drawn: draw(slot) if slot > 29 else pytest.fail("it begins anew")
    assert np.array_equal(other.mask(35, 0.0), one.mask(35, 0.0))


def test_a_checkpoint_keeps_the_present_of_a_chain_that_has_looked_ahead():
    one = availability.build("markov:0.4,period=10", 40, 2)
    now, later = one.mask(0, 45.0), [one.leaves(c, 45.0, 300.0) for c in range(40)]
    other = availability.build("markov:0.4,period=10", 40, 2)
    other.restore(one.state())
    other._drawn = lambda slot, draw=other._drawn: draw(slot) if slot > 4 else pytest.fail("it begins anew")
    assert np.array_equal(other.mask(0, 45.0), now) and later == [other.leaves(c, 45.0, 300.0) for c in range(40)]


@pytest.mark.parametrize("period", [0.1, 0.7, 3.3, 1 / 3])
@pytest.mark.parametrize("name", ["bernoulli:0.5", "markov:0.5,cycle=4"])
def test_a_slot_begins_with_its_first_moment_whatever_rounding_makes_of_it(name, period):
    there = availability.build(f"{name},period={period!r}", 50, 0)
    for slot in range(1, 200):
        first = there.mask(0, slot * period)
        assert np.array_equal(first, there.mask(0, (slot + 0.5) * period))


def test_a_cycle_has_its_share_and_says_when_a_client_goes():
    there = availability.build("cyclic:0.25,period=100", 200, 0)
    on = np.stack([there.mask(0, float(t)) for t in range(100)])
    assert (np.abs(on.sum(0) - 25) <= 1).all() and len({tuple(column) for column in on.T}) > 50
    for c in np.flatnonzero(on[10])[:20]:
        left = there.leaves(int(c), 10.0, 1000.0)
        assert there.mask(0, left - 1e-6)[c] and not there.mask(0, left + 1e-6)[c] and left < 36
        assert there.leaves(int(c), 10.0, left) is None
    together = availability.build("cyclic:0.25,period=100,spread=0", 5, 0)
    assert (
        together.mask(0, 24.9).all() and not together.mask(0, 25.1).any() and together.next(30.0) == pytest.approx(100)
    )
    assert together.mask(0, together.next(30.0)).all()


@pytest.mark.parametrize(
    "text", ["cyclic:0.3,period=0.7", "cyclic:0.02,period=100", "cyclic:0.01,period=3.3,spread=0.1"]
)
def test_the_server_waits_for_the_first_client_of_a_cycle_and_then_it_is_there(text):
    there, period = availability.build(text, 3, 5), float(text.partition("period=")[2].partition(",")[0])
    now = 0.0
    for _ in range(200):
        moment = there.next(now)
        assert now <= moment <= now + period * (1 + 1e-9) and there.mask(0, moment).any()
        between = np.linspace(now, moment - 1e-6 * period, 50) if moment > now + 1e-3 * period else []
        begins = [t for t, u in zip(between[1:], between, strict=False) if (there.mask(0, t) & ~there.mask(0, u)).any()]
        assert not begins, "nobody came before"
        now = moment + 0.37 * period


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("client,start,stop\n1,5,8\n0,0,2\n0,2,3\n2,1,9\n2,4,6\n0,7,8.5\n")
    return path


def test_a_trace_says_who_is_there(file):
    spans = {0: [(0, 3), (7, 8.5)], 1: [(5, 8)], 2: [(1, 9)], 3: []}
    there = Trace.read(str(file), 4)
    for t in np.arange(0, 10, 0.25):
        mask = there.mask(1, float(t))
        assert mask.tolist() == [any(a <= t < b for a, b in spans[c]) for c in range(4)]
        for c in np.flatnonzero(mask):
            end = next(b for a, b in spans[c] if a <= t < b)
            assert there.leaves(int(c), float(t), 100.0) == end and there.leaves(int(c), float(t), end) is None
    assert there.next(0.5) == 1 and there.next(8.6) is None
    again = Trace.read(str(file), 4, repeat=True)
    assert again.mask(1, 9.0 * 7 + 5.5).tolist() == there.mask(1, 5.5).tolist() and again.next(9.0 * 7 + 8.9) == 72


def test_a_span_that_reaches_into_the_next_lap_is_one(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("client,start,stop\n0,0,4\n0,6,10\n")
    there = Trace.read(str(path), 1, repeat=True)
    assert there.leaves(0, 7.0, 100.0) == 14.0 and there.leaves(0, 7.0, 13.0) is None
    path.write_text("client,start,stop\n0,2,4\n0,6,10\n")
    assert Trace.read(str(path), 1, repeat=True).leaves(0, 7.0, 100.0) == 10.0, "the next lap begins without it"


@pytest.mark.parametrize("lines", ["0,0.1,0.7\n", "0,0.1,0.3\n1,0.2,1.1\n0,2.7,3.3\n", "0,0,0.4\n1,0.5,0.7\n"])
def test_a_trace_that_repeats_never_stands_still_whatever_its_length(tmp_path, lines):
    path = tmp_path / "trace.csv"
    path.write_text("client,start,stop\n" + lines)
    there, now = Trace.read(str(path), 2, repeat=True), 0.0
    ends = [float(line.split(",")[2]) for line in lines.split()]
    begins = [float(line.split(",")[1]) for line in lines.split()]
    for number in range(1, 3000):
        now, before = there.next(now), now
        assert now > before and there.mask(1, now).any(), "somebody is there when the server has waited"
        gone = there.leaves(int(there.mask(1, now).argmax()), now, now + 1e-3)
        assert gone is None, "and stays"
        lap, place = divmod(number - (0 not in begins), len(begins))
        assert now == pytest.approx(lap * max(ends) + sorted(begins)[place], rel=1e-9)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("client,begin\n0,1\n", "it needs client, start, stop"),
        ("client,start,stop\n0,1,x\n", "row 1: could not convert"),
        ("client,start,stop\n0,1,2\n9,1,2\n", r"row 2: \(9, 1.0, 2.0\) is no span of one of 4 clients"),
        ("client,start,stop\n4,1,2\n", r"row 1: \(4, 1.0, 2.0\) is no span of one of 4 clients"),
        ("client,start,stop\n0,3,2\n", "row 1"),
        ("client,start,stop\n0,2,2\n", "row 1"),
        ("client,start,stop\n0,nan,2\n", "row 1"),
        ("client,start,stop\n", "no span: nobody would ever be there"),
    ],
)
def test_a_bad_trace_is_refused(tmp_path, text, complaint):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=complaint):
        _ = World(4, availability=f"trace:{path}").reachable


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sometimes", "unknown availability 'sometimes'"),
        ("bernoulli", "bernoulli is written as bernoulli:SHARE"),
        ("bernoulli:1.5", "a share is between 0 and 1"),
        ("bernoulli:0.9,0.1", "the lower one first"),
        ("markov:0.3,cycle=2", "take a cycle of 4 or more"),
        ("markov:0.8,cycle=4", "take a cycle of 5 or more"),  # less than a slot off
        ("markov:0.3,correlation=2", "correlation=2; it is between 0 and 1"),
        ("markov:0.3,period=0", "period=0; it is in seconds"),
        ("markov:0.3,speed=3", "markov is written as"),
        ("cyclic:0", "the first greater than 0"),
        ("always:1", "always is written as always"),
        ("trace:/no/such/file.csv", "cannot read the trace"),
    ],
)
def test_impossible_availability_is_refused(text, complaint):
    with pytest.raises(UsageError, match=complaint):
        World(5, availability=text)


def test_a_trace_is_named_as_it_holds_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert availability.located("trace:a/b.csv,repeat=true") == f"trace:{tmp_path / 'a' / 'b.csv'},repeat=true"
    assert availability.located("trace:b.csv") == f"trace:{tmp_path / 'b.csv'}"
    assert availability.located("markov:0.3,cycle=9") == "markov:0.3,cycle=9"


def test_the_slots_of_a_period_are_the_clocks_not_the_rounds():
    there = availability.build("bernoulli:0.5,period=10", 50, 0)
    assert np.array_equal(there.mask(1, 25.0), there.mask(7, 25.0))
    assert not np.array_equal(there.mask(7, 25.0), there.mask(7, 35.0))


def test_who_is_chosen_is_there():
    world = World(200, 20, availability="bernoulli:0.3")
    counts = Counter()
    for round in range(1, 300):
        mask, chosen = world.mask(round, 0.0), world.choose(round)
        assert mask[list(chosen)].all() and len(chosen) == 20 and list(chosen) == sorted(set(chosen))
        counts.update(chosen)
    assert max(counts.values()) < 3 * min(counts[k] for k in range(200)) + 30
    few = World(10, 8, availability="bernoulli:0.2")
    assert all(len(few.choose(r)) == min(8, few.mask(r, 0.0).sum()) for r in range(1, 50))
    assert list(World(6, availability="bernoulli:0.5").choose(3)) == list(
        np.flatnonzero(availability.build("bernoulli:0.5", 6, 0).mask(3, 0.0))
    )


@dataclass(frozen=True)
class Note(Method):
    """Counts in its clients how often they worked."""

    global_model = False

    def setup(self, server, clients):
        server.asked, server.missing = [], None

    def round(self, server, cohort):
        server.asked = [*server.asked, list(cohort)]
        cohort.mean(self.work)

    @client
    def work(self, client):
        client.state["worked"] = client.state.get("worked", 0) + 1
        for _ in range(10):
            client.grad(client.initial, client.data.all())
        return {"n": client.n}


def trace_of(tmp_path, text):
    path = tmp_path / "trace.csv"
    path.write_text("client,start,stop\n" + text)
    return f"trace:{path}"


def test_who_goes_off_in_the_middle_loses_its_work(tmp_path):
    spans = trace_of(tmp_path, "0,0,100\n1,0,0.5\n2,0,1.0\n3,0.9,100\n")
    made = Lab(Note()).experiment(Toy((3,) * 4), rounds=1, step_seconds=0.1, availability=spans)
    row = made.record.metrics[0]
    assert made.server.asked == [[0, 1, 2]]
    assert {c: s["worked"] for c, s in made.engine.states.items()} == {0: 1, 2: 1}, "1 went at half time"
    assert (row["broken"], row["replies"], row["absent"], row["virtual_seconds"]) == (1, 2, 0, 1.0)
    ups = [li["clients"] for li in made.record.ledger if li["direction"] == "up" and li["kind"] == "train"]
    assert ups == [[0, 2]] * 2, "a broken job sends nothing"


@pytest.mark.parametrize(
    ("end", "left"),
    [(1, (1, 0, 0)), (3, (3, 0, 0)), (4, (3, 1, 0)), (8, (3, 5, 0)), (9.5, (3, 5, 1.5)), (10, None), (50, None)],
)
def test_what_is_left_of_a_trip_ends_when_its_client_goes(tmp_path, end, left):
    world = World(1, availability=trace_of(tmp_path, f"0,0,{7.0 + end}\n"))
    found = world.broken(0, 7.0, Trip(3.0, 5.0, 2.0))
    assert found == (None if left is None else Trip(*left)) and (found is None or found.seconds == end)


def test_who_goes_between_two_calls_is_absent(tmp_path):
    @dataclass(frozen=True)
    class Twice(Note):
        def round(self, server, cohort):
            cohort.mean(self.work)
            replies = cohort.call(self.work)
            server.missing = list(replies.missing)

    spans = trace_of(tmp_path, "0,0,100\n1,0,1.0\n")
    made = Lab(Twice()).experiment(Toy((3,) * 2), rounds=1, step_seconds=0.1, availability=spans)
    assert made.server.missing == [1] and made.record.metrics[0]["absent"] == 1


def test_when_nobody_is_there_the_clock_goes_on_and_when_a_trace_ends_the_run_does(tmp_path):
    spans = trace_of(tmp_path, "0,5,6.5\n1,20,21.5\n")
    made = Lab(FedAvg(batch=3)).experiment(Toy((3,) * 2), rounds=100, step_seconds=1.0, availability=spans)
    rows = made.record.metrics
    assert [row["virtual_seconds"] for row in rows] == [5.0, 1.0, 0.5, 13.5, 1.0, 0.5, 0.0]
    assert [row["replies"] for row in rows] == [0, 1, 0, 0, 1, 0, 0]
    assert rows[0]["note"] == "nobody could be reached in round 1; the server waited 5 s"
    assert "1 broken" in rows[2]["note"]
    assert "nobody can ever be reached" in rows[-1]["note"]
    assert made.manifest["stopped_because"].startswith("availability=trace:") and made.manifest["status"] == "finished"


def test_overlapping_work_goes_on_where_few_are_there(tmp_path):
    @dataclass(frozen=True)
    class Buffered(Note):
        def round(self, server, cohort):
            cohort.idle.submit(self.work)
            server.log(got=len(cohort.wait(3)))

    spans = trace_of(tmp_path, "0,0,1.5\n1,0,0.5\n0,30,31.2\n")
    made = Lab(Buffered()).experiment(Toy((3,) * 2), rounds=50, step_seconds=0.1, availability=spans)
    got = [row.get("server/got") for row in made.record.metrics]
    assert got == [1.0, 0.0, None, 1.0, 0.0, None] and made.manifest["stopped_because"]
    assert made.boundary.clock.now == pytest.approx(31.2)


def test_where_nobody_is_left_what_has_been_sent_is_still_received(tmp_path):
    @dataclass(frozen=True)
    class One(Note):
        def round(self, server, cohort):
            cohort.idle.submit(self.work)
            server.log(got=len(cohort.wait(1)))

    spans = trace_of(tmp_path, "0,0,1.0\n1,0,1.0\n0,30,31\n")
    rows = Lab(One()).experiment(Toy((3,) * 2), rounds=3, step_seconds=0.1, availability=spans).record.metrics
    assert [row.get("server/got") for row in rows] == [1.0, 1.0, None]
    assert [row["virtual_seconds"] for row in rows] == [1.0, 0.0, 29.0] and "nobody could be reached" in rows[2]["note"]


def test_nobody_ever_is_a_run_without_training():
    made = Lab(FedAvg()).experiment(rounds=3, availability="bernoulli:0")
    rows = made.record.metrics
    assert len(rows) == 3 and all("nobody could be reached" in row["note"] for row in rows)
    assert torch.equal(made.server.model.flat, made.site.initial.flat)
    never = Lab(FedAvg()).experiment(rounds=3, availability="bernoulli:0,period=1")
    assert len(never.record.metrics) == 1 and "nobody can ever be reached" in never.manifest["stopped_because"]


@pytest.mark.parametrize("name", ["bernoulli:0.6", "markov:0.5,period=0.03,cycle=4", "cyclic:0.5,period=0.2"])
def test_engines_agree_and_runs_repeat(name):
    settings = {"availability": name, "rounds": 8, "speed": "lognormal:1"}
    one = trace(Lab(FedAvg()).experiment(**settings))
    alike(one, trace(Lab(FedAvg()).experiment(**settings)), "two runs")
    alike(one, trace(Lab(FedAvg()).experiment(**settings, engine=None)), "two runs")
    from fedloom.engines import build

    alike(one, trace(Lab(FedAvg()).experiment(engine=build("pool", 2), **settings)), "a pool")
    assert {row["cohort"] for row in one["metrics"]} != {4}


def test_a_deadline_takes_those_in_time_and_tells_the_late():
    made = Lab(Note()).experiment(
        Toy((3,) * 6), rounds=3, step_seconds=0.1, speed="classes:1x0.5,2x0.5", deadline=0.7, lost=0.0
    )
    slow = [k for k in range(6) if made.world.profile(k)["speed"] == 1]
    for row in made.record.metrics:
        assert (row["late"], row["replies"], row["virtual_seconds"]) == (3, 3, 0.7)
    assert all(state["worked"] == 3 for state in made.engine.states.values()), "the work is done, the state is kept"
    assert len(slow) == 3
    easy = Lab(Note()).experiment(Toy((3,) * 6), rounds=1, step_seconds=0.1, speed="classes:1x0.5,2x0.5", deadline=9.0)
    assert [easy.record.metrics[0][name] for name in ("late", "virtual_seconds")] == [0, 1.0], (
        "it waits no longer than it must"
    )
    lost = Lab(Note()).experiment(Toy((3,) * 6), rounds=1, step_seconds=0.1, deadline=9.0, lost=0.5)
    assert lost.record.metrics[0]["virtual_seconds"] == 9.0, "nobody tells it that a reply is lost"


def test_over_selection_takes_the_first():
    made = Lab(Note()).experiment(
        Toy((3,) * 12), rounds=4, cohort=6, overselect=1.5, step_seconds=0.1, speed="uniform:1,3", eval_every=4
    )
    for row, asked in zip(made.record.metrics, made.server.asked, strict=True):
        times = sorted(1.0 / made.world.profile(k)["speed"] for k in asked)
        assert (len(asked), row["replies"], row["surplus"]) == (9, 6, 3)
        assert row["virtual_seconds"] == pytest.approx(times[5])
    same = [World(12, 6, seed=0).choose(r) for r in range(1, 5)]
    assert all(set(few) <= set(many) for few, many in zip(same, made.server.asked, strict=True))


@pytest.mark.parametrize("lost", [0.0, 0.3])
def test_a_server_that_has_all_replies_it_needs_waits_for_no_deadline(lost):
    settings = {"cohort": 6, "overselect": 1.5, "deadline": 9.0, "step_seconds": 0.1, "speed": "uniform:1,3"}
    made = Lab(Note()).experiment(Toy((3,) * 12), rounds=6, eval_every=6, lost=lost, **settings)
    enough = set()
    for row, asked in zip(made.record.metrics, made.server.asked, strict=True):
        replying = [k for k in asked if not made.world.loses(row["round"], 0, k)]
        times = sorted(1.0 / made.world.profile(k)["speed"] for k in replying)
        assert row["virtual_seconds"] == pytest.approx(times[5] if len(times) >= 6 else 9.0)
        enough.add(len(times) >= 6)
    assert enough == ({True, False} if lost else {True})
