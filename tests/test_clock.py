"""How long things take: sums by hand, distributions, and that nothing but the world decides."""

import math
import time
from dataclasses import dataclass

import numpy as np
import pytest

from fedloom import encoding
from fedloom.cohort import Each
from fedloom.engines import build
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.tasks.toy import Toy
from fedloom.testing import Backwards, Lab, trace
from fedloom.world import World
from fedloom.world import clock as clocks

SIZES = (30, 20, 25, 35)
MBIT = 125_000


def virtual(made):
    return [row["virtual_seconds"] for row in made.record.metrics]


def speeds(**settings):
    world = World(len(SIZES), **settings)
    return [world.profile(k).get("speed", 1.0) for k in range(len(SIZES))]


def test_a_round_lasts_as_long_as_its_slowest_client():
    settings = {"speed": "uniform:0.5,2", "bandwidth": "3/12", "latency": 0.25, "step_seconds": 0.125, "rounds": 3}
    made = Lab(FedAvg(batch=10)).experiment(Toy(SIZES), **settings)
    down = len(encoding.encode({"model": made.server.model}))
    up = len(encoding.encode({"delta": made.server.model, "n": 30}))  # every client's n takes one byte
    took = [
        2 * 0.25 + down / (12 * MBIT) + up / (3 * MBIT) + math.ceil(n / 10) * 0.125 / speed
        for n, speed in zip(SIZES, speeds(speed="uniform:0.5,2"), strict=True)
    ]
    assert virtual(made) == pytest.approx([max(took)] * 3, rel=1e-9)


def test_by_default_a_step_takes_ten_milliseconds_and_a_message_nothing():
    made = Lab(FedAvg(batch=10, epochs=2)).experiment(Toy(SIZES), rounds=2)
    assert virtual(made) == [2 * 4 * 0.01] * 2


@dataclass(frozen=True)
class Calls(Method):
    """Two calls, one of them to a part of the cohort; enrolment before and a last word after."""

    global_model = False

    def setup(self, server, clients):
        clients.mean(self.work, steps=3)

    def round(self, server, cohort):
        before = cohort.now
        cohort.mean(self.work, steps=2)
        assert cohort.now == pytest.approx(before + 0.2)
        replies = cohort.where([1, 2]).call(self.work, steps=Each({1: 4, 2: 1}))
        assert [reply.seconds for reply in replies] == pytest.approx([0.4, 0.1])
        server.grad(server.model, server.task.global_test().all())

    def finish(self, server, clients):
        list(clients.stream(self.work, steps=5))

    @client
    def work(self, client, steps):
        for _ in range(steps):
            client.grad(client.initial, client.data.all())
        return {"n": client.n}


def test_calls_in_sequence_add_up():
    made = Lab(Calls()).experiment(Toy(SIZES), rounds=3, step_seconds=0.1)
    assert virtual(made) == pytest.approx([0.3 + 0.6, 0.6, 0.6 + 0.5])  # setup in the first round, finish in the last
    assert made.boundary.clock.now == pytest.approx(0.3 + 3 * 0.6 + 0.5)


def test_a_server_takes_time_if_it_has_a_speed():
    made = Lab(Calls()).experiment(Toy(SIZES), rounds=2, step_seconds=0.1, server_speed=4.0, eval_every=2)
    assert virtual(made) == pytest.approx([0.3 + 0.6 + 0.1 / 4, 0.6 + 0.1 / 4 + 0.5])


@dataclass(frozen=True)
class Gossip(Method):
    """Everybody tells its neighbours."""

    global_model = False

    def round(self, server, cohort):
        cohort.exchange(self.out, self.mix, {0: [1, 2], 1: [2]}, word="x")

    @client
    def out(self, client, word):
        client.grad(client.initial, client.data.all())
        return {"say": word * 100}

    @client
    def mix(self, client, inbox, word):
        client.state["heard"] = len(inbox)


def test_peers_wait_for_what_their_neighbours_send():
    made = Lab(Gossip()).experiment(Toy((3, 3, 3)), rounds=1, step_seconds=0.1, bandwidth="1/2", latency=0.5)
    word, say = len(encoding.encode({"word": "x"})), encoding.sizes({"say": "x" * 100})
    out = 0.5 + word / (2 * MBIT) + 0.1 + 0.5 + 2 * sum(say.values()) / MBIT  # client 0 has two neighbours
    inbox = {0: {"say": "x" * 100}, 1: {"say": "x" * 100}}
    mix = 0.5 + len(encoding.encode({"word": "x", "inbox": inbox})) / (2 * MBIT)  # client 2 hears both
    assert virtual(made) == pytest.approx([out + mix], rel=1e-9)


