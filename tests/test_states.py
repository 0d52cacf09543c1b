"""The store of clients' states: a dict to whoever uses it, whatever lies in memory and whatever on disk."""

import errno
import gc
import os
import signal
import subprocess
import sys
import tracemalloc
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedloom
from fedloom import encoding
from fedloom.engines import build
from fedloom.errors import RunError
from fedloom.message import Packed, Seed, Sparse
from fedloom.random import stream
from fedloom.runs import checkpoint, recorded
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.runs.states import States
from fedloom.tasks.toy import Toy
from fedloom.testing import alike, trace
from fedloom.vector import Layout, Vector

LAYOUT = Layout(("body", "head", "mean"), ((3, 2), (2,), (2,)), 2)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.complex64)


def value(seed):
    """A message value of one of many kinds, NaN and -0.0 among them."""
    draw = stream(seed, "value")
    flat = torch.randn(LAYOUT.size, generator=draw)
    return [
        lambda: {"control": Vector(flat, LAYOUT)},
        lambda: {"w": flat[: seed % 7].to(DTYPES[seed % len(DTYPES)]), "odd": torch.tensor([float("nan"), -0.0])},
        lambda: {"rows": Sparse(torch.tensor([1, 4]), flat.view(-1, 2)[:2], 6), "mask": Packed(flat > 0, 1)},
        lambda: {"calls": seed, "nested": [(1, None), {"a": b"\0", 3: "ü"}], "seed": Seed(seed), "no name": True},
        dict,
    ][seed % 5]()


def size(state):
    return len(encoding.encode({"state": state}))


CLIENTS = st.integers(0, 6)
ACTS = st.one_of(
    st.tuples(st.just("set"), CLIENTS, st.integers(0, 400)),
    st.tuples(st.sampled_from(["get", "del", "encoded"]), CLIENTS, st.none()),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTS, max_size=60), st.sampled_from([0, 60, 150, 400, 10**9]))
def test_it_is_a_dict(acts, budget):
    states, plain = States(budget=budget), {}
    for act, client, seed in acts:
        if act == "set":
            states[client] = plain[client] = value(seed)
        elif client not in plain:
            with pytest.raises(KeyError):
                {"get": states.__getitem__, "del": states.__delitem__, "encoded": states.encoded}[act](client)
        elif act == "get":
            assert encoding.same(states[client], plain[client])
        elif act == "encoded":
            assert states.encoded(client) == encoding.encode({"state": plain[client]})
        else:
            del states[client], plain[client]
        assert list(states) == list(plain) and len(states) == len(plain)
        assert states.used == sum(size(plain[k]) for k in states.memory) <= budget
        assert states.used == sum(map(size, plain.values())) or states.spill, "nothing is on disk without need"
        if states.spill:
            assert states.spill.waste <= max(states.spill.end / 2, budget)
            assert states.spill.end - states.spill.waste == sum(size(plain[k]) for k in states.spill.places)
    assert all(encoding.same(held, plain[client]) for client, held in states.items())
    assert states.get(99, "nobody") == "nobody" and 99 not in states


def test_the_least_recently_used_goes_to_disk(tmp_path):
    states = States(tmp_path, budget=2 * size(value(0)))
    states[0], states[1] = value(0), value(5)
    assert states.spill is None
    assert states[0] is states.memory[0], "what is in memory is not copied"
    states[2] = value(10)
    assert list(states.memory) == [0, 2] and list(states.spill.places) == [1]
    assert encoding.same(states[1], value(5))
    assert list(states.memory) == [2, 1]


def test_states_of_one_size_fill_each_others_holes(tmp_path):
    one = size(value(0))
    states = States(tmp_path, budget=3 * one)
    for turn in range(200):
        client = 7 * turn % 10
        assert turn < 10 or encoding.same(states[client], value(5 * (turn - 10)))
        states[client] = value(5 * turn)
    assert states.spill.end <= 10 * one
    end, waste = states.spill.end, states.spill.waste
    for client in [*range(10), *range(10)]:
        states[client]
    assert (states.spill.end, states.spill.waste) == (10 * one, 0), "what was only read is not written again"
    assert end - waste >= 7 * one


