"""How `auto` reckons: rounds of a stand-in, as far as time allows, and from there to the whole round."""

import dataclasses
import math

import pytest
import torch

from fedloom.boundary.pipeline import Pipeline
from fedloom.calls import Layer
from fedloom.engines import auto, build
from fedloom.errors import RunError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.runs.spec import Spec
from fedloom.site import Site
from fedloom.tasks.toy import Toy
from fedloom.world import World

SIZES = (5, 50, 21, 20, 7, 33)
STEPS = [3 * math.ceil(n / 10) for n in SIZES]  # batches of 10, three epochs
RIVALS = []  # what engines were told that others take, in the last choice
LONG = 1.0  # seconds of a round that workers are worth


def trials(sizes=SIZES, batch=10, epochs=3, **world):
    site = Site(Toy(sizes), 0)
    return auto.Trials.of(FedAvg(batch=batch, epochs=epochs), site, World(len(sizes), **world), 1)


def chosen(monkeypatch, seconds, sizes=SIZES, workers=0, cores=4, layers=(), threads=1, step=1e-9, **world):
    """The choice where engines take so many seconds a round, by name and workers; and what was tried."""
    tried, rivals = [], RIVALS
    rivals.clear()

    def its(trials, name, workers=0, rival=math.inf):
        tried.append((name, workers))
        rivals.append(rival)
        return seconds[name, workers] if (name, workers) in seconds else seconds[name]

    monkeypatch.setattr(auto.Trials, "seconds", its)
    monkeypatch.setattr(auto.Trials, "step", lambda trials: step)
    site = Site(Toy(sizes), 0, layers=layers)
    world = World(len(sizes), **world)
    return auto.choose(FedAvg(batch=10, epochs=3), site, world, workers, cores, threads), tried


def shown(choice):
    """The seconds of a round by engine, as the reason says."""
    return {name: float(rest.split()[-2]) for name, rest in (
        part.split(maxsplit=1) for part in choice.why.partition("training a round: ")[2].split(", ")
        if "vectorized with" not in part
    )}  # fmt: skip


def scripted(monkeypatch, overhead=0.0, a_step=1.0):
    """Trials whose rounds take so many seconds; what was asked, as (clients, share)."""
    asked = []

    def round(its, engine, share):
        asked.append((tuple(its.clients), share))
        steps = sum(max(1, math.floor(share * its.steps[client] + 0.5)) for client in its.clients)
        return overhead + a_step * steps, steps

    monkeypatch.setattr(auto.Trials, "round", round)
    return asked


def test_a_round_has_its_clients_steps():
    assert trials().total == sum(STEPS)
    assert trials(epochs=1).total == sum(STEPS) // 3
    assert list(trials().steps.values()) == STEPS
    assert trials(batch=0, sizes=(64, 65)).total == 3 * (2 + 3), "a method without batches is timed in some of 32"


def test_clients_of_a_round_stand_spread_over_all_and_those_without_data_sit_out():
    assert list(trials(cohort=3).clients) == [0, 2, 4]
    assert list(trials().clients) == [0, 1, 2, 3, 4, 5]
    task = Toy(SIZES)
    empty = dataclasses.replace(task.data(1, "train"), rows=torch.arange(0))
    inner = task.data
    task.data = lambda client, split: empty if client == 1 else inner(client, split)
    assert list(auto.Trials.of(FedAvg(), Site(task, 0), World(6), 1).clients) == [0, 2, 3, 4, 5]


def test_of_many_clients_only_those_of_a_round_are_asked(monkeypatch):
    task, asked = Toy((9,) * 1000), []
    data = task.data
    monkeypatch.setattr(task, "data", lambda client, split: asked.append(client) or data(client, split))
    found = auto.Trials.of(FedAvg(batch=3), Site(task, 0), World(1000, 10), 1)
    assert found.clients == tuple(range(0, 1000, 100)) and {*asked} == {*found.clients}


def test_the_stand_in_takes_a_share_of_the_steps():
    some = trials()
    engine = some.start("serial")
    for share, steps in ((1.0, sum(STEPS)), (0.5, sum(max(1, round(n / 2)) for n in STEPS)), (1e-9, len(SIZES))):
        seconds, taken = some.round(engine, share)
        assert taken == steps and seconds > 0


