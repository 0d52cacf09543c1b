"""TLS between server and clients: real handshakes over real sockets, each way in which one must be refused."""

import asyncio
import socket
import ssl
import threading
from contextlib import suppress
from datetime import timedelta

import pytest

pytest.importorskip("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fedloom.deploy import authority, certs
from fedloom.deploy.certificate import pem, read_key, today
from fedloom.deploy.faults import explained
from fedloom.deploy.identity import Identity
from fedloom.deploy.tls import Peer, client_context, peer_of, server_context, server_reached
from fedloom.errors import Unreachable, Untrusted, UsageError

LONG_AGO, SOON = today() - timedelta(days=200), today() + timedelta(days=10)


def federation(folder):
    """One with the server `server` and the clients `a` and `b`, whose authority is older than its parties."""
    authority.init(folder / "ca", "fed", at=LONG_AGO)
    party(folder, folder / "server", "server", "server", certs.LOOPBACK)
    for name in ("a", "b"):
        party(folder, folder / name, "client", name)
    return folder


def party(fed, folder, role, name, hosts=(), at=None):
    """The folder of a party whose certificate was made now, or at another time."""
    asked, _ = certs.request(folder, name, role, hosts)
    _, bundle = authority.Authority(fed / "ca").sign(asked, 90, at=at)
    certs.install(bundle, "bundle", folder, at=at)
    return folder


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    return federation(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another federation, with the same names."""
    return federation(tmp_path_factory.mktemp("tls"))


def raw(folder, trusted, protocol, at_most=ssl.TLSVersion.TLSv1_3):
    """A context of somebody who uses a key and a certificate as they please."""
    context = ssl.SSLContext(protocol)
    context.maximum_version = at_most
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED if trusted else ssl.CERT_NONE
    if trusted:
        context.load_verify_locations(trusted / "ca" / "ca.pem")
    if folder:
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


def drain(link):
    """Reads what still comes, so that a reset does not overtake what was sent."""
    with suppress(OSError):
        while socket.socket.recv(link, 1000):
            pass


class Met:
    """What both ends of one connection saw: the peer's certificate, or the error."""

    def __init__(self, server, client, host="localhost"):
        self.server = self.client = self.resumed = None
        self.seen = {}
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.settimeout(10)
            answering = threading.Thread(target=self._answer, args=(listening, server))
            answering.start()
            with socket.create_connection(listening.getsockname(), 10) as link:
                try:
                    if client is None:
                        link.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                        link.shutdown(socket.SHUT_WR)
                        link.recv(1)
                    else:
                        with client.wrap_socket(link, server_hostname=host) as secured:
                            self.seen["server"] = secured.getpeercert()
                            self.version, self.session = secured.version(), secured.session
                            secured.sendall(b"?")
                            assert secured.recv(1) == b"!", "the connection ended"
                            self.tickets = secured.session is not None and secured.session.has_ticket
                except (OSError, AssertionError) as error:
                    self.client = error
            answering.join(10)

    def _answer(self, listening, server):
        link, _ = listening.accept()
        link.settimeout(10)
        with link if server is None else server.wrap_socket(link, True, do_handshake_on_connect=False) as line:
            try:
                if server is None:
                    line.recv(9)
                    line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    drain(line)
                else:
                    line.do_handshake()
                    self.seen["client"] = line.getpeercert()
                    line.recv(1)
                    line.sendall(b"!")
            except OSError as error:
                self.server = error
                drain(line)

    def said(self, side):
        """The sentence of one end."""
        error = explained(getattr(self, side), side, "fed:8443" if side == "client" else "")
        assert "\n" not in str(error) and str(error)
        return error


def test_those_of_one_federation_meet(fed):
    met = Met(server_context(fed / "server"), client_context(fed / "a"))
    assert met.server is met.client is None
    assert met.version == "TLSv1.3"
    found = peer_of(met.seen["client"], "client")
    assert found.identity == Identity("client", "a")
    assert found.serial == certs.Held.of(fed / "a").bundle.certificate.signed.serial_number
    assert server_reached(met.seen["server"]).identity == server_reached(met.seen["server"], "server").identity
    with pytest.raises(Untrusted, match="'server', and 'hub' was expected"):
        server_reached(met.seen["server"], "hub")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_the_server_of_a_laptop_has_the_names_of_the_loopback(fed, host):
    assert Met(server_context(fed / "server"), client_context(fed / "a"), host).client is None


def test_no_session_is_taken_up_again(fed):
    met = Met(server_context(fed / "server"), client_context(fed / "a"))
    assert not met.tickets
    assert server_context(fed / "server").num_tickets == 0


def test_an_organisation_is_told(fed, tmp_path):
    folder = tmp_path / "c"
    asked, _ = certs.request(folder, "c", "client", (), "Klinik Süd")
    certs.install(authority.Authority(fed / "ca").sign(asked)[1], "bundle", folder)
    met = Met(server_context(fed / "server"), client_context(folder))
    assert peer_of(met.seen["client"], "client").identity == Identity("client", "c", "Klinik Süd")


# Who is refused by the server


def test_a_client_without_a_certificate(fed):
    met = Met(server_context(fed / "server"), raw(None, fed, ssl.PROTOCOL_TLS_CLIENT))
    assert "client" not in met.seen
    assert str(met.said("server")).startswith("the client showed no certificate; it needs one")
    assert "refused the certificate of this client: it got none" in str(met.said("client"))


def test_a_client_of_another_federation(fed, other):
    met = Met(server_context(fed / "server"), raw(other / "a", None, ssl.PROTOCOL_TLS_CLIENT))
    assert "client" not in met.seen
    assert "was not signed by this federation's authority" in str(met.said("server"))
    assert "does not know the authority that signed it" in str(met.said("client"))


def test_a_client_that_signed_for_itself(fed, tmp_path):
    """Under the very name of the authority."""
    federation(tmp_path / "fed")
    met = Met(server_context(fed / "server"), raw(tmp_path / "fed/a", None, ssl.PROTOCOL_TLS_CLIENT))
    assert "client" not in met.seen and isinstance(met.said("server"), Untrusted)


@pytest.mark.parametrize(
    ("at", "here", "there"),
    [
        (LONG_AGO, "has ended by this machine's clock", "has ended by the clock there"),
        (SOON, "is not valid yet by this machine's clock", "is not valid yet by the clock there"),
    ],
)
def test_a_client_out_of_its_time(fed, tmp_path, at, here, there):
    folder = party(fed, tmp_path / "late", "client", f"late{at:%j}", at=at)
    met = Met(server_context(fed / "server"), raw(folder, fed, ssl.PROTOCOL_TLS_CLIENT))
    assert "client" not in met.seen
    assert here in str(met.said("server")) and there in str(met.said("client"))
    with pytest.raises(UsageError, match=r"ended on .*--renew|valid only from .*clock"):
        client_context(folder)  # is told before anybody is dialled


def test_a_client_whose_certificate_is_made_carelessly(fed, tmp_path):
    """By the right authority, but without what names its key: OpenSSL minds only if it is strict."""
    folder = party(fed, tmp_path / "c", "client", "careless")
    found = certs.Held.of(folder).bundle
    key = read_key(fed / "ca" / "key.pem")
    one = found.certificate.signed
    made = x509.CertificateBuilder(
        one.issuer, one.subject, one.public_key(), 7, one.not_valid_before_utc, one.not_valid_after_utc
    )
    for extension in one.extensions:
        if not isinstance(extension.value, x509.AuthorityKeyIdentifier | x509.SubjectKeyIdentifier):
            made = made.add_extension(extension.value, extension.critical)
    (folder / "certificate.pem").write_bytes(pem(made.sign(key, hashes.SHA256())) + pem(found.authority))
    met = Met(server_context(fed / "server"), raw(folder, fed, ssl.PROTOCOL_TLS_CLIENT))
    assert "client" not in met.seen
    assert str(met.said("server")).startswith("the certificate of the client was refused (")


def test_what_the_system_trusts_does_not_count(fed, other, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(other / "ca" / "ca.pem"))
    met = Met(server_context(fed / "server"), raw(other / "a", None, ssl.PROTOCOL_TLS_CLIENT))
    assert "client" not in met.seen and isinstance(met.said("server"), Untrusted)
    met = Met(raw(other / "server", None, ssl.PROTOCOL_TLS_SERVER), client_context(fed / "a"))
    assert "server" not in met.seen and isinstance(met.said("client"), Untrusted)


def test_a_servers_certificate_is_no_clients(fed):
    met = Met(server_context(fed / "server"), raw(fed / "server", fed, ssl.PROTOCOL_TLS_CLIENT))
    assert "client" not in met.seen
    assert "is not that of a client" in str(met.said("server"))
    assert "it is of another role" in str(met.said("client"))
    with pytest.raises(UsageError, match="is that of the server server, and what is needed is a client's"):
        client_context(fed / "server")


def test_a_client_that_knows_no_tls_1_3(fed):
    old = raw(fed / "a", fed, ssl.PROTOCOL_TLS_CLIENT, ssl.TLSVersion.TLSv1_2)
    met = Met(server_context(fed / "server"), old)
    assert "client" not in met.seen
    for side in ("server", "client"):
        assert "TLS 1.3" in str(met.said(side)) and isinstance(met.said(side), Untrusted)


def test_a_client_in_clear_text(fed):
    met = Met(server_context(fed / "server"), None)
    assert str(met.said("server")) == (
        "the client did not speak TLS; its address for this server must begin with https://"
    )


# Who is refused by the client


def test_a_server_of_another_federation(fed, other):
    met = Met(raw(other / "server", None, ssl.PROTOCOL_TLS_SERVER), client_context(fed / "a"))
    assert "server" not in met.seen
    assert "the certificate of the server at fed:8443 was not signed by this federation's authority" in str(
        met.said("client")
    )
    assert "does not know the authority" in str(met.said("server"))


@pytest.mark.parametrize(
    ("at", "here"),
    [(LONG_AGO, "has ended by this machine's clock"), (SOON, "is not valid yet by this machine's clock")],
)
def test_a_server_out_of_its_time(fed, tmp_path, at, here):
    folder = party(fed, tmp_path / "late", "server", f"hub{at:%j}", ["localhost"], at)
    met = Met(raw(folder, fed, ssl.PROTOCOL_TLS_SERVER), client_context(fed / "a"))
    assert "server" not in met.seen
    assert here in str(met.said("client"))
    with pytest.raises(UsageError, match=r"ended on|valid only from"):
        server_context(folder)


def test_a_server_at_another_host(fed, tmp_path):
    folder = party(fed, tmp_path / "hub", "server", "elsewhere", ["fed.example.org"])
    met = Met(server_context(folder), client_context(fed / "a"))
    assert "server" not in met.seen
    assert "is for other hosts" in str(met.said("client")) and "localhost" in str(met.said("client"))
    for host in ("127.0.0.1", "elsewhere", "sub.fed.example.org"):  # nor is the name of the party that of a host
        met = Met(server_context(folder), client_context(fed / "a"), host)
        assert "is for other hosts" in str(met.said("client"))
    assert Met(server_context(folder), client_context(fed / "a"), "fed.example.org").client is None


def test_a_clients_certificate_is_no_servers(fed):
    met = Met(raw(fed / "b", fed, ssl.PROTOCOL_TLS_SERVER), client_context(fed / "a"))
    assert "server" not in met.seen
    assert "is not that of a server" in str(met.said("client"))
    with pytest.raises(UsageError, match="is that of the client b, and what is needed is a server's"):
        server_context(fed / "b")


def test_a_server_that_knows_no_tls_1_3(fed):
    old = raw(fed / "server", fed, ssl.PROTOCOL_TLS_SERVER, ssl.TLSVersion.TLSv1_2)
    met = Met(old, client_context(fed / "a"))
    assert "server" not in met.seen and "TLS 1.3" in str(met.said("client"))


def test_a_server_in_clear_text(fed):
    met = Met(None, client_context(fed / "a"))
    assert "the server at fed:8443 does not speak TLS" in str(met.said("client"))


# Who it is


def shown(*uris, role="client"):
    """A verified certificate as `getpeercert` gives it."""
    return {"subjectAltName": tuple(("URI", uri) for uri in uris), "serialNumber": "0A", "subject": ()}


@pytest.mark.parametrize(
    "certificate",
    [
        None,
        {},
        shown(),
        shown("https://example.org"),
        shown("fedloom:client/a", "fedloom:client/b"),
        shown("fedloom:client/a", "FEDLOOM:client/b"),
        shown("fedloom:client/a", "fedloom:server/a"),
        shown("fedloom:client/"),
        shown("fedloom:client/a/b"),
        shown("fedloom:client/../b"),
        shown("fedloom:admin/a"),
        shown("fedloom:clienta"),
        {"subjectAltName": (("DNS", "fedloom:client/a"),), "serialNumber": "0A", "subject": ()},
        {"subject": ((("commonName", "a"),),), "serialNumber": "0A"},
    ],
)
def test_who_has_not_one_name_is_nobody(certificate):
    with pytest.raises(Untrusted, match="names one client"):
        peer_of(certificate, "client")


def test_a_name_goes_with_its_role():
    assert peer_of(shown("fedloom:client/a", "https://a.org"), "client") == Peer(Identity("client", "a"), 10)
    with pytest.raises(Untrusted, match="is the server a, and only a client"):
        peer_of(shown("fedloom:server/a"), "client")
    with pytest.raises(Untrusted, match="is the client a, and only a server"):
        server_reached(shown("fedloom:client/a"), "a")


# Errors of the system


def told(error, side="client"):
    return str(explained(error, side, "fed:8443"))


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
    with pytest.raises(OSError) as refused:
        socket.create_connection(address, 5)
    assert told(refused.value).startswith("nobody listens where the server at fed:8443 should be")
    assert isinstance(explained(refused.value, "client"), Unreachable)
    several = OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 1), [Errno 111] ...")
    assert told(several) == told(refused.value)


def test_a_server_that_hangs_up_in_the_handshake(fed):
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as link:
        line, _ = listening.accept()
        with line:
            line.shutdown(socket.SHUT_WR)
            with pytest.raises(ssl.SSLEOFError) as ended:
                client_context(fed / "a").wrap_socket(link, server_hostname="localhost")
    assert "broke the connection off" in told(ended.value)
    assert isinstance(explained(ended.value, "client"), Unreachable)


def test_a_name_that_nobody_knows():
    with pytest.raises(socket.gaierror) as unknown:
        socket.create_connection(("no.such.host.invalid", 1), 5)
    assert "the name of the server at fed:8443 is not known to this machine" in told(unknown.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "did not answer in time"),
        (ConnectionResetError(104, "reset"), "may have refused the certificate of this end"),
        (BrokenPipeError(32, "pipe"), "may have refused the certificate of this end"),
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), "broke the connection off"),
        (OSError(113, "No route to host"), "no way leads to the server at fed:8443"),
        (OSError(5, "input/output error"), "failed (.*input/output error"),
    ],
)
def test_a_line_that_fails(error, words):
    assert isinstance(explained(error, "client", "fed:8443"), Unreachable)
    assert words.partition("(")[0] in told(error)


