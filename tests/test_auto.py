"""How `auto` reckons: the steps of a round, times what one takes, over those who share them."""

import math

import pytest

from fedloom.engines import auto
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.site import Site
from fedloom.tasks.toy import Toy
from fedloom.world import World

SIZES = (5, 50, 21, 20, 7, 33)


def chosen(monkeypatch, alone, together, sizes=SIZES, workers=0, cores=4, **world):
    """The choice where a step takes so many seconds, and what was timed: (client, batch, how many together)."""
    timed = []

    def seconds(site, client, batch, many):
        timed.append((client, batch, many))
        return alone if many == 1 else together

    monkeypatch.setattr(auto, "_seconds", seconds)
    site = Site(Toy(sizes), 0)
    return auto.choose(FedAvg(batch=10, epochs=3), site, World(len(sizes), **world), workers, cores), timed


def shown(choice):
    """The seconds of a round by engine, as the reason says."""
    return {name: float(rest.split()[0]) for name, rest in (
        part.split(maxsplit=1) for part in choice.why.partition("training a round: ")[2].split(", ")
    )}  # fmt: skip


def test_a_rounds_seconds_are_its_clients_steps_times_a_step(monkeypatch):
    choice, _ = chosen(monkeypatch, 0.010, 0.001, cohort=4)
    steps = sum(3 * math.ceil(n / 10) for n in SIZES) / len(SIZES)
    expected = {"serial": 4 * steps * 0.010, "pool": 4 * steps * 0.010 / 4, "vectorized": 4 * steps * 0.001}
    assert shown(choice) == pytest.approx(expected, rel=0.01)


def test_the_largest_client_is_timed_alone_and_with_as_many_as_a_round_has(monkeypatch):
    assert chosen(monkeypatch, 0.01, 0.01, cohort=4)[1] == [(1, 10, 1), (1, 10, 4)]
    assert chosen(monkeypatch, 0.01, 0.01, sizes=(9,) * 40)[1][1][2] == auto.TOGETHER
    assert [many for _, _, many in chosen(monkeypatch, 0.01, 0.01, cohort=1)[1]] == [1], "nobody to train with"


@pytest.mark.parametrize(
    ("workers", "cores", "cohort", "hands"), [(0, 4, 6, 4), (3, 4, 6, 3), (8, 4, 6, 6), (0, 64, 5, 5)]
)
def test_there_are_no_more_workers_than_clients_in_a_round(monkeypatch, workers, cores, cohort, hands):
    choice, _ = chosen(monkeypatch, 0.01, None, workers=workers, cores=cores, cohort=cohort)
    assert (choice.engine, choice.workers) == ("pool", hands)


def test_processes_are_for_rounds_that_last(monkeypatch):
    steps = sum(3 * math.ceil(n / 10) for n in SIZES)
    for much, engine in ((0.9, "serial"), (1.1, "pool")):
        choice, _ = chosen(monkeypatch, much * auto.WORTHWHILE / steps, None)
        assert choice.engine == engine


def test_bits_are_changed_only_where_it_is_clearly_faster(monkeypatch):
    for faster, engine in ((0.9, "serial"), (1.1, "vectorized")):
        choice, _ = chosen(monkeypatch, 0.01, 0.01 / (faster * auto.CLEARLY), cores=1)
        assert choice.engine == engine


def test_of_many_clients_a_sample_stands_for_all(monkeypatch):
    task, asked = Toy((9,) * 1000), []
    monkeypatch.setattr(auto, "_seconds", lambda *_: 0.01)
    data = task.data
    monkeypatch.setattr(task, "data", lambda client, split: asked.append(client) or data(client, split))
    site = Site(task, 0)
    asked.clear()
    choice = auto.choose(FedAvg(batch=3), site, World(1000, 10), 0, 4)
    assert shown(choice)["serial"] == pytest.approx(10 * 3 * 0.01)
    assert len(set(asked)) == auto.SAMPLED and max(asked) > 900


def test_a_batchs_seconds_are_shared_by_its_clients_and_its_steps(monkeypatch):
    ticks = iter([100.0, 100.0 + 48.0] * 2)
    monkeypatch.setattr(auto.time, "perf_counter", lambda: next(ticks))
    site = Site(Toy(SIZES), 0)
    assert auto._seconds(site, 1, 10, 1) == 48.0 / auto.STEPS
    assert auto._seconds(site, 1, 10, 3) == 48.0 / (3 * auto.STEPS)


def test_where_no_client_trains_the_network_nothing_is_timed(monkeypatch):
    task = Toy(SIZES)
    monkeypatch.setattr(type(task), "demands", ("vertical",), raising=False)
    monkeypatch.setattr(auto, "_seconds", lambda *_: pytest.fail("timed"))
    choice = auto.choose(FedAvg(), Site(task, 0), World(len(SIZES)), 0, 4)
    assert (choice.engine, choice.workers) == ("serial", 0)
