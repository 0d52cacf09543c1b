"""The server's connections, in a thread of their own: HTTP over TLS, six routes and nothing else.

POST /v1/hello       a session, new or to go on with        ->  number, lease, the run and its offer
POST /v1/consent     what a client tells of its data, or why it does not take part
POST /v1/work        perhaps a small answer; waits          ->  a request, that the run is over, or 204
GET  /v1/blob/NAME   part of a message, from a byte on
PUT  /v1/reply/ID    part of an answer, from a byte on; HEAD tells from which
POST /v1/beat        a sign of life during work; that a client leaves
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fedloom import encoding
from fedloom.deploy.counted import Listener
from fedloom.deploy.hub import Hub, Member
from fedloom.deploy.parcels import PIECE
from fedloom.deploy.tls import peer_of
from fedloom.errors import CodecError, RunError, TakenError, Untrusted, UsageError
from fedloom.tasks._apart import checked

try:
    from aiohttp import web
except ModuleNotFoundError:
    raise UsageError('a run between machines needs the extra: pip install "fedloom[net]"') from None

log = logging.getLogger("fedloom.server")

BODY = 1 << 20  # bytes of a request's body, but for a part of an answer
GONE = (410, "nobody waits for this answer any more")
WAIT = 25.0  # seconds that a question for work waits: less than what middleboxes allow a silent connection

Handler = Callable[[web.Request, Member], Coroutine[Any, Any, web.StreamResponse]]


class Listening:
    """Listens from when it is made until it is stopped, at `port`; raises UsageError where it cannot.

    `offer` is what hello tells of the run; answers have `limit` bytes at most.
    """

    def __init__(
        self, hub: Hub, context: ssl.SSLContext, at: tuple[str, int], offer: Mapping[str, Any], limit: int
    ) -> None:
        self.hub, self.offer, self.limit = hub, offer, limit
        try:
            listening = Listener.of(socket.create_server(at, backlog=1024))
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else error
            raise UsageError(
                f"cannot listen at {at[0]}:{at[1]} ({why}); stop what uses this port, or give another one "
                "as listen in the server's settings"
            ) from error
        self.port: int = listening.getsockname()[1]
        self.listener = listening
        ready = threading.Event()
        self.thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(context, listening, ready)), name="connections", daemon=True
        )
        self.thread.start()
        ready.wait()

    def stop(self) -> None:
        """Listens no more."""
        self.loop.call_soon_threadsafe(self.closing.set)
        self.thread.join(10.0)

    async def _serve(self, context: ssl.SSLContext, listening: socket.socket, ready: threading.Event) -> None:
        self.loop, self.closing = asyncio.get_running_loop(), asyncio.Event()
        self.hub.soon = self.loop.call_soon_threadsafe
        self.loop.set_exception_handler(_told_in_a_line)
        app = web.Application(client_max_size=BODY)
        app.add_routes(
            [
                web.post("/v1/hello", self._known(self._hello, sworn=False)),
                web.post("/v1/consent", self._known(self._consent)),
                web.post("/v1/work", self._known(self._work)),
                web.get("/v1/blob/{name}", self._known(self._blob), allow_head=False),
                web.head("/v1/reply/{id}", self._known(self._offset)),
                web.put("/v1/reply/{id}", self._known(self._reply)),
                web.post("/v1/beat", self._known(self._beat)),
            ]
        )
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=3 * WAIT, shutdown_timeout=1.0)
        await runner.setup()
        await web.SockSite(runner, listening, ssl_context=context, backlog=1024).start()
        watching = asyncio.create_task(self.hub.watch())
        ready.set()
        await self.closing.wait()
        watching.cancel()
        await _closed(runner)

    def _known(self, handle: Handler, sworn: bool = True) -> Callable[[web.Request], Any]:
        """A handler that knows who asks: by the certificate and, where it is `sworn`, by the key of the session."""

        async def handled(request: web.Request) -> web.StreamResponse:
            try:
                tls = request.transport.get_extra_info("ssl_object") if request.transport else None
                name = peer_of(tls.getpeercert() if tls else None, "client").identity.name
                if name not in self.hub.members:
                    raise Untrusted(f"the client {name} has no seat here; those that have are listed at the server")
                member = self.hub.members[name]
                self.listener.belongs(request.transport and request.transport.get_extra_info("peername"), member.wire)
                told = request.headers.get("X-Session", "")
                if sworn and not (member.session and secrets.compare_digest(told, member.session)):
                    return _problem(409, "another session has taken over, or the server was started again: say hello")
                if sworn:
                    self.hub.sign(member)
                return await handle(request, member)
            except (ConnectionError, web.RequestPayloadError):  # which the client comes back from
                return _problem(400, "the connection was lost")
            except TakenError as error:
                return _problem(423, str(error))
            except Untrusted as error:
                log.warning("%s", error)
                return _problem(403, str(error))
            except RunError as error:  # of the disk, which somebody can mend meanwhile: clients try again
                log.warning("%s", error)
                return _problem(503, str(error))
            except (CodecError, UsageError, KeyError, ValueError, TypeError) as error:
                log.warning("%s: what came is no request: %s", request.path, error)
                return _problem(400, str(error))

        return handled

    async def _hello(self, request: web.Request, member: Member) -> web.StreamResponse:
        told = encoding.decode(await request.read())
        self.hub.greet(member, str(told["session"]))
        log.info("client %s is there", member.name)
        own = {"number": member.number, "lease": self.hub.lease, "over": self.hub.over}
        return _message(own | {"registered": member.registered is not None} | dict(self.offer))

    async def _consent(self, request: web.Request, member: Member) -> web.StreamResponse:
        told: Any = encoding.decode(await request.read())
        why = str(told["why"])[:500]
        self.hub.register(member, checked(told["registration"]) if told["accepts"] else None, why)
        if not told["accepts"]:
            log.warning("client %s does not take part: %s", member.name, why)
        return _message({})

    async def _work(self, request: web.Request, member: Member) -> web.StreamResponse:
        if body := await request.read():
            id = bytes.fromhex(request.headers["X-Answer"])
            member.up += len(body)
            if id in member.open and len(body) > self.limit:
                self._too_large(member, id, len(body))
            elif id in member.open:
                self.hub.take(id, body)
                self.hub.came(member, id)
        until = time.monotonic() + min(WAIT, float(request.query["wait"]))
        while not member.open and not self.hub.over and (left := until - time.monotonic()) > 0:
            member.wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(member.wake.wait(), left)
        if member.open:
            asked = next(iter(member.open.values()))
            member.down += len(asked.head)
            return _message({"head": asked.head, "note": dict(asked.note)})
        if self.hub.over:
            member.told = True
            return _message({"over": True, "note": dict(self.hub.last.get(member.number, {}))})
        return web.Response(status=204)

    async def _blob(self, request: web.Request, member: Member) -> web.StreamResponse:
        name = bytes.fromhex(request.match_info["name"])
        if name not in self.hub.blobs:
            return _problem(410, "no message that anybody waits for has this part")
        whole = self.hub.blobs[name]
        begin = request.http_range.start or 0
        if not 0 <= begin <= len(whole):
            return _problem(416, f"this part has {len(whole)} bytes")
        answer = web.StreamResponse(status=206 if begin else 200, headers={"X-Length": str(len(whole))})
        answer.content_length = len(whole) - begin
        await answer.prepare(request)
        for at in range(begin, len(whole), PIECE):
            piece = whole.read(at, PIECE)
            await answer.write(piece)
            member.down += len(piece)
            self.hub.sign(member)
        return answer

    async def _offset(self, request: web.Request, member: Member) -> web.StreamResponse:
        id = bytes.fromhex(request.match_info["id"])
        if self.hub.has(id):
            return web.Response(headers={"X-Done": "yes"})
        if id not in member.open or self.hub.inbox is None:
            return web.Response(status=410)
        return web.Response(headers={"X-Offset": str(self.hub.inbox.come(id))})

    async def _reply(self, request: web.Request, member: Member) -> web.StreamResponse:
        id, digest = bytes.fromhex(request.match_info["id"]), bytes.fromhex(request.headers["X-Digest"])
        length, offset = int(request.headers["X-Length"]), int(request.headers["X-Offset"])
        inbox = self.hub.inbox
        if self.hub.has(id):
            return _message({"done": True})
        if id not in member.open or inbox is None:
            return _problem(*GONE)
        if not 0 < length <= self.limit:
            return self._too_large(member, id, length)
        if offset != (come := inbox.come(id)):
            return _problem(416, f"a piece at {offset}, where {come} bytes have come")
        async for piece in request.content.iter_any():
            if id not in member.open:
                return _problem(*GONE)
            if offset + len(piece) > length:
                raise CodecError(f"more came than the {length} bytes that were announced")
            if offset != (come := inbox.come(id)):  # another connection of this client was quicker
                return _problem(416, f"a piece at {offset}, where {come} bytes have come")
            inbox.add(id, offset, piece)
            offset += len(piece)
            member.up += len(piece)
            self.hub.sign(member)
        if id not in member.open:
            return _problem(*GONE)
        if offset < length:
            return _message({"done": False})
        try:
            inbox.close(id, digest)
        except CodecError as error:
            log.warning("client %s: %s", member.name, error)
            return _problem(416, str(error))
        self.hub.came(member, id)
        return _message({"done": True})

    def _too_large(self, member: Member, id: bytes, length: int) -> web.Response:
        why = f"an answer of {length} bytes, and reply_bytes = {self.limit} are allowed by the server's settings"
        self.hub.refuse(member, id, why)
        return _problem(413, why)

    async def _beat(self, request: web.Request, member: Member) -> web.StreamResponse:
        told = encoding.decode(await request.read())
        if told["leaves"]:
            log.info("client %s has left", member.name)
            self.hub.leave(member)
        return _message({"wanted": told["call"] in member.open, "over": self.hub.over})


def _told_in_a_line(loop: asyncio.AbstractEventLoop, told: Mapping[str, Any]) -> None:
    """Logs what went wrong beside any request, without a traceback.

    To format one parses source (Python 3.11), which must not happen here while the run's thread parses a method's.
    """
    log.info("%s", told.get("exception") or told["message"])


async def _closed(runner: web.AppRunner) -> None:
    """Lets all connections go, also those that would wait for their clients to say goodbye."""
    still = [one.transport for one in runner.server.connections if one.transport] if runner.server else []
    await runner.cleanup()
    for transport in still:
        transport.abort()
    await asyncio.sleep(0.05)  # in which connections close that were about to


def _message(fields: Mapping[str, Any]) -> web.Response:
    return web.Response(body=encoding.encode(fields), content_type="application/octet-stream")


def _problem(status: int, why: str) -> web.Response:
    return web.Response(status=status, text=why)
