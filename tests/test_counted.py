"""What crosses the server's sockets, byte for byte: against plain sockets, and against a line that counts."""

import contextlib
import socket

import pytest
from cutting import DOWN, UP, Stretch
from federation import Federation
from test_cutting import LARGE, MODEL

from fedloom.deploy.counted import Crossed, Listener
from fedloom.report.page import render
from fedloom.runs.record import Run

# A server that stops leaves connections that were just being made to the system.
pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@contextlib.contextmanager
def connected(listener):
    near = socket.create_connection(listener.getsockname())
    far, address = listener.accept()
    with near, far:
        yield near, far, address


@pytest.fixture
def listener():
    with Listener.of(socket.create_server(("127.0.0.1", 0))) as made:
        yield made


def test_every_way_to_send_and_to_receive_counts(listener):
    with connected(listener) as (near, far, _):
        near.sendall(b"x" * 100)
        assert far.recv(10) == b"x" * 10
        assert far.recv_into(bytearray(50)) == 50
        assert far.recv_into(bytearray(50), 30) == 30
        assert far.crossed == Crossed(90, 0)
        assert far.send(b"y" * 7) == 7
        assert far.sendmsg([b"z" * 3, b"z" * 2]) == 5
        assert far.crossed == Crossed(90, 12)


def test_connections_of_one_peer_count_together_from_their_first_byte(listener):
    peer, other = Crossed(), Crossed()
    with connected(listener) as (near, far, at), connected(listener) as (close, distant, there):
        near.sendall(b"x" * 5)
        far.recv(5)
        far.send(b"yy")
        listener.belongs(at, peer)
        listener.belongs(at, peer)
        assert peer == Crossed(5, 2)
        close.sendall(b"x" * 4)
        distant.recv(4)
        listener.belongs(there, peer)
        far.send(b"y")
        assert peer == Crossed(9, 3)
        listener.belongs(("127.0.0.1", 1), other)
        listener.belongs(None, other)
        assert other == Crossed()


def test_connections_that_are_over_are_forgotten(listener):
    for _ in range(3):
        with connected(listener) as (_, far, _):
            pass
    del far
    assert len(listener.connections) == 0


WORDS = (b"MHM\x01\x88\xa5reply", b"X-Session", b"/v1/work", b"HTTP/1.1", b"octet-stream")  # of messages and requests


def test_the_servers_count_is_what_passed_on_the_line_and_nothing_passed_in_clear(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, lease=30)
    with contextlib.ExitStack() as open_:
        stretches = {name: open_.enter_context(Stretch(federation.port)) for name in federation.names}
        federation.through = {name: one.port for name, one in stretches.items()}
        seen = []
        for one in stretches.values():
            one.tap = lambda direction, piece: seen.append(piece)
        made = federation.run(LARGE)
    told = {one["name"]: one for one in made.record.manifest["network"]}
    for name, one in stretches.items():
        for direction, models in ((UP, 4), (DOWN, 5)):
            passed, wire, payload = one.passed[direction], told[name][f"wire_{direction}"], told[name][direction]
            assert abs(wire - passed) < 0.02 * passed
            assert models * MODEL < payload < wire < 1.05 * payload
    assert sum(map(len, seen)) == sum(sum(one.passed.values()) for one in stretches.values())
    assert not [word for word in WORDS if any(word in piece for piece in seen)]
    page = render(Run(made.record.path))
    assert "up, on the wire" in page
    assert all(f"<td>{told['b'][f'wire_{way}'] / 1e6:.1f} MB</td>" in page for way in (UP, DOWN))


def test_a_record_without_wire_bytes_is_shown_without(certificates, tmp_path):
    made = Federation(tmp_path, certificates).run(LARGE)
    path = made.record.path / "manifest.json"
    text = path.read_text()
    assert '"wire_up"' in text
    path.write_text(text.replace('"wire_up"', '"_up"').replace('"wire_down"', '"_down"'))
    assert "<td></td><td></td>" in render(Run(made.record.path))
