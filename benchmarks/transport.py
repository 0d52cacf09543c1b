"""Whether aiohttp carries what a network engine needs, and what it costs beside a bare TLS socket loop.

    python benchmarks/transport.py               # 256 MB each way, 5 pairs, 300 small calls
    python benchmarks/transport.py --megabytes 64 -n 3

Two processes, TLS 1.3, certificates on both sides (ECDSA P-256). First three questions are answered by a try each: does
a handler see its peer's certificate, is a client without one refused, and does a transfer that was cut go on at an
offset? Then ours and the bare loop take turns: the same bytes, read in pieces of 256 KiB and thrown away, up and down;
and small calls one after the other over one connection. Quoted are medians, and of the ratios pair by pair the median,
the least and the greatest. Needs `aiohttp` and `cryptography`.
"""

import argparse
import asyncio
import contextlib
import datetime
import multiprocessing
import os
import socket
import ssl
import statistics
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PIECE = 1 << 18
HEAD = struct.Struct("!cQ")  # what is asked, and how many bytes


def certificates(folder: Path) -> None:
    """An authority and, by it, a server's and a client's certificate: `ca.pem`, `server.pem`, `client.pem`."""
    now = datetime.datetime.now(datetime.UTC)
    own = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    for name in ("ca", "server", "client"):
        key = own if name == "ca" else ec.generate_private_key(ec.SECP256R1())
        subject = issuer if name == "ca" else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(name == "ca", None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(own, hashes.SHA256())
        )
        plain = serialization.NoEncryption()
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        (folder / f"{name}.pem").write_bytes(private + made.public_bytes(serialization.Encoding.PEM))


