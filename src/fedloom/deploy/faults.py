"""Errors of connections in one sentence each: what happened, why, and what to do about it."""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Iterator

from fedloom.deploy.identity import Role
from fedloom.errors import Unreachable, Untrusted

# Codes of OpenSSL's X509_verify_cert (x509_vfy.h), by what they say of the certificate of the other end.
_NOT_YET, _ENDED, _PURPOSE = 9, 10, 26
_FOREIGN, _HOST = (2, 7, 18, 19, 20, 21, 24, 27, 28, 30), (62, 64)
# Reasons of OpenSSL, of which a version has one and another the other.
_CLEAR = re.compile(
    "HTTP_REQUEST|HTTPS_PROXY_REQUEST|WRONG_VERSION_NUMBER|UNKNOWN_PROTOCOL|PACKET_LENGTH_TOO_LONG|BAD_RECORD_TYPE"
    "|RECORD_LAYER_FAILURE"
)
_OLD = re.compile(
    "UNSUPPORTED_PROTOCOL|WRONG_SSL_VERSION|VERSION_TOO_LOW|NO_PROTOCOLS_AVAILABLE|ALERT_PROTOCOL_VERSION"
)
_GONE = ("ServerDisconnectedError", "ClientPayloadError")  # aiohttp's, of an answer that did not come, or not whole
_ALERT = re.compile("ALERT_([A-Z_]+)")
_REFUSALS = {  # by how the alert begins: why the other end refused a certificate
    "UNKNOWN_CA": "it does not know the authority that signed it: the two ends are of different federations; install "
    "a certificate of the right one",
    "CERTIFICATE_EXPIRED": "it has ended by the clock there; renew it (fedloom certs request NAME --renew), or set the "
    "clock that is wrong",
    "BAD_CERTIFICATE": "it is not valid yet by the clock there, or damaged; compare the clocks, and look at it with: "
    "fedloom certs show",
    "UNSUPPORTED_CERTIFICATE": "it is of another role; look at it with: fedloom certs show",
    "CERTIFICATE_REVOKED": "it was revoked; ask the authority why",
    "CERTIFICATE_UNKNOWN": "it does not say why; its log does",
    "CERTIFICATE_REQUIRED": "it got none; this end must show one: fedloom certs request, then fedloom certs install",
}


def explained(error: BaseException, side: Role, peer: str = "") -> Untrusted | Unreachable:
    """The error of a connection (of `ssl`, of the system, or of a library around them) as one of ours, in one sentence.

    `side` is the role of this end; `peer` is how the other is called, such as `fed.example.org:8443` at a client.
    Untrusted says that the certificates or protocols of the two do not fit, Unreachable all else. The errors of the
    first read and write go here too: in TLS 1.3 a client learns only there that its certificate was refused.
    """
    found = [*_chain(error)]
    other = f"the {'server' if side == 'client' else 'client'}{f' at {peer}' if peer else ''}"
    for one in found:
        if isinstance(one, ssl.SSLCertVerificationError) and hasattr(one, "verify_code"):  # aiohttp's own has none
            return Untrusted(_of_verification(one, side, other))
    for one in found:
        gone = isinstance(one, ssl.SSLEOFError | ssl.SSLZeroReturnError)
        if isinstance(one, ssl.SSLError) and not gone and hasattr(one, "reason"):
            return _of_tls(one, side, other)
    for one in found:
        if isinstance(one, socket.gaierror):
            return Unreachable(
                f"the name of {other} is not known to this machine ({one.strerror}); check its spelling and the DNS"
            )
    return Unreachable(_of_system(next((one for one in found if isinstance(one, OSError)), error), other))


def is_clear_text(error: ssl.SSLError) -> bool:
    """Whether the other end does not speak TLS at all, so that no alert would be understood there."""
    return bool(_CLEAR.search(_upper(error)))


def _upper(error: ssl.SSLError) -> str:
    return f"{error.reason or ''} {error}".upper().replace(" ", "_")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it, as Python and aiohttp keep them."""
    left, seen = [error], set()
    while left:
        one = left.pop(0)
        if isinstance(one, BaseException) and id(one) not in seen:
            seen.add(id(one))
            yield one
            left += [getattr(one, name, None) for name in ("certificate_error", "os_error", "__cause__", "__context__")]


def _of_verification(error: ssl.SSLCertVerificationError, side: Role, other: str) -> str:
    """Why this end refused the certificate of the other."""
    code, its = error.verify_code, f"the certificate of {other}"
    if code == _ENDED:
        return f"{its} has ended by this machine's clock; renew it there: fedloom certs request NAME --renew"
    if code == _NOT_YET:
        return f"{its} is not valid yet by this machine's clock; set the clock that is wrong, here or there"
    if code == _PURPOSE:
        wanted = "server" if side == "client" else "client"
        return f"{its} is not that of a {wanted}; it needs another: fedloom certs request NAME --role {wanted}"
    if code in _HOST:
        return (
            f"{its} is for other hosts ({error.verify_message.rstrip('.')}); dial one that it names, or have it asked "
            "for again with that --host"
        )
    if code in _FOREIGN:
        return (
            f"{its} was not signed by this federation's authority: it is of another federation, or something in "
            "between answers in its place; compare the authority's fingerprint at both ends: fedloom certs show"
        )
    return f"{its} was refused ({error.verify_message}); look at it there with: fedloom certs show"


def _of_tls(error: ssl.SSLError, side: Role, other: str) -> Untrusted | Unreachable:
    """What went wrong in the protocol itself, or was told by the other end in an alert."""
    said = _upper(error)
    if _OLD.search(said):
        return Untrusted(f"{other} and this {side} have no version of TLS in common; both ends need TLS 1.3")
    if alert := _ALERT.search(said):
        whys = [why for name, why in _REFUSALS.items() if alert[1].startswith(name)]
        if whys:
            return Untrusted(f"{other} refused the certificate of this {side}: {whys[0]}")
        return Untrusted(f"{other} broke the handshake off ({error.reason or error}); its log may say why")
    if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in said:
        return Untrusted(f"{other} showed no certificate; it needs one of this federation: fedloom certs request")
    if is_clear_text(error):
        if side == "server":
            return Untrusted(f"{other} did not speak TLS; its address for this server must begin with https://")
        return Untrusted(f"{other} does not speak TLS there; is it the port of the server, or that of a proxy?")
    return Unreachable(f"the connection with {other} failed in TLS ({error.reason or error}); try again")


def _of_system(error: BaseException, other: str) -> str:
    number = getattr(error, "errno", None)
    if number is None and (told := re.search(r"\[Errno (\d+)\]", str(error))):  # asyncio's, of several addresses
        number = int(told[1])
    if number == errno.ECONNREFUSED:
        return f"nobody listens where {other} should be; is it running, and are address and port right?"
    if number in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN):
        return f"no way leads to {other}; check this machine's network, its firewall and the address"
    if isinstance(error, TimeoutError) or number == errno.ETIMEDOUT:
        return f"{other} did not answer in time; check the address and the firewalls on the way"
    gone = isinstance(error, ssl.SSLError | ConnectionError | EOFError) or type(error).__name__ in _GONE
    if gone or number in (errno.ECONNRESET, errno.EPIPE):
        return (
            f"{other} broke the connection off; if it does so at once, it may have refused the certificate of this "
            "end: its log says why"
        )
    return f"the connection with {other} failed ({error}); try again"