def test_a_round_that_fits_the_budget_is_timed_whole(monkeypatch):
    asked = scripted(monkeypatch, overhead=0.5, a_step=0.01)
    some = trials().within(auto.BUDGET, auto.BUDGET / (sum(STEPS) + 0.5))
    assert (list(some.clients), some.share) == ([*range(6)], 1.0)
    assert some.seconds("serial") == pytest.approx(0.5 + 0.01 * sum(STEPS))
    assert {share for _, share in asked} == {1.0}


def test_of_a_round_that_does_not_fit_all_clients_take_fewer_steps():
    some = trials().within(1.0, 3.0 / sum(STEPS))
    assert list(some.clients) == [*range(6)]
    assert some.share == pytest.approx(1 / 3, rel=0.05)


def test_there_are_fewer_clients_only_where_one_step_each_does_not_fit():
    many = trials((30,) * 100, batch=10, epochs=1)
    some = many.within(1.0, 1 / 50)
    assert list(some.clients) == [*range(0, 100, 2)] and some.share == pytest.approx(1 / 3)
    assert len(many.within(1.0, 1 / 2).clients) == auto.FEWEST
    assert len(trials().within(1.0, 1.0).clients) == 6, "no more than there are"


@pytest.mark.parametrize(("overhead", "a_step"), [(0.0, 0.01), (2.0, 0.01), (0.3, 0.0)])
def test_from_two_trials_the_whole_round_is_told(monkeypatch, overhead, a_step):
    scripted(monkeypatch, overhead, a_step)
    some = dataclasses.replace(trials((400,) * 6, batch=1, epochs=1), share=0.1)
    assert some.seconds("serial") == pytest.approx(overhead + a_step * 2400)


def test_where_noise_makes_the_longer_trial_the_shorter_one_no_step_counts(monkeypatch):
    monkeypatch.setattr(auto.Trials, "round", lambda its, engine, share: (1.2 - share, int(1000 * share)))
    some = dataclasses.replace(trials((400,) * 6, batch=1, epochs=1), share=0.1)
    assert some.seconds("serial") == pytest.approx(1.1)


def test_where_no_fewer_steps_can_be_taken_all_seconds_are_the_steps(monkeypatch):
    scripted(monkeypatch, 0.0, 0.5)
    some = dataclasses.replace(trials((30,) * 6, batch=10, epochs=1), share=0.1)
    assert some.seconds("serial") == pytest.approx(0.5 * 18)


def test_the_median_of_some_trials_counts_and_long_ones_are_not_repeated(monkeypatch):
    times = iter([0.1, 0.02, 0.04, 0.01, 0.05, 0.7])
    monkeypatch.setattr(auto.Trials, "round", lambda its, engine, share: (next(times), 7))
    some = trials()
    assert some.median(None, 1.0) == (0.04, 7)
    assert next(times) == 0.7, "five were made"
    times = iter([0.9, 0.1])
    assert some.median(None, 1.0) == (0.9, 7) and next(times) == 0.1


def test_batches_of_clients_are_timed_once_their_steps_are_traced(monkeypatch):
    asked = scripted(monkeypatch, a_step=0.0)
    trials().seconds("vectorized")
    warm = len(asked) - auto.REPEATS - 3
    assert (warm - 1) * max(STEPS) <= auto.AFTER < warm * max(STEPS)
    asked.clear()
    trials().seconds("serial")
    assert len(asked) == 1 + auto.REPEATS
    asked.clear()
    trials((10 * auto.AFTER,) * 3, epochs=1).warm_up(None)
    assert len(asked) == 2, "at the last of these steps there is a trace, and it is taken from the next on"


def test_what_is_far_behind_before_its_steps_are_traced_is_left_at_that(monkeypatch):
    asked, some = scripted(monkeypatch, a_step=0.01), dataclasses.replace(trials(), share=0.2)
    rival = 0.01 * some.total / auto.HOPELESS
    assert some.seconds("vectorized", rival=0.99 * rival) == pytest.approx(0.01 * some.total) and len(asked) == 3
    asked.clear()
    some.seconds("vectorized", rival=1.01 * rival)
    assert len(asked) > 3 + auto.REPEATS
    asked.clear()
    some.seconds("pool", 2, rival=1e-9)
    assert len(asked) > auto.REPEATS, "others are not traced"