def test_a_vector_comes_back_readonly_and_of_the_same_layout(tmp_path):
    states = States(tmp_path, budget=0)
    states[3] = value(0)
    held = states[3]["control"]
    assert held.layout == LAYOUT and held.readonly
    assert torch.equal(held.flat, value(0)["control"].flat)


def test_the_file_has_no_name_and_its_space_is_free_at_the_end(tmp_path):
    states = States(tmp_path, budget=0)
    states[0] = value(0)
    number = states.spill.file.fileno()
    assert os.fstat(number).st_size == size(value(0))
    assert list(tmp_path.iterdir()) == []
    states[1], states[2] = {"w": torch.zeros(1000)}, {"w": torch.ones(10)}
    del states[1]  # most of the file: what is left moves to a new one
    assert os.fstat(states.spill.file.fileno()).st_size == size(value(0)) + size(states[2])
    number = states.spill.file.fileno()
    del states
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_full_disk_is_told_and_loses_nothing(tmp_path):
    states = States(tmp_path, budget=size(value(0)))
    states[0], states[1] = value(0), value(5)

    class Full:
        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, data):
            file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    file = states.spill.file
    states.spill.file = Full()
    with pytest.raises(RunError, match=r"the disk of .* is full; free some space"):
        states[2] = value(10)
    states.spill.file = file
    assert [encoding.same(states[k], value(5 * k)) for k in range(3)] == [True] * 3


class Slow:
    """A file that moves 7 bytes at a time, as a system may."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        return self.file.write(data[:7])

    def read(self, count):
        return self.file.read(min(count, 7))


def test_what_is_moved_in_pieces_is_whole(tmp_path):
    states = States(tmp_path, budget=0)
    states[0] = value(0)
    states.spill.file = Slow(states.spill.file)
    states[1] = value(5)
    assert encoding.same(states[0], value(0)) and encoding.same(states[1], value(5))


def test_a_hole_that_a_full_disk_left_is_filled_by_the_next(tmp_path):
    states, one = States(tmp_path, budget=0), size(value(0))
    for client in range(3):
        states[client] = value(0)
    states.budget = one
    file, spill = states.spill.file, states.spill
    states[1] = value(5)  # in memory; where it was is a hole

    class Full(Slow):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    spill.file = Full(file)
    with pytest.raises(RunError, match="is full"):
        states[7] = value(10)
    spill.file = file
    states[8] = value(15)
    assert states.spill is spill and spill.end == 4 * one
    assert [encoding.same(states[k], value(v)) for k, v in ((0, 0), (1, 5), (2, 0), (7, 10), (8, 15))] == [True] * 5


def test_what_comes_back_from_disk_lies_on_the_device(tmp_path):
    states = States(tmp_path, "meta", budget=0)
    states[0] = {"w": torch.ones(3)}
    assert states[0]["w"].device.type == "meta"


def told(states):
    return {client: state["n"] for client, state in sorted(states.items())}


@pytest.mark.parametrize("budget", [0, 10**9])
def test_a_step_that_fails_is_taken_back(tmp_path, budget):
    states = States(tmp_path, budget=budget)
    states[0], states[1], states[2] = {"n": 10}, {"n": 11}, {"n": 12}
    with pytest.raises(KeyError), states.undone_by(KeyError):
        states[0], states[1], states[5] = {"n": 20}, {"n": 21}, {"n": 25}
        states[0], states[5] = {"n": 30}, {"n": 35}
        raise KeyError
    assert told(states) == {0: 10, 1: 11, 2: 12} and 5 not in states
    with states.undone_by(KeyError):
        states[0] = {"n": 40}
    assert states.before is None
    states[1] = {"n": 41}
    with pytest.raises(KeyError), states.undone_by(KeyError):
        states[2] = {"n": 42}
        raise KeyError
    with pytest.raises(ValueError, match="other"), states.undone_by(KeyError):
        states[2] = {"n": 52}
        raise ValueError("other")
    assert told(states) == {0: 40, 1: 41, 2: 52}, "only that failure, and only what is set inside"


def scaffold(**settings):
    return Spec.of({"method": "scaffold", "partition": "given", "rounds": 4} | settings)


@pytest.fixture
def little(monkeypatch):
    """Experiments keep one state of `scaffold` in memory, of four clients'."""
    monkeypatch.setattr(recorded, "States", partial(States, budget=600))


