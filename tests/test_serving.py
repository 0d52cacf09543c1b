"""A server before its first round, and when it is started again: what it takes up and refuses, whom it waits for."""

import json
import logging
import time
from contextlib import contextmanager

import pytest
from federation import Federation, spec_of

from fedloom.deploy.config import ServerConfig
from fedloom.deploy.hub import Hub
from fedloom.deploy.network import Network
from fedloom.deploy.offer import network_of
from fedloom.deploy.serve import FILE, Serving
from fedloom.errors import RunError, UsageError
from fedloom.runs.experiment import Experiment
from fedloom.tasks._apart import registration

SPEC = spec_of("fedavg", rounds=1)


@pytest.fixture
def there(certificates, tmp_path):
    """Gives servers of a folder that listen until the test is over."""
    made = []

    def serving(spec=SPEC, clients=3, **rounds):
        federation = Federation(tmp_path, certificates, clients, **rounds)
        made.append(Serving(spec, ServerConfig.read(federation.folder / "server.toml"), tmp_path / "run"))
        return made[-1]

    yield serving
    for one in made:
        if one.listening.thread.is_alive():
            one.close(False)


def register(serving, *names, **changes):
    """Clients come, with what they have in the run of `serving`."""
    network = network_of(Experiment(serving.spec, serving.task).site)
    for name in names:
        member = serving.hub.members[name]
        serving.hub.greet(member, name * 32)
        serving.hub.register(member, registration(serving.task, member.number) | network | changes)


def begun(serving, *names):
    register(serving, *(names or serving.hub.members))
    serving.gather(lambda missing: None)
    return serving.experiment()


def test_a_server_that_is_started_again_is_the_same_run_and_knows_who_registered(there):
    first = there()
    begun(first)
    again = there()
    assert again.name == first.name
    assert again.missing == []
    assert [one.registered for one in again.hub.by_number] == [one.registered for one in first.hub.by_number]
    assert not any(one.live for one in again.hub.by_number)
    again.experiment()
    assert all(one.live for one in again.hub.by_number)  # for a lease


def test_other_settings_are_refused_with_what_differs(there):
    begun(there())
    with pytest.raises(UsageError, match=r"run is a run with other settings \(.*rounds.*\); restore them, or give ano"):
        there(spec_of("fedavg", rounds=2))


@pytest.mark.parametrize("others", [("b", "a", "c"), ("a", "b", "d")])
def test_seats_stay_as_they_were(others, there, monkeypatch):
    begun(there())
    monkeypatch.setattr("federation.NAMES", others)
    with pytest.raises(
        UsageError, match=rf"begun with the clients a, b, c, and the .* list {', '.join(others)}; resto"
    ):
        there()


def test_a_spec_of_another_number_of_clients_is_refused(there):
    with pytest.raises(
        UsageError, match=r"^clients=4, and the server's settings list 3; leave clients out of the spec"
    ):
        there(spec_of("fedavg", clients=4))
    assert there(spec_of("fedavg", clients=3)).spec.clients == 3


def test_a_damaged_memory_is_told_and_a_run_of_another_kind_is_left_alone(there, tmp_path):
    begun(there())
    (tmp_path / "run" / FILE).write_text("{")
    with pytest.raises(RunError, match=r"deploy\.json is damaged .* restore it, or give another --out"):
        there()
    (tmp_path / "run" / FILE).unlink()
    with pytest.raises(UsageError, match="run"):
        there()


def test_a_run_begins_with_as_many_as_it_is_to_and_no_fewer(there):
    serving = there(start=2, patience=1)
    register(serving, "b")
    with pytest.raises(RunError, match=r"^a, c did not come within 1 seconds \(rounds\.patience\)"):
        serving.gather(lambda missing: None)
    register(serving, "c")
    serving.gather(lambda missing: None)
    assert serving.missing == ["a"]


def test_patience_begins_anew_when_one_more_has_come(there, monkeypatch):
    serving = there(patience=10)
    now, heard = [1000.0], []

    def watch(missing):
        heard.append(now[0])
        now[0] += 4
        if now[0] == 1008:
            register(serving, "b")
        if now[0] > 1050:
            register(serving, "a", "c")

    with monkeypatch.context() as patch:
        patch.setattr("fedloom.deploy.serve.time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
        with pytest.raises(RunError, match=r"^a, c did not come"):
            serving.gather(watch)
    assert heard == [1000, 1004, 1008, 1012, 1016, 1020]  # it was seen at 1012, and 1024 is more than ten behind


def test_one_that_declines_ends_the_wait(there):
    serving = there(patience=60)
    register(serving, "a")
    serving.hub.register(serving.hub.members["b"], None, "it has no rows")
    began = time.monotonic()
    with pytest.raises(RunError, match=r"^not all clients take part: b: it has no rows$"):
        serving.gather(lambda missing: None)
    assert time.monotonic() - began < 30


def test_networks_must_be_alike_and_other_initial_weights_are_said(there, caplog):
    serving = there()
    register(serving, "a", "b", layout="another")
    with pytest.raises(RunError, match=r"the network of client a is another one than the server's"):
        serving.experiment()
    register(serving, "a", "b")
    register(serving, "c", initial="0" * 64)
    with caplog.at_level(logging.WARNING, "fedloom.server"):
        serving.experiment()
    assert [line for line in caplog.messages if "draws other initial weights" in line] == [
        "client c draws other initial weights than the server: another torch or processor"
    ]


def test_who_comes_late_is_written_down(there, tmp_path):
    serving = there(start=2)
    register(serving, "a", "b")
    made = serving.experiment()
    assert {*json.loads((tmp_path / "run" / FILE).read_text())["registered"]} == {"a", "b"}
    register(serving, "c")
    made.engine.newcomer()
    assert {*json.loads((tmp_path / "run" / FILE).read_text())["registered"]} == {"a", "b", "c"}


@contextmanager
def finishing(monkeypatch):
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(Network, "notes", {})
        patch.setattr(Hub, "finish", lambda hub, patience, last: told.append(patience))
        yield told


def test_clients_hear_that_a_run_is_over_when_it_is(there, monkeypatch):
    with finishing(monkeypatch) as told:
        there().close(True)  # before it began
        serving = there()
        register(serving, "a", "b", "c")
        serving.experiment()
        serving.close(False)
        assert told == []
        serving = there()
        serving.experiment()
        serving.close(True)
        assert len(told) == 1