def context(folder: Path, name: str | None, *, serves: bool) -> ssl.SSLContext:
    """TLS 1.3 with a certificate of its own (None: without), and none but the authority's accepted."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if serves else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_verify_locations(folder / "ca.pem")
    made.verify_mode = ssl.CERT_REQUIRED
    if name:
        made.load_cert_chain(folder / f"{name}.pem")
    return made


def serve_bare(folder: Path, port: int) -> None:
    """A loop over one socket: `u` and a length, then so many bytes; `d` and a length, which are sent back."""
    tls, buffer = context(folder, "server", serves=True), bytearray(PIECE)
    with socket.create_server(("localhost", port)) as listening:
        while True:
            raw, _ = listening.accept()
            with contextlib.suppress(OSError), tls.wrap_socket(raw, server_side=True) as talking:
                talking.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while head := talking.recv(HEAD.size):
                    asked, left = HEAD.unpack(head)
                    if asked == b"u":
                        while left:
                            left -= talking.recv_into(buffer, min(left, PIECE))
                        talking.sendall(b"k")
                    for at in range(0, left if asked == b"d" else 0, PIECE):
                        talking.sendall(memoryview(buffer)[: min(PIECE, left - at)])


def serve_http(folder: Path, port: int) -> None:
    """The same over HTTP, and who the peer is, and a file by ranges."""
    body = bytes(PIECE)

    async def up(request: web.Request) -> web.Response:
        count = 0
        async for piece in request.content.iter_any():
            count += len(piece)
        return web.Response(text=str(count))

    async def down(request: web.Request) -> web.StreamResponse:
        left, answer = int(request.query["n"]), web.StreamResponse()
        answer.content_length = left
        await answer.prepare(request)
        while left:
            await answer.write(body[: min(PIECE, left)])
            left -= min(PIECE, left)
        return answer

    async def who(request: web.Request) -> web.Response:
        assert request.transport is not None
        seen = request.transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        name = x509.load_der_x509_certificate(seen).subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        return web.Response(text=str(name))

    async def blob(request: web.Request) -> web.StreamResponse:
        whole, begin = (folder / "blob").read_bytes(), request.http_range.start or 0
        answer = web.StreamResponse(status=206 if begin else 200)
        answer.content_length = len(whole) - begin
        await answer.prepare(request)
        for at in range(begin, len(whole), PIECE):
            await answer.write(whole[at : at + PIECE])
        return answer

    app = web.Application(client_max_size=0)
    app.add_routes([web.post("/up", up), web.get("/down", down), web.get("/who", who), web.get("/blob", blob)])
    tls = context(folder, "server", serves=True)
    web.run_app(app, host="localhost", port=port, ssl_context=tls, print=None, access_log=None, handle_signals=False)


class Bare:
    """The client of the bare loop."""

    def __init__(self, folder: Path, port: int) -> None:
        raw = socket.create_connection(("localhost", port))
        self.talking = context(folder, "client", serves=False).wrap_socket(raw, server_hostname="localhost")
        self.talking.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = bytearray(PIECE)

    async def up(self, size: int) -> None:
        self.talking.sendall(HEAD.pack(b"u", size))
        for at in range(0, size, PIECE):
            self.talking.sendall(memoryview(self.buffer)[: min(PIECE, size - at)])
        self.talking.recv(1)

    async def down(self, size: int) -> None:
        self.talking.sendall(HEAD.pack(b"d", size))
        while size:
            size -= self.talking.recv_into(self.buffer, min(size, PIECE))


class Http:
    """The client over HTTP."""

    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self.session, self.at, self.piece = session, f"https://localhost:{port}", bytes(PIECE)

    async def up(self, size: int) -> None:
        async def pieces() -> object:
            for at in range(0, size, PIECE):
                yield self.piece[: min(PIECE, size - at)]

        sent = pieces() if size > PIECE else self.piece[:size]
        length = {"Content-Length": str(size)}  # chunks of unknown number cost a third of the speed
        async with self.session.post(f"{self.at}/up", data=sent, headers=length) as answer:
            assert await answer.text() == str(size)

    async def down(self, size: int) -> None:
        async with self.session.get(f"{self.at}/down", params={"n": size}) as answer:
            async for piece in answer.content.iter_chunked(PIECE):
                size -= len(piece)
        assert size == 0


async def questions(folder: Path, session: aiohttp.ClientSession, port: int) -> None:
    """Answers the three; raises AssertionError where the answer is no."""
    at = f"https://localhost:{port}"
    async with session.get(f"{at}/who") as answer:
        assert await answer.text() == "client"
    print("a handler sees its peer's certificate: yes")
    try:
        async with (
            aiohttp.ClientSession() as stranger,
            stranger.get(f"{at}/who", ssl=context(folder, None, serves=False)) as answer,
        ):
            raise AssertionError(f"a client without a certificate was answered {answer.status}")
    except aiohttp.ClientError as error:
        print(f"a client without a certificate is refused: yes ({type(error).__name__})")
    whole, half = (folder / "blob").read_bytes(), bytearray()
    async with session.get(f"{at}/blob") as answer:
        async for piece in answer.content.iter_chunked(PIECE):
            half += piece
            if len(half) > len(whole) // 3:
                break  # the connection is cut
    async with session.get(f"{at}/blob", headers={"Range": f"bytes={len(half)}-"}) as answer:
        assert answer.status == 206
        half += await answer.read()
    assert bytes(half) == whole
    print("a transfer that was cut goes on at its offset: yes")


async def timed(what: Callable[[], Awaitable[None]]) -> float:
    began = time.perf_counter()
    await what()
    return time.perf_counter() - began


def told(what: str, ours: list[float], bare: list[float], unit: Callable[[float], str]) -> None:
    ratios = [theirs / mine for mine, theirs in zip(ours, bare, strict=True)]
    middle = statistics.median
    print(
        f"{what:<12} aiohttp {unit(middle(ours))}, bare {unit(middle(bare))}; "
        f"{middle(ratios):.2f} of the bare speed ({min(ratios):.2f} to {max(ratios):.2f})"
    )


async def measure(folder: Path, ports: tuple[int, int], size: int, pairs: int, calls: int) -> None:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context(folder, "client", serves=False))
    ) as session:
        await questions(folder, session, ports[1])
        bare, http = Bare(folder, ports[0]), Http(session, ports[1])
        for way in ("up", "down"):
            seconds: tuple[list[float], list[float]] = ([], [])
            for turn in range(pairs + 1):
                for one, kept in zip((http, bare), seconds, strict=True):
                    took = await timed(lambda one=one, way=way: getattr(one, way)(size))
                    if turn:  # the first is to warm up
                        kept.append(took)
            told(f"{size >> 20} MB {way}", *seconds, lambda took: f"{size / took / 1e6:.0f} MB/s")
        small: tuple[list[float], list[float]] = ([], [])
        for _ in range(calls):
            for one, kept in zip((http, bare), small, strict=True):
                kept.append(await timed(lambda one=one: one.up(100)))
        told("100 bytes up", *small, lambda took: f"{took * 1e3:.2f} ms")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ask.add_argument("--megabytes", type=int, default=256)
    ask.add_argument("-n", "--pairs", type=int, default=5)
    ask.add_argument("--calls", type=int, default=300)
    asked = ask.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        certificates(folder)
        (folder / "blob").write_bytes(os.urandom(8 * PIECE + 5))
        ports = tuple(free() for _ in range(2))
        context_of = multiprocessing.get_context("spawn")
        serving = [
            context_of.Process(target=serve, args=(folder, port), daemon=True)
            for serve, port in zip((serve_bare, serve_http), ports, strict=True)
        ]
        for one in serving:
            one.start()
        try:
            for port in ports:
                reached(port)
            asyncio.run(measure(folder, (ports[0], ports[1]), asked.megabytes << 20, asked.pairs, asked.calls))
        finally:
            for one in serving:
                one.terminate()
                one.join()


def free() -> int:
    with socket.create_server(("localhost", 0)) as one:
        return int(one.getsockname()[1])


def reached(port: int) -> None:
    """Waits until somebody listens."""
    for _ in range(200):
        try:
            socket.create_connection(("localhost", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"nobody listens at port {port}")


if __name__ == "__main__":
    main()
