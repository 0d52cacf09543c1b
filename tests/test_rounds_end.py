"""Rounds between machines end although clients are dead, slow or gone, and a replay has the bits of what was heard."""

import threading
import time

import pytest
from cutting import Stretch
from federation import Federation, spec_of
from test_deploy import left, serial
from test_remote import difference

from fedloom.deploy import journal
from fedloom.deploy.agent import Agent, silent
from fedloom.deploy.config import ClientConfig
from fedloom.deploy.replay import replayed
from fedloom.errors import RunError

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


def ran(federation, spec, after_round=None, stretch=None):
    """The experiment; `after_round` is told of each row."""
    federation.start()
    try:
        return federation.serve(spec, on_round=after_round)
    finally:
        federation.stop()


def heard(made, kind="train"):
    return [line["heard"] for line in journal.read(made.record.path) if "heard" in line and line["at"][0] == kind]


def same_bits_again(made):
    again = replayed(made.record.path)
    again.go()
    assert difference(left(made.record)["model"], left(again.record)["model"]) is None


def test_a_dead_client_is_missing_from_when_its_lease_has_run_out(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, lease=2)
    made = ran(federation, spec_of("scaffold", rounds=4), lambda row: row["round"] == 2 and federation.kill("c"))
    assert heard(made) == [[0, 1, 2], [0, 1, 2], [0, 1], [0, 1]]
    same_bits_again(made)


def test_a_slow_client_is_late_at_the_deadline(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, lease=30, deadline=1.5, quorum=2)
    with Stretch(federation.port) as stretch:
        federation.through = {"b": stretch.port}
        times = []

        def after(row):
            times.append(time.monotonic())
            stretch.delay = 3.0 if row["round"] == 1 else 0.0 if row["round"] == 2 else stretch.delay

        made = ran(federation, spec_of("scaffold", rounds=3), after)
    assert heard(made)[:2] == [[0, 1, 2], [0, 2]]
    assert 1.5 <= times[1] - times[0] < 8  # with an evaluation, that waits as long
    same_bits_again(made)


def test_who_leaves_is_not_waited_for(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, lease=30)

    def leaves(row):
        if row["round"] == 1:
            federation.kill("c")
            Agent(ClientConfig.read(federation.config_of("c")), silent).leave()

    began = time.monotonic()
    made = ran(federation, spec_of("fedavg", rounds=3), leaves)
    assert time.monotonic() - began < 25
    assert heard(made) == [[0, 1, 2], [0, 1], [0, 1]]
    same_bits_again(made)


def test_below_the_quorum_a_call_waits_until_somebody_comes_back(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, lease=1, quorum=3)

    def dies(row):
        if row["round"] == 1:
            federation.kill("c")
            threading.Timer(3.0, federation.start, ["c"]).start()

    made = ran(federation, spec_of("fedavg", rounds=2), dies)
    assert heard(made) == [[0, 1, 2], [0, 1, 2]]


def test_a_run_that_lacks_its_quorum_for_too_long_stops_and_goes_on_when_it_has_it(certificates, tmp_path):
    federation, spec = Federation(tmp_path, certificates, lease=1, quorum=3, patience=2), spec_of("scaffold", rounds=3)
    with pytest.raises(
        RunError, match=r"^c gave no sign of life for 2 seconds .* answer to \w+ \(\w+, round \d\); start"
    ):
        ran(federation, spec, lambda row: row["round"] == 1 and federation.kill("c"))
    made = ran(federation, spec)
    assert heard(made) == [[0, 1, 2]] * 3
    same_bits_again(made)
    assert difference(left(made.record), left(serial(spec, 3))) is None


def test_a_run_whose_clients_do_not_come_stops(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, patience=1)
    federation.start("b")
    try:
        with pytest.raises(
            RunError, match=r"^a, (b, )?c did not come within 1 seconds \(rounds.patience\); start them"
        ):
            federation.serve(spec_of(rounds=1))
    finally:
        federation.stop()
    assert not (tmp_path / "run").exists()


def test_one_that_comes_late_takes_part(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, lease=5)
    federation.start("a", "b")
    threading.Timer(2.0, federation.start, ["c"]).start()
    try:
        made = federation.serve(spec_of(rounds=1))
    finally:
        federation.stop()
    assert heard(made) == [[0, 1, 2]]


ASYNCHRONOUS = spec_of({"name": "fedbuff", "buffer": 2}, clock="real", rounds=8)


def test_work_without_rounds_goes_on_through_a_kill(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, lease=20)

    def killed(row):
        if row["round"] in (2, 4):
            federation.kill("b")
            federation.start("b")

    made = ran(federation, ASYNCHRONOUS, killed)
    assert made.done == 8
    same_bits_again(made)


def test_work_without_rounds_goes_on_without_one_that_never_returns(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, lease=1)
    made = ran(federation, ASYNCHRONOUS, lambda row: row["round"] == 2 and federation.kill("b"))
    assert made.done == 8
    lines = journal.read(made.record.path)
    assert any(line.get("landed") == 1 and not line["counts"] for line in lines)
    assert len(lines) < 200
    same_bits_again(made)