@pytest.mark.parametrize("engine", ["loopback", "pool", "backwards"])
@pytest.mark.parametrize("settings", [{}, {"deadline": 0.3}, {"cohort": 2, "overselect": 1.5}])
def test_engines_agree_about_the_time(engine, settings):
    world = {"speed": "lognormal:1.0", "bandwidth": "lognormal:1,median=10", "latency": 0.01, **settings}
    serial = trace(Lab(FedAvg()).experiment(Toy(SIZES), **world))
    other = Backwards() if engine == "backwards" else build(engine, workers=2)
    again = trace(Lab(FedAvg()).experiment(Toy(SIZES), other, **world))
    assert serial["metrics"] == again["metrics"]
    assert all(row["virtual_seconds"] > 0 for row in serial["metrics"])


def test_evaluation_takes_no_time():
    often, seldom = (Lab(FedAvg()).experiment(rounds=4, eval_every=every, latency=1.0) for every in (1, 4))
    assert virtual(often) == virtual(seldom)


def test_a_server_without_a_deadline_hears_of_silence_and_of_losses_when_they_happen():
    plain, silent, lost = (
        Lab(FedAvg(batch=10)).experiment(Toy(SIZES), rounds=1, latency=0.5, **settings)
        for settings in ({}, {"dropout": 1.0}, {"lost": 1.0})
    )
    assert virtual(plain) == virtual(lost) == pytest.approx([1.04]) and virtual(silent) == [1.0]


def test_a_budget_of_virtual_time_ends_the_run():
    made = Lab(FedAvg(batch=10)).experiment(Toy(SIZES), rounds=50, max_virtual_seconds=0.1)
    assert len(made.record.metrics) == 3 and "max_virtual_seconds=0.1 is spent" in made.manifest["stopped_because"]


def drawn(text, population=20_000, seed=0):
    world = World(population, speed=text, seed=seed)
    return np.array([world.profile(k)["speed"] for k in range(population)])


def test_distributions():
    uniform = drawn("uniform:0.5,2")
    assert 0.5 <= uniform.min() < 0.51 and 1.99 < uniform.max() < 2 and abs(uniform.mean() - 1.25) < 0.02
    normal = np.log(drawn("lognormal:0.7,median=3"))
    assert abs(normal.mean() - math.log(3)) < 0.03 and abs(normal.std() - 0.7) < 0.03
    bounded = drawn("lognormal:1.0,within=10")
    assert bounded.max() / bounded.min() == pytest.approx(10) and abs(np.median(bounded) - 1) < 0.05
    classes = drawn("classes:1x0.5,4x0.3,10x0.2")
    assert {value: int((classes == value).sum()) for value in (1, 4, 10)} == {1: 10_000, 4: 6_000, 10: 4_000}
    assert len(set(classes[:20])) > 1, "kinds of devices are mixed"
    assert sorted(drawn("classes:1x0.5,4x0.25,10x0.25", 6)) in ([1, 1, 1, 4, 4, 10], [1, 1, 1, 4, 10, 10])
    assert len(drawn("classes:1x0.4,2x0.4,3x0.2", 11)) == 11, "nobody is left over"
    assert np.array_equal(drawn("uniform:0.5,2"), uniform) and not np.array_equal(
        drawn("uniform:0.5,2", seed=1), uniform
    )


def test_the_same_number_for_all_registers_nothing():
    assert World(3, speed="constant:2").profile(1) == {} == World(3, bandwidth="10", latency=1.0).profile(2)
    assert World(3, speed=2.0).trip(0, 0, 100, 0).work == World(3, speed="2").trip(0, 0, 100, 0).work == 0.5


def test_one_bandwidth_is_one_line_and_two_are_apart():
    one = World(50, bandwidth="uniform:1,9")
    assert all(one.profile(k)["bandwidth_up"] == one.profile(k)["bandwidth_down"] for k in range(50))
    two = World(50, bandwidth="uniform:1,9/uniform:10,90")
    ups, downs = ([two.profile(k)[f"bandwidth_{way}"] for k in range(50)] for way in ("up", "down"))
    assert max(ups) < 9 < 10 <= min(downs) and abs(np.corrcoef(ups, downs)[0, 1]) < 0.5


