"""The routes of a server: who may use them for what, and what becomes of anything else that comes."""

import http.client
import logging
import os
import ssl
import threading
import time

import pytest

from fedloom import encoding
from fedloom.deploy.hub import Hub
from fedloom.deploy.line import Line, SessionOver, Withdrawn
from fedloom.deploy.listening import Listening
from fedloom.deploy.parcels import PIECE, Parcels
from fedloom.deploy.tls import client_context, server_context
from fedloom.engines import wired
from fedloom.engines.wired import Request, name_of
from fedloom.errors import TakenError, Untrusted, UsageError
from fedloom.random import numpy_stream

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

LIMIT = 1 << 22
SESSION = {"a": "a" * 32, "b": "b" * 32}


class Whole(bytes):
    """Bytes that are read as those of a message."""

    def read(self, start, size):
        return bytes(self[start : start + size])


class Server:
    """A hub of two clients, a and b, that listens; `asked` is what they have to do."""

    def __init__(self, certificates, folder, lease=30.0):
        self.hub = Hub(["a", "b"], lease)
        self.certificates = certificates
        context = server_context(certificates / "server")
        self.listening = Listening(self.hub, context, ("127.0.0.1", 0), {"run": b"run", "offer": {}}, LIMIT)
        self.hub.open_inbox(folder / "inbox")

    def line(self, name):
        return Line(("localhost", self.listening.port), client_context(self.certificates / name), None)

    def request(self, client, text=b"head", blobs=None):
        head = encoding.encode({"what": text, "who": client})
        return Request(client, name_of(head), head, {}, blobs or {}, ("train", 1, 0), "call", "local")

    def raw(self, name, method, path, body=b"", headers=None, session=None):
        """Status and body of an answer, by the standard library."""
        context = client_context(self.certificates / name)
        told = {"X-Session": SESSION[name] if session is None else session} | (headers or {})
        there = http.client.HTTPSConnection("localhost", self.listening.port, context=context, timeout=20)
        try:
            there.request(method, path, body, told)
            answer = there.getresponse()
            return answer.status, answer.read()
        finally:
            there.close()

    def hello(self, name):
        body = encoding.encode({"session": SESSION[name]})
        assert self.raw(name, "POST", "/v1/hello", body)[0] == 200

    def still(self):
        """What was given to the other thread is done there."""
        done = threading.Event()
        self.hub.soon(done.set)
        assert done.wait(5)


