"""A line that is slow, late and loses: what is large takes as long as it takes, and only what stands still is given up.

A minute of the library is a second here, and the line is sixty times as fast as the one that it stands for: 0.7 MB a
second for 12 kB (0.1 Mbit) a second, 5 ms for 300 ms, and a twentieth of all pieces comes 50 ms late, for 3 s.
"""

import contextlib
import logging
import threading
import time
from concurrent.futures import CancelledError

import pytest
from cutting import DOWN, UP, Stretch
from test_routes import SESSION, Server, Whole

from fedloom.deploy import line as lines
from fedloom.deploy.agent import Beats
from fedloom.deploy.line import Line
from fedloom.deploy.parcels import Parcels
from fedloom.deploy.tls import client_context
from fedloom.engines.wired import name_of
from fedloom.random import numpy_stream

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

MINUTE = 1.0  # seconds, and the lease
LARGE = 3_500_000  # bytes, which take five such minutes


@pytest.fixture
def slow(certificates, tmp_path, monkeypatch, caplog):
    """A server, a client's end of a slow line to it, and that line."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(lines, "STILL", MINUTE)
    server = Server(certificates, tmp_path, lease=MINUTE)
    server.listening.limit = 2 * LARGE
    with Stretch(server.listening.port) as stretch:
        stretch.rate, stretch.delay, stretch.lost = 700_000, 0.005, 0.05
        there = Line(("localhost", stretch.port), client_context(certificates / "a"), None)
        there.session = SESSION["a"]
        there.ask("/v1/hello", {"fedloom": "", "session": SESSION["a"]})
        yield server, there, stretch
        there.close()
    server.listening.stop()


def large():
    return numpy_stream(4, "large").bytes(LARGE)


def took(what, there, id):
    """Seconds of a transfer, through which the client gives its signs of life."""
    began = time.monotonic()
    with Beats(there, MINUTE / 4) as beats, beats.during(id):
        what()
    return time.monotonic() - began


def to_answer(server, folder):
    """What a client is asked, its large answer, and the folder that has it."""
    request, answer, outbox = server.request(0), large(), Parcels(folder / "outbox", "")
    server.hub.send(request)
    server.still()
    outbox.put(request.id, answer)
    return request, answer, outbox


def test_a_large_answer_takes_longer_than_every_limit_and_is_sent_once(slow, tmp_path, caplog):
    server, there, stretch = slow
    request, answer, outbox = to_answer(server, tmp_path)
    before = stretch.passed[UP]
    assert took(lambda: there.deliver(request.id, outbox), there, request.id) > 3.5 * MINUTE
    assert bytes(server.hub.answer(request.id)) == answer
    assert stretch.passed[UP] - before < 1.02 * LARGE
    assert "sign of life" not in caplog.text and "trying again" not in caplog.text


def test_a_large_message_takes_longer_than_every_limit_and_is_sent_once(slow, tmp_path, caplog):
    server, there, stretch = slow
    part = Whole(large())
    name = name_of(part)
    request = server.request(0, blobs={name: part})
    server.hub.send(request)
    server.still()
    parts = Parcels(tmp_path / "parts", "")
    before = stretch.passed[DOWN]
    assert took(lambda: there.fetch(name, parts), there, request.id) > 3.5 * MINUTE
    assert bytes(parts.read(name)) == part
    assert stretch.passed[DOWN] - before < 1.02 * LARGE
    assert "sign of life" not in caplog.text and "trying again" not in caplog.text


def test_a_connection_that_stands_still_is_left_and_the_answer_goes_on_where_it_was(slow, tmp_path, caplog):
    server, there, stretch = slow
    request, answer, outbox = to_answer(server, tmp_path)
    before = stretch.passed[UP]
    # That of the answer: signs of life have another one.
    threading.Timer(1.5 * MINUTE, lambda: stretch.held.add(max(stretch.by, key=stretch.by.get))).start()
    ended = []

    def deliver():
        with contextlib.suppress(CancelledError):
            ended.append(took(lambda: there.deliver(request.id, outbox), there, request.id))

    thread = threading.Thread(target=deliver, daemon=True)
    thread.start()
    thread.join(15)
    assert ended and len(stretch.held) == 1
    stretch.held.clear()  # what it was left with is let go
    time.sleep(1.0)
    assert bytes(server.hub.answer(request.id)) == answer
    assert stretch.passed[UP] - before < 1.3 * LARGE
    assert "sign of life" not in caplog.text