def test_a_worker_that_is_cold_in_the_second_trial_is_not_hopeless(monkeypatch):
    times = iter([5.0, 9.0, 0.1, *(0.1,) * 20])
    monkeypatch.setattr(auto.Trials, "round", lambda its, engine, share: (next(times), its.total))
    assert trials().seconds("vectorized", rival=0.2) == pytest.approx(0.1)
    times = iter([5.0, 0.1, 9.0, *(0.1,) * 20])
    assert trials().seconds("vectorized", rival=0.2) == pytest.approx(0.1)


def test_batches_of_clients_compete_with_the_fastest_engine_so_far(monkeypatch):
    chosen(monkeypatch, {"serial": 3.0, "pool": 2.0, ("vectorized", 0): 1.5, ("vectorized", 4): 9.0})
    assert [math.inf, math.inf, 2.0, 1.5] == RIVALS


def test_the_warm_up_ends_where_it_lasts_too_long(monkeypatch):
    asked, ticks = scripted(monkeypatch), iter([0.0, 0.1, auto.WARMING, 99.0])
    monkeypatch.setattr(auto.time, "perf_counter", lambda: next(ticks))
    trials((10,) * 3, epochs=1).warm_up(None)
    assert len(asked) == 1


def test_the_step_of_the_largest_client_is_timed_warm(monkeypatch):
    asked, times = [], iter([9.0, *(0.2,) * 9])

    def round(its, engine, share):
        asked.append((tuple(its.clients), share))
        return next(times), 4

    monkeypatch.setattr(auto.Trials, "round", round)
    assert trials().step() == pytest.approx(0.05)
    assert {*asked} == {((1,), auto.STEPS / 15)}