# aiohttp on top


def test_a_server_and_a_client_of_aiohttp(fed, other):
    aiohttp = pytest.importorskip("aiohttp")
    from aiohttp import web

    async def handle(request):
        peer = peer_of(request.transport.get_extra_info("peercert"), "client")
        return web.json_response([peer.identity.name, peer.serial])

    async def both():
        told = []
        application = web.Application()
        application.router.add_get("/who", handle)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server_context(fed / "server", told.append))
        await site.start()
        port = runner.addresses[0][1]
        answers = []
        foreign = raw(other / "a", None, ssl.PROTOCOL_TLS_CLIENT)
        none = raw(None, None, ssl.PROTOCOL_TLS_CLIENT)
        strict = client_context(fed / "b")
        for context, host, name, scheme in (
            (strict, "localhost", None, "https"),
            (foreign, "localhost", None, "https"),
            (none, "localhost", None, "https"),
            (strict, "127.0.0.2", None, "https"),
            (strict, "localhost", "fed.example.org", "https"),
            (strict, "localhost", None, "http"),
            (strict, "no.such.host.invalid", None, "https"),
        ):
            connector = aiohttp.TCPConnector(ssl=context)
            async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(20)) as session:
                try:
                    async with session.get(f"{scheme}://{host}:{port}/who", server_hostname=name) as answer:
                        answers.append(await answer.json())
                        reached = answer.connection and answer.connection.transport.get_extra_info("peercert")
                        assert reached is None or server_reached(reached, "server")
                except aiohttp.ClientError as error:
                    answers.append(explained(error, "client", f"{host}:{port}"))
        await runner.cleanup()
        return answers, told

    (known, foreign, none, closed, elsewhere, clear, nowhere), told = asyncio.run(both())
    assert known == ["b", certs.Held.of(fed / "b").bundle.certificate.signed.serial_number]
    assert "does not know the authority that signed it" in str(foreign)
    assert "it got none" in str(none)
    assert str(closed).startswith("nobody listens where the server at 127.0.0.2:")
    assert "is for other hosts" in str(elsewhere) and "fed.example.org" in str(elsewhere)
    assert isinstance(clear, Unreachable)
    assert "the name of the server at no.such.host.invalid" in str(nowhere)
    assert {type(one) for one in told} == {Untrusted}
    first, second, third = dict.fromkeys(map(str, told))  # aiohttp tries a GET twice
    assert "was not signed by" in first and "showed no certificate" in second and "did not speak TLS" in third


def test_who_was_refused_is_not_listened_to(fed, other):
    """Who goes on sending after the alert is cut off, long before the time for handshakes is over."""

    async def met():
        told = []
        context = server_context(fed / "server", told.append)
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context)
        async with server:
            sent = await asyncio.to_thread(send, server.sockets[0].getsockname())
            await asyncio.sleep(0.1)  # in which the server's end is closed too
        return sent, told

    def send(address):
        context = raw(other / "a", None, ssl.PROTOCOL_TLS_CLIENT)
        with socket.create_connection(address, 10) as link, context.wrap_socket(link) as line:
            for count in range(400):
                try:
                    line.sendall(b"x" * 100_000)
                except OSError:
                    return count
        return None

    sent, told = asyncio.run(met())
    assert sent is not None and len(told) == 1
