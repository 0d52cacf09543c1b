"""Runs between machines, here between processes: the bits of `serial`, through kills, cuts and lateness."""

import json
import threading
import time
from dataclasses import replace

import pytest
from federation import Federation, spec_of
from test_remote import difference

from fedloom.deploy.replay import replayed
from fedloom.errors import UsageError
from fedloom.runs.experiment import Experiment
from fedloom.runs.record import Run
from fedloom.runs.trained import WHICH
from fedloom.testing.lab import without_times

# A server that stops leaves connections that were just being made to the system.
pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


def left(run):
    """What a run leaves, without what a clock measured."""
    return {
        "model": {path.name: path.read_bytes() for path in (run.path / "model").glob("*") if path.stem in WHICH},
        "metrics": [without_times(row) for row in run.metrics],
        "ledger": list(run.ledger),
    }


def serial(spec, clients):
    """The same run on one machine."""
    made = Experiment(replace(spec, clients=clients)).begin(None)
    made.go()
    return made.record


# -- the bits


METHODS = ["fedavg", "scaffold", "fedprox", "ditto", "fedbuff", "fedproto", "fedau", "fedgen", "fcp"]


@pytest.mark.parametrize("method", METHODS)
def test_three_clients_have_the_bits_of_serial(method, certificates, tmp_path):
    spec = spec_of(method)
    made = Federation(tmp_path, certificates).run(spec)
    assert difference(left(made.record), left(serial(spec, 3))) is None


def test_eight_clients_have_the_bits_of_serial(certificates, tmp_path):
    spec = spec_of("scaffold")
    made = Federation(tmp_path, certificates, 8).run(spec)
    assert difference(left(made.record), left(serial(spec, 8))) is None


@pytest.mark.nightly
@pytest.mark.parametrize("clients", [1, 8])
@pytest.mark.parametrize("method", METHODS)
def test_one_and_eight_clients_have_the_bits_of_serial(method, clients, certificates, tmp_path):
    spec = spec_of(method)
    made = Federation(tmp_path, certificates, clients).run(spec)
    assert difference(left(made.record), left(serial(spec, clients))) is None


def test_a_replay_has_the_bits_of_the_run(certificates, tmp_path):
    made = Federation(tmp_path, certificates).run(spec_of("scaffold"))
    again = replayed(made.record.path)
    again.go()
    assert difference(left(made.record), left(again.record)) is None


# -- kills


def killing(federation, name, moments, again):
    """Kills a process at each of these moments (seconds after the one before), and has it started again."""

    def go():
        for moment in moments:
            time.sleep(moment)
            if not federation.processes[name].is_alive():
                return
            federation.kill(name)
            again()

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    return thread


SLOW = spec_of("scaffold", rounds=30)
MOMENTS = [0.02 + 0.037 * place % 0.3 for place in range(20)]


def test_a_client_that_is_killed_twenty_times_changes_no_bit(certificates, tmp_path):
    federation = Federation(tmp_path, certificates)
    federation.start()
    thread = killing(federation, "b", MOMENTS, lambda: federation.start("b"))
    try:
        made = federation.serve(SLOW)
    finally:
        thread.join(30)
        federation.stop()
    assert difference(left(made.record), left(serial(SLOW, 3))) is None


def test_a_server_that_is_killed_twenty_times_changes_no_bit(certificates, tmp_path):
    Federation(tmp_path, certificates).run_through_kills(SLOW, [0.5 + moment for moment in MOMENTS])
    assert difference(left(Run(tmp_path / "run")), left(serial(SLOW, 3))) is None


# -- who comes late


def test_a_client_that_joins_late_takes_part_from_then_on(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, start=2)
    made = federation.run_with_late(spec_of("fedavg", rounds=60), "c", 3)
    replies = [row["replies"] for row in made.record.metrics]
    assert replies[:3] == [2, 2, 2] and replies[-1] == 3 and replies == sorted(replies)
    kept = json.loads((tmp_path / "run" / "deploy.json").read_text())
    assert set(kept["registered"]) == {"a", "b", "c"}
    again = replayed(made.record.path)
    again.go()
    assert left(again.record)["model"] == left(made.record)["model"]


def test_a_method_that_asks_everybody_first_waits_for_everybody(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, start=2)
    with pytest.raises(UsageError, match=r"rounds.start=2: .* asks all clients"):
        federation.serve(spec_of("feddisco"))