@pytest.fixture
def server(certificates, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    made = Server(certificates, tmp_path)
    yield made
    made.listening.stop()
    assert "Traceback" not in caplog.text
    assert "Error handling request" not in caplog.text


@pytest.fixture
def line(server):
    made = server.line("a")
    made.session = SESSION["a"]
    made.ask("/v1/hello", {"session": SESSION["a"]})
    yield made
    made.close()


ROUTES = [
    ("POST", "/v1/consent"),
    ("POST", "/v1/work?wait=0"),
    ("GET", "/v1/blob/" + "00" * 32),
    ("HEAD", "/v1/reply/" + "00" * 32),
    ("PUT", "/v1/reply/" + "00" * 32),
    ("POST", "/v1/beat"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "session", ["", "-", "b" * 32, "a" * 31, "ä" * 32], ids=["none", "dash", "other", "short", "odd"]
)
def test_without_its_session_a_client_gets_nowhere(method, path, session, server):
    server.hello("b")
    status, why = server.raw("a", method, path, session=session)  # before its hello
    assert status in (409, 400 if not session.isascii() else 409)
    server.hello("a")
    status, why = server.raw("a", method, path, session=session)
    assert status in (409, 400 if not session.isascii() else 409)
    if method != "HEAD" and status == 409:
        assert b"another session has taken over, or the server was started again: say hello" in why
    assert not server.hub.arrived.qsize() > 2  # the two that came


def test_a_client_without_a_seat_is_turned_away(server, caplog):
    line = server.line("c")
    line.session = "c" * 32
    with pytest.raises(Untrusted, match="the client c has no seat here; those that have are listed at the server"):
        line.ask("/v1/hello", {"session": "c" * 32})
    line.close()
    assert "the client c has no seat here" in caplog.text


def test_a_second_session_is_refused_while_the_first_lives(server, line):
    other = server.line("a")
    other.session = "x" * 32
    with pytest.raises(TakenError, match="the client a is connected already, from elsewhere; stop that one, or wait"):
        other.ask("/v1/hello", {"session": "x" * 32})
    server.hub.members["a"].until = 0.0
    other.ask("/v1/hello", {"session": "x" * 32})
    other.close()
    with pytest.raises(SessionOver, match="another session has taken over"):
        line.work(0.0, None)


def test_an_answer_travels_in_parts_and_is_there_once(server, line, tmp_path):
    asked = server.request(0)
    server.hub.send(asked)
    assert line.work(5.0, None)["head"] == asked.head
    there, body = Parcels(tmp_path / "there", ""), os.urandom(3 * PIECE + 5)
    there.put(asked.id, body)
    line.deliver(asked.id, there)
    line.deliver(asked.id, there)
    assert bytes(server.hub.answer(asked.id)) == body
    assert [one for one in iter(lambda: server.hub.arrived.get(timeout=0.1), asked) if one] == []
    assert server.hub.members["a"].up == len(body)


def test_a_part_of_a_message_goes_on_where_it_was_cut(server, line, tmp_path):
    body = Whole(os.urandom(3 * PIECE + 5))
    name = name_of(body)
    server.hub.send(server.request(0, blobs={name: body}))
    there = Parcels(tmp_path / "there", "")
    there.add(name, 0, body[: 2 * PIECE])
    line.fetch(name, there)
    assert bytes(there.read(name)) == body
    until = time.monotonic() + 5
    while server.hub.members["a"].down < PIECE + 5 and time.monotonic() < until:
        time.sleep(0.01)  # it is counted when it is sent
    assert server.hub.members["a"].down == PIECE + 5


@pytest.mark.parametrize("kept", [b"x" * 10, b"x" * (PIECE + 5), b"x" * (2 * PIECE)], ids=["some", "all", "too much"])
def test_a_part_that_is_no_part_of_it_is_fetched_again(kept, server, line, tmp_path):
    body = Whole(os.urandom(PIECE + 5))
    name = name_of(body)
    server.hub.send(server.request(0, blobs={name: body}))
    there = Parcels(tmp_path / "there", "")
    there.add(name, 0, kept)
    line.fetch(name, there)
    assert bytes(there.read(name)) == body


def test_what_nobody_waits_for_is_withdrawn(server, line, tmp_path):
    there = Parcels(tmp_path / "there", "")
    there.put(b"0" * 32, b"x" * 100)
    with pytest.raises(Withdrawn):
        line.fetch(b"1" * 32, there)
    with pytest.raises(Withdrawn):
        line.deliver(b"0" * 32, there)


def put(server, name, request, body, offset=0, length=None, digest=None):
    headers = {
        "X-Length": str(len(body) if length is None else length),
        "X-Offset": str(offset),
        "X-Digest": (name_of(body) if digest is None else digest).hex(),
    }
    return server.raw(name, "PUT", f"/v1/reply/{request.id.hex()}", body, headers)


def test_no_client_answers_for_another(server):
    server.hello("a")
    server.hello("b")
    asked = server.request(1)
    server.hub.send(asked)
    assert put(server, "a", asked, b"forged")[0] == 410
    assert put(server, "a", asked, b"forged", length=LIMIT + 1)[0] == 410  # and not that b's answer is too large
    headers = {"X-Answer": asked.id.hex()}
    assert server.raw("a", "POST", "/v1/work?wait=0", b"forged", headers)[0] == 204
    assert not server.hub.has(asked.id)
    assert put(server, "b", asked, b"mine")[0] == 200
    assert put(server, "a", asked, b"forged")[0] == 200  # which says that it is there, and takes nothing
    assert bytes(server.hub.answer(asked.id)) == b"mine"


def test_a_piece_at_a_wrong_place_and_a_wrong_digest_are_asked_for_again(server):
    server.hello("a")
    asked = server.request(0)
    server.hub.send(asked)
    assert put(server, "a", asked, b"later", offset=3, length=10)[0] == 416
    assert put(server, "a", asked, b"", offset=3, length=10)[0] == 416
    assert put(server, "a", asked, b"first", length=10)[0] == 200
    status, why = put(server, "a", asked, b"again", length=10)
    assert (status, why) == (416, b"a piece at 0, where 5 bytes have come")
    status, why = put(server, "a", asked, b"other", offset=5, length=10, digest=name_of(b"firstrest!"))
    assert (status, b"another digest" in why, server.hub.has(asked.id)) == (416, True, False)
    assert put(server, "a", asked, b"more than told", length=5)[0] == 400
    assert server.hub.inbox.come(asked.id) == 0


@pytest.mark.parametrize("by", ["parts", "with the question"])
def test_an_answer_that_is_too_large_has_failed(by, server, line, tmp_path, caplog):
    asked = server.request(0)
    server.hub.send(asked)
    if by == "parts":
        there = Parcels(tmp_path / "there", "")
        there.put(asked.id, b"x" * (LIMIT + 1))
        with pytest.raises(Withdrawn, match=f"an answer of {LIMIT + 1} bytes, and reply_bytes = {LIMIT} are allowed"):
            line.deliver(asked.id, there)
    else:
        server.listening.limit = 10
        line.work(0.0, (asked.id, b"x" * 11))
    assert "reply_bytes" in wired.decode(server.hub.answer(asked.id))["fault"]
    assert line.work(0.0, None) is None, "it is not asked for again"
    assert "client a: an answer of" in caplog.text


def test_a_full_disk_at_the_server_is_said_and_waited_for(server, line, tmp_path, caplog, full_disk):
    asked = server.request(0)
    server.hub.send(asked)
    there = Parcels(tmp_path / "there", "")
    there.put(asked.id, b"x" * PIECE)
    with full_disk(f"{asked.id.hex()}.part"):
        line.deliver(asked.id, there)
    assert bytes(server.hub.answer(asked.id)) == b"x" * PIECE
    other = server.request(0, b"other")
    server.hub.send(other)
    with full_disk(f"{other.id.hex()}.part"):
        status, why = put(server, "a", other, b"some")
    assert (status, b"is full; free some space" in why) == (503, True)
    assert "is full; free some space, then: the server goes on by itself" in caplog.text


def test_nothing_moves_and_it_is_tried_again(server, line, tmp_path, monkeypatch):
    from fedloom.deploy import line as module

    monkeypatch.setattr(module, "STILL", 0.4)
    asked = server.request(0)
    server.hub.send(asked)
    there = Parcels(tmp_path / "there", "")
    there.put(asked.id, os.urandom(2 * PIECE))
    answered, held = server.listening.hub.inbox.add, []

    def still(*about):
        if not held:
            held.append(1)
            time.sleep(1.2)  # the whole server, and so the line
        answered(*about)

    monkeypatch.setattr(server.hub.inbox, "add", still)
    line.deliver(asked.id, there)
    assert server.hub.has(asked.id)


def test_garbage_on_every_route_leaves_the_server_as_it_was(server, line):
    draw = numpy_stream(3, "garbage")
    server.hello("b")
    asked = server.request(0)
    server.hub.send(asked)
    good = encoding.encode(
        {"session": "b" * 32, "accepts": True, "why": "", "registration": {}, "call": b"x", "leaves": False}
    )
    context = client_context(server.certificates / "b")
    there = http.client.HTTPSConnection("localhost", server.listening.port, context=context, timeout=20)
    headers = ["X-Answer", "X-Length", "X-Offset", "X-Digest", "Range"]
    values = ["", "-1", "nan", "9" * 30, "zz", "00" * 32, "bytes=5-1", "bytes=-9", asked.id.hex(), "0", "5"]
    paths = [path for _, path in ROUTES] + [
        "/v1/hello",
        "/v1/work",
        "/v1/work?wait=soon",
        "/v1/blob/zz",
        "/v1/reply/0",
        "/",
    ]
    statuses = set()
    for _ in range(400):
        body = draw.bytes(int(draw.integers(40))) if draw.random() < 0.3 else mutated(draw, good)
        told = {name: values[draw.integers(len(values))] for name in headers if draw.random() < 0.4}
        method = ("POST", "POST", "POST", "POST", "PUT", "GET", "DELETE", "HEAD")[draw.integers(8)]
        path = paths[draw.integers(len(paths))]
        try:
            there.request(method, path, body, {"X-Session": SESSION["b"], **told})
            answer = there.getresponse()
            statuses.add(answer.status)
            answer.read()
        except (http.client.HTTPException, OSError, ssl.SSLError):
            there.close()
    there.close()
    assert not {status for status in statuses if status >= 500}
    assert {200, 204, 400, 404, 405, 410} <= statuses
    assert line.work(5.0, None)["head"] == asked.head
    line.work(0.0, (asked.id, b"answer"))
    assert bytes(server.hub.answer(asked.id)) == b"answer"


def mutated(draw, body):
    body = bytearray(body)
    for _ in range(int(draw.integers(3))):
        body[draw.integers(len(body))] = draw.integers(256)
    return bytes(body[: int(draw.integers(1, len(body) + 1))] if draw.random() < 0.3 else body)


def test_work_is_waited_for_and_ends_when_the_run_is_over(server, line):
    threading.Timer(0.2, lambda: server.hub.send(server.request(0))).start()
    assert line.work(10.0, None)["head"]
    assert line.ask("/v1/beat", {"call": server.request(0).id, "leaves": False}) == {"wanted": True, "over": False}
    server.hub.withdraw([server.request(0)])
    assert line.ask("/v1/beat", {"call": server.request(0).id, "leaves": False}) == {"wanted": False, "over": False}
    threading.Thread(target=lambda: server.hub.finish(5.0, {0: {"round": 3, "keep": []}}), daemon=True).start()
    assert line.work(10.0, None) == {"over": True, "note": {"round": 3, "keep": []}}
    assert server.hub.members["a"].told


def test_who_leaves_is_not_waited_for(server, line):
    line.ask("/v1/beat", {"call": None, "leaves": True})
    member = server.hub.members["a"]
    assert (member.left, member.live) == (True, False)
    line.ask("/v1/hello", {"session": SESSION["a"]})
    assert (member.left, member.live) == (False, True)


def test_a_port_in_use_is_said(server, certificates):
    at = ("127.0.0.1", server.listening.port)
    context = server_context(certificates / "server")
    with pytest.raises(UsageError, match=rf"cannot listen at 127.0.0.1:{at[1]} \(.*in use\); stop what uses this port"):
        Listening(server.hub, context, at, {}, LIMIT)
