"""TLS between a server and its clients: 1.3 only, certificates both ways, no authority but the federation's own."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.deploy.certificate import pem
from fedloom.deploy.certs import CERTIFICATE, KEY, Held
from fedloom.deploy.faults import explained, is_clear_text
from fedloom.deploy.identity import Identity, Role, of_uris
from fedloom.errors import Unreachable, Untrusted


def server_context(folder: Path, refused: Callable[[Untrusted | Unreachable], None] | None = None) -> ssl.SSLContext:
    """The context of the server whose key and certificate lie in a folder; raises UsageError if these are not ready.

    `refused` is told of every handshake that fails, which the transports of asyncio, and so of aiohttp, otherwise keep
    to themselves; it is called in their loop and should do no more than write a line.
    """
    context = _context(folder, "server", ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # a resumed session would not show its certificate again, nor be refused for it
    context.options |= ssl.OP_NO_TICKET
    context.sslobject_class = _telling(refused)
    return context


def client_context(folder: Path) -> ssl.SSLContext:
    """The context of the client whose key and certificate lie in a folder; raises UsageError if these are not ready."""
    context = _context(folder, "client", ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = True
    context.hostname_checks_common_name = False
    return context


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a connection."""

    identity: Identity
    serial: int  # number of the certificate


def peer_of(certificate: Mapping[str, Any] | None, role: Role) -> Peer:
    """Who a certificate speaks for that a handshake has verified, as `getpeercert()` gives it; raises Untrusted.

    `role` is the one that the other end must have.
    """
    named = [str(name) for kind, name in (certificate or {}).get("subjectAltName", ()) if kind == "URI"]
    subject = [pair for part in (certificate or {}).get("subject", ()) for pair in part]
    organisations = [str(value) for kind, value in subject if kind == "organizationName"]
    found = of_uris(named, organisations[0] if organisations else None)
    if certificate is None or found is None:
        raise Untrusted(
            f"the other end shows no certificate that names one {role} (a URI such as fedloom:{role}/NAME); it needs "
            "one made by: fedloom certs request"
        )
    if found.role != role:
        raise Untrusted(f"the other end is the {found}, and only a {role} may be there")
    return Peer(found, int(certificate["serialNumber"], 16))


def server_reached(certificate: Mapping[str, Any] | None, name: str | None = None) -> Peer:
    """The server that a client has reached; raises Untrusted if it is none, or not that of the expected name."""
    found = peer_of(certificate, "server")
    if name is not None and found.identity.name != name:
        raise Untrusted(
            f"the server reached is {found.identity.name!r}, and {name!r} was expected; check its address, and the "
            "name of the server in this client's settings"
        )
    return found


def _context(folder: Path, role: Role, protocol: int) -> ssl.SSLContext:
    held = Held.of(folder, role)
    context = ssl.SSLContext(protocol)  # which knows none of the system's authorities
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=pem(held.bundle.authority).decode())
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY, password=lambda: "")  # nobody is asked at a terminal
    return context


def _telling(refused: Callable[[Untrusted | Unreachable], None] | None) -> type[ssl.SSLObject]:
    class Telling(ssl.SSLObject):
        """A connection whose failed handshake is told, here and to the other end.

        The alert that says why lies ready to be sent when a handshake fails, but asyncio closes without sending it
        (`_do_handshake` in asyncio/sslproto.py), and the client would only see that it was hung up on. So asyncio is
        asked to send and to go on for a few reads, until the client hangs up or the time for handshakes is over.
        """

        failed: ssl.SSLError | None = None
        left = 4  # reads, of at most 256 KiB in asyncio

        def do_handshake(self) -> None:
            if self.failed is None:
                try:
                    super().do_handshake()
                    return
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    raise
                except ssl.SSLError as error:
                    self.failed = error
                    if refused is not None:
                        refused(explained(error, "server"))
                    if is_clear_text(error):  # who waits for an answer to what is no TLS
                        raise
            self.left -= 1
            if self.left < 0:
                raise self.failed
            raise ssl.SSLWantReadError

    return Telling