@pytest.fixture(scope="module")
def plenty():
    """What a run leaves whose states are all in memory."""
    made = Experiment(scaffold(), Toy()).begin(None)
    made.go()
    assert made.states.spill is None and len(made.states) == 4
    return trace(made)


@pytest.mark.parametrize("engine", ["serial", "loopback", "pool"])
def test_a_run_whose_states_are_on_disk_is_bitwise_the_same(engine, little, plenty):
    made = Experiment(scaffold(), Toy()).begin(None)
    made.engine = made.boundary.arrivals.engine = build(engine, workers=2)
    made.go()
    assert len(made.states.spill.places) >= 3
    alike(plenty, trace(made), "states on disk change the result")


KILLED = """
import os, signal, sys
from functools import partial
from fedloom.runs import checkpoint, experiment, recorded
from fedloom.runs.spec import Spec
from fedloom.runs.states import States
from fedloom.tasks.toy import Toy

recorded.States = partial(States, budget=600)
checkpoint.SHARE = float("inf")
spec = Spec.of({"method": "scaffold", "partition": "given", "rounds": 4})
made = experiment.Experiment(spec, Toy()).begin(sys.argv[1])

def die(row):
    if row["round"] == 2:
        assert made.states.spill is not None
        os.kill(os.getpid(), signal.SIGKILL)

made.go(die)
"""


def test_killed_and_resumed(tmp_path, little, plenty):
    path = tmp_path / "run"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    wanted = {"spec.yaml", "manifest.json", "partition.json", "metrics.jsonl", "ledger.jsonl", "clients.json"}
    wanted |= {"clients.jsonl", "replies.jsonl"}  # by which the page shows clients and who replied, round by round
    assert left == wanted | {"chosen.json", "checkpoint/state.bin"}, "a kill leaves no spilled states behind"
    record = fedloom.runs.record.Run(path)
    again = Experiment(record.spec, Toy()).take_up(record)
    assert again.done == 2 and len(again.states) == 4 and len(again.states.memory) <= 1
    again.go()
    alike(plenty, trace(again), "a run killed with states on disk goes on differently")


def test_a_checkpoint_passes_states_through_memory_one_by_one(tmp_path):
    made = Experiment(scaffold(), Toy()).begin(tmp_path / "run")
    held, one = 64, 2**20
    made.states.budget = 4 * one
    for client in range(held):
        made.states[client] = {"w": torch.full((one // 4,), float(client))}
    peaks = []
    for act in ("save", "load"):
        there = States(tmp_path, budget=4 * one)
        tracemalloc.start()
        if act == "save":
            checkpoint.save(made.record, made.spec, 1, [made.server, made.states, made.boundary])
        else:
            assert checkpoint.load(made.record, made.spec, [made.server, there, made.boundary]) == 1
        peaks.append(tracemalloc.get_traced_memory()[1] / one)
        tracemalloc.stop()
    assert peaks[0] < 4 and peaks[1] < 4 + 4, f"{peaks} MiB, of {held} MiB of states"
    assert all(torch.equal(there[k]["w"], torch.full((one // 4,), float(k))) for k in range(held))


def test_a_file_that_lost_its_end_is_told(tmp_path):
    states = States(tmp_path, budget=0)
    states[3] = {"w": torch.ones(4)}
    assert torch.equal(states[3]["w"], torch.ones(4))
    states.memory.clear()
    os.ftruncate(states.spill.file.fileno(), 5)
    with pytest.raises(RunError, match="the state of client 3 is gone from the disk"):
        states[3]