def test_a_profile_is_registered_and_charged_once():
    seen = []

    @dataclass(frozen=True)
    class Look(FedAvg):
        def round(self, server, cohort):
            seen.append([cohort.info(k) for k in cohort])
            super().round(server, cohort)

    plain = Lab(FedAvg()).experiment(Toy(SIZES), rounds=2)
    made = Lab(Look(), "cpu").experiment(Toy(SIZES), rounds=2, speed="uniform:1,2", bandwidth="classes:1x0.5,5x0.5")
    profile = made.world.profile(3)
    assert profile.keys() == {"speed", "bandwidth_up", "bandwidth_down"}
    assert seen[1][3] == {"n": 35, **profile}
    lines = [line for line in made.record.ledger if line["verb"] == "register"]
    assert all((li["kind"], li["round"], li["clients"]) == ("setup", 0, [0, 1, 2, 3]) for li in lines)
    assert sum(li["bytes"] for li in lines) == len(encoding.encode({"info": profile}))
    extra = [a["up_bytes"] - b["up_bytes"] for a, b in zip(made.record.metrics, plain.record.metrics, strict=True)]
    assert extra == [4 * len(encoding.encode({"info": profile})), 0]


def test_a_million_clients_are_drawn_at_once():
    world = World(1_000_000, 100, speed="lognormal:1", bandwidth="classes:1x0.5,5x0.5", availability="markov:0.3")
    assert len(world.choose(1)) == 100 and world.trip(999_999, 1, 1, 1).seconds > 0
    assert world.mask(1, 0.0).nbytes == 1_000_000


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"speed": "uniform:2"}, r"uniform is written as uniform:LOW,HIGH"),
        ({"speed": "uniform:-1,1"}, "speed is 'uniform:-1,1'; every client's must be a number greater than 0"),
        ({"speed": 0.0}, "greater than 0"),
        ({"speed": "lognormall:1"}, "unknown distribution of speed 'lognormall'; did you mean 'lognormal'"),
        ({"speed": "lognormal:1,within=0.5"}, "the largest is at least once the smallest"),
        ({"speed": "classes:1x0.5,infx0.5"}, "every client's must be a number greater than 0"),
        ({"speed": "classes:1x0.5,2x0.4"}, "shares that add up to 1"),
        ({"speed": "classes:1,2"}, "shares that add up to 1"),
        ({"speed": "classes:1x1.5,2x-0.5"}, "shares that add up to 1"),
        ({"bandwidth": "0/5"}, "greater than 0"),
        ({"latency": -1.0}, "latency is -1.0; it is in seconds, at least 0"),
        ({"step_seconds": math.inf}, "step_seconds is inf"),
        ({"deadline": 0.0}, "deadline is 0.0; it must be greater than 0"),
        ({"overselect": 0.5, "cohort": 2}, "overselect is 0.5; it is a factor, at least 1"),
        ({"overselect": 1.5}, "wants a cohort of fixed size"),
        ({"overselect": 1.5, "cohort": 2, "participation": "poisson"}, "wants a cohort of fixed size"),
        ({"clock": "reall"}, "unknown clock 'reall'"),
        ({"clock": "real", "deadline": 3.0}, "clock is real, and deadline=3.0 is simulated"),
        ({"clock": "real", "speed": "uniform:1,2"}, "clock is real, and speed=uniform:1,2 is simulated"),
        ({"clock": "real", "availability": "cyclic:0.5"}, "clock is real, and availability=cyclic:0.5 is simulated"),
        ({"participation": "uniformly"}, "unknown participation"),
    ],
)
def test_impossible_times_are_refused(settings, complaint):
    with pytest.raises(UsageError, match=complaint):
        World(5, **settings)


def test_the_walls_clock_goes_by_itself_and_goes_on_where_it_was():
    clock = clocks.build("real")
    clock.now = 100.0
    one = clock.now
    clock.reach(1e9)
    assert clock.real and 100.0 <= one <= clock.now < 200.0
    virtual = clocks.build("virtual")
    virtual.reach(5.0)
    virtual.reach(3.0)
    assert virtual.now == 5.0 and not virtual.real


def test_a_run_by_the_walls_clock_says_how_long_it_really_took():
    @dataclass(frozen=True)
    class Slow(FedAvg):
        @client
        def local(self, client, model):
            time.sleep(0.02)
            return {"delta": model.zeros_like(), "n": client.n}

    began = time.perf_counter()
    made = Lab(Slow()).experiment(Toy((4, 5)), rounds=3, clock="real")
    took = [row["virtual_seconds"] for row in made.record.metrics]
    assert min(took) >= 0.04 and sum(took) <= time.perf_counter() - began
