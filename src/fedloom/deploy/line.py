"""The client's end of the line: requests, tried again until they are through, each from the byte that was reached."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, TypeVar

from fedloom import encoding
from fedloom.deploy.counted import Crossed, Socket
from fedloom.deploy.faults import explained
from fedloom.deploy.parcels import PIECE, Parcels, digest_of
from fedloom.deploy.proxy import AWAY, Closed, Proxy, reason_of
from fedloom.deploy.tls import server_reached
from fedloom.errors import CodecError, RunError, TakenError, Untrusted, UsageError

try:
    import aiohttp
except ModuleNotFoundError:
    raise UsageError('a run between machines needs the extra: pip install "fedloom[net]"') from None

log = logging.getLogger("fedloom.client")

T = TypeVar("T")
SHORTEST, LONGEST = 0.05, 15.0  # seconds between two tries
UNSENT = 1 << 17  # bytes that the system takes of what cannot be sent yet: of megabytes nobody saw whether they move
STILL = 60.0  # seconds in which nothing moves, after which a transfer is tried again


class Withdrawn(Exception):
    """Nobody waits for this any more."""


class SessionOver(Exception):
    """The server does not know this session any more: it was started again, or another one has taken over."""


class Line:
    """A connection with the server, in a thread of its own; whatever fails on the way is tried again.

    `moved` counts bytes that got one end further: while it grows, what fails is tried again with no long pause. Raises
    Untrusted, at once, where certificates do not fit, and UsageError where the proxy refuses.
    """

    def __init__(
        self, address: tuple[str, int], context: ssl.SSLContext, server_name: str | None, proxy: Proxy | None = None
    ) -> None:
        self.address, self.context, self.server_name, self.proxy = address, context, server_name, proxy
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        self.place = f"{host}:{address[1]}"
        self.session = ""
        self.moved = 0
        self.longest = LONGEST  # seconds between two tries, which are fewer where a lease is shorter
        self.told: str | None = None  # the trouble that was told last
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="line", daemon=True)
        self.thread.start()
        self.large = Crossed()  # what has crossed the connection of large answers, which has no other bytes
        self.http, self.uploads = self._now(self._opened())

    async def _opened(self) -> tuple[aiohttp.ClientSession, aiohttp.ClientSession]:
        url, through = f"https://{self.place}", self.proxy.url if self.proxy else None
        return _session(url, self.context, through, 7, Crossed()), _session(url, self.context, through, 1, self.large)

    def close(self) -> None:
        """Hangs up."""
        with contextlib.suppress(Exception):
            self._now(self._closed(), 5.0)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5.0)
        if not self.thread.is_alive():
            self.loop.close()

    async def _closed(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await self.http.close()
        await self.uploads.close()
        await asyncio.sleep(0.02)  # in which connections close

    def _now(self, what: Coroutine[Any, Any, T], patience: float | None = None) -> T:
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(patience)

    # -- requests, for any thread

    def ask(self, path: str, fields: Mapping[str, Any], patient: bool = True) -> dict[str, Any]:
        """The answer to a small message; tried again until it is through, but for those that are not `patient`."""
        body = encoding.encode(fields)
        answer = self._now(self._tried(lambda: self._posted(path, body, {}), patient))
        assert answer is not None
        return answer

    def work(self, wait: float, answer: tuple[bytes, bytes] | None) -> dict[str, Any] | None:
        """The next request, sent with a small answer (id, bytes) to the one before; None: nothing yet."""
        id, body = answer or (b"", b"")
        more = {"X-Answer": id.hex()} if answer else {}
        return self._now(self._tried(lambda: self._posted(f"/v1/work?wait={wait:.3f}", body, more, wait)))

    def fetch(self, name: bytes, parcels: Parcels) -> None:
        """Brings a part of a message into a folder."""
        while name not in parcels:
            self._now(self._tried(lambda: self._fetched(name, parcels)))

    def deliver(self, id: bytes, parcels: Parcels) -> None:
        """Brings an answer from a folder to the server."""
        digest, reached = digest_of(parcels.path(id)), [0]
        while not self._now(self._tried(lambda: self._delivered(id, parcels, digest, reached))):
            pass

    # -- in the loop

    async def _tried(self, what: Callable[[], Coroutine[Any, Any, T]], patient: bool = True) -> T:
        pause, began = SHORTEST, time.monotonic()
        while True:
            before = self.moved
            try:
                result = await what()
            except (aiohttp.ClientError, OSError, TimeoutError, ssl.SSLError) as error:
                found = _explained(error, self.place, self.proxy)
                if isinstance(found, UsageError) or not patient:
                    raise found from error
                if self.told != str(found) and time.monotonic() - began > 1:
                    log.warning("%s; trying again", found)
                    self.told = str(found)
                pause = SHORTEST if self.moved > before else pause
                await asyncio.sleep(pause * (0.5 + secrets.randbelow(1000) / 1000))  # not all at once
                pause = min(2 * pause, self.longest)
            else:
                if self.told:
                    log.info("the server at %s is there again", self.place)
                    self.told = None
                return result

    def verify(self) -> None:
        """Looks at who answers at the address; raises Untrusted if it is not the server that was expected."""
        self._now(self._tried(self._verified))

    async def _verified(self) -> None:
        host = self.address[0]
        if self.proxy:
            _, writer = await self.proxy.tunnel(self.place)
        else:
            _, writer = await asyncio.open_connection(*self.address, ssl=self.context, server_hostname=host)
        try:
            if self.proxy:
                await writer.start_tls(self.context, server_hostname=host)
            server_reached(writer.get_extra_info("ssl_object").getpeercert(), self.server_name)
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                await writer.wait_closed()

    async def _checked(self, answer: aiohttp.ClientResponse) -> None:
        """Raises what a status says."""
        if answer.status < 400:
            return
        why = await answer.text()
        kinds = {403: Untrusted, 409: SessionOver, 410: Withdrawn, 413: Withdrawn, 423: TakenError}
        if answer.status >= 500 or answer.status == 416:  # of 416: where to go on is asked again
            raise aiohttp.ClientPayloadError(f"{answer.status}: {why[:200]}")
        raise kinds.get(answer.status, UsageError)(why[:500] or f"the server answered {answer.status}")

    async def _posted(
        self, path: str, body: bytes, more: Mapping[str, str], wait: float = 0.0
    ) -> dict[str, Any] | None:
        headers = {"X-Session": self.session, **more}
        timeout = aiohttp.ClientTimeout(total=None, connect=20, sock_read=wait + 20)
        async with self.http.post(path, data=body, headers=headers, timeout=timeout) as answer:
            await self._checked(answer)
            return None if answer.status == 204 else encoding.decode(await answer.read())

    async def _fetched(self, name: bytes, parcels: Parcels) -> None:
        begin = parcels.come(name)
        headers = {"X-Session": self.session} | ({"Range": f"bytes={begin}-"} if begin else {})
        async with self.http.get(f"/v1/blob/{name.hex()}", headers=headers) as answer:
            if answer.status == 416:
                parcels.drop(name)
            await self._checked(answer)
            length = int(answer.headers["X-Length"])
            async for piece in answer.content.iter_any():
                parcels.add(name, begin, piece)
                begin += len(piece)
                self.moved += len(piece)
        if begin == length:
            try:
                parcels.close(name, name)
            except CodecError as error:  # a part of which a loss of power left less than there was
                raise aiohttp.ClientPayloadError(str(error)) from error

    async def _delivered(self, id: bytes, parcels: Parcels, digest: bytes, reached: list[int]) -> bool:
        async with self.uploads.head(f"/v1/reply/{id.hex()}", headers={"X-Session": self.session}) as answer:
            await self._checked(answer)
            if "X-Done" in answer.headers:
                return True
            offset = int(answer.headers["X-Offset"])
        self.moved += max(0, offset - reached[0])
        reached[0] = offset
        length = parcels.size(id)

        async def pieces() -> AsyncIterator[bytes]:
            with parcels.path(id).open("rb") as file:
                file.seek(offset)
                while piece := file.read(PIECE):
                    yield piece

        headers = {
            "X-Session": self.session,
            "X-Length": str(length),
            "X-Offset": str(offset),
            "X-Digest": digest.hex(),
            "Content-Length": str(length - offset),  # of unknown length they would travel in slower chunks
        }

        async def put() -> bool:
            patient = aiohttp.ClientTimeout(total=None, connect=20)
            path = f"/v1/reply/{id.hex()}"
            async with self.uploads.put(path, data=pieces(), headers=headers, timeout=patient) as answer:
                await self._checked(answer)
                return bool(encoding.decode(await answer.read())["done"])

        return await self._moving(put())

    async def _moving(self, what: Coroutine[Any, Any, T]) -> T:
        """What comes of an upload; raises TimeoutError where nothing moves: aiohttp only sees that nothing comes."""
        task, moved, since = asyncio.ensure_future(what), -1, 0.0
        try:
            while not (await asyncio.wait([task], timeout=STILL / 4))[0]:
                if moved != (moved := self.large.up + self.large.down):
                    since = self.loop.time()
                elif self.loop.time() - since > STILL:
                    raise TimeoutError
            return task.result()
        finally:
            task.cancel()


def _session(
    url: str, context: ssl.SSLContext, proxy: str | None, connections: int, crossed: Crossed
) -> aiohttp.ClientSession:
    """A session with a server, by so many connections at most, that counts what crosses them."""
    made = partial(_socket, crossed)
    connector = aiohttp.TCPConnector(ssl=context, limit=connections, keepalive_timeout=60, socket_factory=made)
    timeout = aiohttp.ClientTimeout(total=None, connect=20, sock_read=STILL)
    return aiohttp.ClientSession(url, connector=connector, timeout=timeout, trust_env=False, proxy=proxy)


def _socket(crossed: Crossed, about: Any) -> socket.socket:
    """A socket that counts, and takes little of what cannot be sent yet, where the system can do so."""
    made = Socket(*about[:3])
    made.crossed = crossed
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
    return made


def _explained(error: Exception, place: str, proxy: Proxy | None) -> UsageError | RunError:
    """What went wrong on the way to a server, at the proxy or behind it."""
    if proxy and isinstance(error, Closed | aiohttp.ClientHttpProxyError):
        reason = error.reason if isinstance(error, Closed) else error.message
        return proxy.refused(error.status, reason, place)
    if proxy and isinstance(error, aiohttp.ClientProxyConnectionError):
        return proxy.refused(AWAY, reason_of(error), place)
    return explained(error, "client", place)