def test_engines_that_were_tried_are_stopped(monkeypatch):
    stopped = []
    monkeypatch.setattr(type(build("serial")), "stop", lambda engine: stopped.append(engine))
    trials().seconds("serial")
    assert len(stopped) == 1
    monkeypatch.setattr(auto.Trials, "round", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trials().seconds("serial")
    assert len(stopped) == 2


def test_the_fastest_engine_is_taken_and_all_are_told(monkeypatch):
    seconds = {"serial": 3.0, "pool": 1.0, ("vectorized", 0): 1.1, ("vectorized", 4): 1.2}
    choice, tried = chosen(monkeypatch, seconds)
    assert (choice.engine, choice.workers) == ("pool", 4)
    assert tried == [("serial", 0), ("pool", 4), ("vectorized", 0), ("vectorized", 4)]
    assert shown(choice) == {"serial": 3.0, "pool": 1.0, "vectorized": 1.1}
    for name, hands in (("vectorized", 0), ("vectorized", 4)):
        choice, _ = chosen(monkeypatch, seconds | {(name, hands): 0.5})
        assert (choice.engine, choice.workers) == (name, hands)
    choice, _ = chosen(monkeypatch, seconds | {"pool": 4.0, ("vectorized", 0): 9.0, ("vectorized", 4): 9.0})
    assert (choice.engine, choice.workers) == ("serial", 0)


def test_bits_are_changed_only_where_it_is_clearly_faster(monkeypatch):
    for faster, engine in ((0.97, "serial"), (1.03, "vectorized")):
        choice, _ = chosen(monkeypatch, {"serial": 1.0, "vectorized": 1 / (faster * auto.CLEARLY)}, cores=1)
        assert choice.engine == engine


@pytest.mark.parametrize(
    ("workers", "cores", "cohort", "hands"), [(0, 4, 6, 4), (3, 4, 6, 3), (8, 4, 6, 6), (0, 64, 5, 5)]
)
def test_there_are_no_more_workers_than_clients_in_a_round(monkeypatch, workers, cores, cohort, hands):
    seconds = {"serial": 3.0, "pool": 1.0, "vectorized": 9.0}
    choice, _ = chosen(monkeypatch, seconds, workers=workers, cores=cores, cohort=cohort)
    assert (choice.engine, choice.workers) == ("pool", hands)


def test_processes_are_tried_only_for_rounds_that_last(monkeypatch):
    for much in (0.9, 1.1):
        _, tried = chosen(monkeypatch, {"serial": much * auto.WORTHWHILE, "pool": 1e-6, "vectorized": 1.0})
        assert (("pool", 4) in tried, ("vectorized", 4) in tried) == (much > 1, much > 1)
    _, tried = chosen(monkeypatch, {"serial": LONG, "vectorized": LONG}, cores=1)
    assert tried == [("serial", 0), ("vectorized", 0)]


def test_processes_that_are_not_forked_are_reckoned_and_not_started(monkeypatch):
    choice, tried = chosen(monkeypatch, {"serial": 2.0, "vectorized": 1.9}, threads=2)
    assert tried == [("serial", 0), ("vectorized", 0)]
    assert shown(choice)["pool"] == pytest.approx(2.0 / 4) and (choice.engine, choice.workers) == ("pool", 4)


def test_batches_of_clients_are_not_tried_where_clients_would_train_alone(monkeypatch):
    class Private(Layer):
        guards = True

    cases = (((), {}, True), ((Private(),), {}, False), ((Layer(),), {}, True), ((), {"cohort": 1}, False))
    for layers, world, tries in cases:
        _, tried = chosen(monkeypatch, {"serial": 1.0, "pool": 1.0, "vectorized": 1.0}, layers=layers, **world)
        assert (("vectorized", 0) in tried) == tries
    monkeypatch.setattr(auto.Gather, "fits", lambda gather, bench: False)
    _, tried = chosen(monkeypatch, {"serial": 1.0, "pool": 1.0})
    assert ("vectorized", 0) not in tried


def test_the_mechanism_that_guards_gradients_says_so():
    method = FedAvg()
    pipeline = Pipeline.of(Spec.of({"method": "fedavg", "dp": "sample:noise=1,clip=1"}), method, Toy(SIZES))
    assert [layer.guards for layer in pipeline.layers].count(True) == 1
    pipeline = Pipeline.of(Spec.of({"method": "fedavg", "dp": "local:epsilon=1,clip=1"}), method, Toy(SIZES))
    assert not any(layer.guards for layer in pipeline.layers)


def test_a_part_of_the_clients_stands_for_all(monkeypatch):
    seconds = {"serial": 3.0, "pool": 2.0, "vectorized": 9.0}
    choice, _ = chosen(monkeypatch, seconds, sizes=(10,) * 64, step=auto.BUDGET / 16)
    assert shown(choice) == pytest.approx({"serial": 12.0, "pool": 8.0, "vectorized": 36.0})
    assert "about 64 x 3 of them" in choice.why


def test_where_no_client_trains_the_network_nothing_is_timed(monkeypatch):
    task = Toy(SIZES)
    monkeypatch.setattr(type(task), "demands", ("vertical",), raising=False)
    monkeypatch.setattr(auto.Trials, "round", lambda *_: pytest.fail("timed"))
    choice = auto.choose(FedAvg(), Site(task, 0), World(len(SIZES)), 0, 4)
    assert (choice.engine, choice.workers) == ("serial", 0)


def test_where_a_trial_fails_the_run_begins_and_says_why(monkeypatch):
    def fails(*_):
        raise RunError("client 3: no loss")

    monkeypatch.setattr(auto.Trials, "round", fails)
    choice = auto.choose(FedAvg(), Site(Toy(SIZES), 0), World(len(SIZES)), 0, 4)
    assert (choice.engine, choice.workers) == ("serial", 0) and "client 3: no loss" in choice.why


def test_a_trial_leaves_no_trace(monkeypatch):
    site = Site(Toy(SIZES), 0)
    before, drawn = site.initial.flat.clone(), torch.default_generator.get_state()
    auto.choose(FedAvg(batch=10), site, World(len(SIZES)), 0, 2)
    assert torch.equal(site.initial.flat, before) and torch.equal(torch.default_generator.get_state(), drawn)
    assert site.gather is None
