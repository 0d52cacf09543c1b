"""`fedloom server` and `fedloom client` as they are typed: stopped by Ctrl-C, taken up, and what each side says."""

import re
import signal

import pytest
from federation import Federation, spec_of
from test_deploy import left, serial
from test_remote import difference

import fedloom.deploy.offer
from fedloom.cli import main
from fedloom.cli.progress import Doing, Watch
from fedloom.runs.record import Run
from fedloom.runs.writing import hold

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

SPEC = spec_of("scaffold", rounds=4)


@pytest.fixture
def federation(certificates, tmp_path):
    made = Federation(tmp_path, certificates, 2, lease=20)
    (tmp_path / "spec.yaml").write_text("method: scaffold\ndata: digits\nrounds: 4\n")
    yield made
    made.stop()


def server(federation):
    at = federation.folder
    return main(["server", str(at / "spec.yaml"), "--config", str(at / "server.toml"), "--out", str(at / "run")])


def client(federation, name):
    return main(["client", "--config", str(federation.config_of(name))])


def same_bits(federation):
    return difference(left(Run(federation.folder / "run")), left(serial(SPEC, 2))) is None


def test_a_stopped_server_says_how_to_go_on_and_goes_on(federation, capsys, monkeypatch):
    told = Watch.__call__

    def stopping(watch, row):
        told(watch, row)
        if row["round"] == 2:
            signal.raise_signal(signal.SIGINT)

    federation.start()
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "__call__", stopping)
        assert server(federation) == 130
    again = r"fedloom server \S+spec.yaml --config \S+server.toml --out \S+run"
    assert re.fullmatch(rf"fedloom: stopped after round 2 of 4; go on with: {again}\n", capsys.readouterr().err)
    assert server(federation) == 0
    assert set(federation.codes().values()) == {0}
    assert same_bits(federation)


def test_a_stopped_client_says_how_to_go_on_and_goes_on(federation, capsys, monkeypatch):
    told = Doing.__call__

    def stopping(doing, what, round=None, rounds=None):
        told(doing, what, round, rounds)
        if round == 2:
            signal.raise_signal(signal.SIGINT)

    federation.start("a")
    federation.start_server(SPEC)
    with monkeypatch.context() as patch:
        patch.setattr(Doing, "__call__", stopping)
        assert client(federation, "b") == 130
    says = r"fedloom: stopped; go on with: fedloom client --config \S+b.toml\n"
    assert re.fullmatch(says, capsys.readouterr().err.splitlines(keepends=True)[-1])
    assert client(federation, "b") == 0
    assert "the run is over" in capsys.readouterr().out
    federation.processes["server"].join(60)
    assert federation.processes["server"].exitcode == 0
    assert same_bits(federation)


def test_another_version_is_said_at_both_sides(federation, capsys, monkeypatch):
    monkeypatch.setattr(fedloom.deploy.offer, "__version__", "9.9")  # of this process, which is the server
    federation.start("a")
    assert server(federation) == 1
    why = r"the server has fedloom 9\.9, and this client has \S+; install the same version on both sides"
    assert re.search(rf"^fedloom: error: not all clients take part: a: {why}$", capsys.readouterr().err, re.MULTILINE)
    federation.processes["a"].join(20)
    assert re.search(why, federation.log("a"))
    assert not (federation.folder / "run").exists()


def test_another_text_of_the_method_is_said_at_both_sides(federation, capsys, monkeypatch):
    digests = fedloom.deploy.offer.digests
    monkeypatch.setattr(fedloom.deploy.offer, "digests", lambda method: dict.fromkeys(digests(method), "0" * 32))
    federation.start("a")
    assert server(federation) == 1
    why = "the method scaffold has another text at the server than here"
    assert f"fedloom: error: not all clients take part: a: {why}" in capsys.readouterr().err
    federation.processes["a"].join(20)
    assert why in federation.log("a")
    assert not (federation.folder / "run").exists()


def test_a_state_that_another_client_uses_is_refused_in_one_line(federation, capsys):
    held = federation.folder / "state-a"
    held.mkdir()
    with hold(held):
        assert client(federation, "a") == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"fedloom: error: \S+state-a is still running in another process; stop that one first\n", said)
