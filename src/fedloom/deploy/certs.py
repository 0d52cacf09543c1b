"""A party's key, request and certificate: made where they are used, and checked against each other.

A party's folder has its private key (`key.pem`, mode 0600), what it asked for (`NAME.request.pem`), and what came back:
`certificate.pem`, its certificate and that of the authority.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from fedloom.deploy import files
from fedloom.deploy.authority import init
from fedloom.deploy.certificate import (
    Certificate,
    Request,
    certificates_in,
    checked_authority,
    fingerprint,
    issued_by,
    key_bytes,
    moment,
    name_of,
    new_key,
    read_key,
    request_of,
    today,
)
from fedloom.deploy.identity import AUTHORITY, Identity, Role, identity, named
from fedloom.errors import UsageError

KEY, CERTIFICATE, REQUEST = "key.pem", "certificate.pem", ".request.pem"
SERVER = "server"  # what the server of a laptop is called
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Bundle:
    """A party's certificate and that of the authority that signed it."""

    certificate: Certificate
    authority: x509.Certificate

    @staticmethod
    def of(content: bytes, what: str) -> Bundle:
        """Reads the bytes of a file; raises UsageError if it is no such bundle."""
        own, ca = certificates_in(content, what, 2)
        checked_authority(ca, f"the second certificate of {what}")
        if not issued_by(own, ca):
            raise UsageError(f"{what}: the certificate was not signed by the authority that came with it")
        return Bundle(Certificate.of(own, what), ca)

    def require_valid(self, what: str, at: datetime) -> None:
        """Raises UsageError before and after the time for which both are valid."""
        for whose, since, until in (
            (f"the certificate of the {self.certificate.identity}", self.certificate.since, self.certificate.until),
            (
                f"the authority {name_of(self.authority)!r}",
                self.authority.not_valid_before_utc,
                self.authority.not_valid_after_utc,
            ),
        ):
            if at < since:
                raise UsageError(f"{what}: {whose} is valid only from {moment(since)}; is this machine's clock right?")
            if at >= until:
                raise UsageError(
                    f"{what}: {whose} ended on {moment(until)}; ask for another: {renewal(self.identity.name)}"
                )

    @property
    def identity(self) -> Identity:
        """Who it is for."""
        return self.certificate.identity


@dataclass(frozen=True)
class Held:
    """What a party's folder holds, all of it checked: the key fits the certificate, which is valid now."""

    folder: Path
    bundle: Bundle

    @staticmethod
    def of(folder: Path, role: Role | None = None, at: datetime | None = None) -> Held:
        """Opens a party's folder; raises UsageError if it is not ready for use, or of another role."""
        key = read_key(folder / KEY)
        path = folder / CERTIFICATE
        if not path.exists():
            raise UsageError(
                f"{folder} has no certificate yet: mail its request to the authority, then install what comes back: "
                "fedloom certs install BUNDLE"
            )
        bundle = Bundle.of(files.read(path, "certificate"), str(path))
        if bundle.certificate.fingerprint != fingerprint(key.public_key()):
            raise UsageError(f"{path} is not for the key beside it")
        if role is not None and bundle.identity.role != role:
            raise UsageError(f"{folder} is that of the {bundle.identity}, and what is needed is a {role}'s")
        bundle.require_valid(str(path), at or today())
        return Held(folder, bundle)

    @property
    def identity(self) -> Identity:
        """Who it is for."""
        return self.bundle.identity


def request(
    folder: Path, name: str, role: str, hosts: Iterable[str] = (), organisation: str | None = None
) -> tuple[Request, Path]:
    """A new key in a new folder, and the request that may be mailed: what it asks for, and its file."""
    who = identity(role, name, organisation)
    key = new_key()
    asked = request_of(who, hosts, key)
    if (folder / KEY).exists():
        raise UsageError(f"{folder} has a key already; to ask again with that key: {renewal(name)}")
    with files.new_folder(folder) as aside:
        files.write(aside / KEY, key_bytes(key), private=True)
        files.write(aside / f"{name}{REQUEST}", asked.signed_by(key))
    return asked, folder / f"{name}{REQUEST}"


def renew(folder: Path, name: str, hosts: Sequence[str] = (), organisation: str | None = None) -> tuple[Request, Path]:
    """A request by the key that is there, for what it asked for before but for other hosts or another organisation."""
    path = folder / f"{named(name)}{REQUEST}"
    key, had = read_key(folder / KEY), read_request(path)
    who = had.identity if organisation is None else identity(had.identity.role, name, organisation)
    asked = request_of(who, hosts or had.hosts, key)
    files.write(path, asked.signed_by(key))
    return asked, path


def install(content: bytes, what: str, folder: Path, authority: str | None = None, at: datetime | None = None) -> Held:
    """Puts a bundle that came back beside the key that it is for.

    `authority` is the fingerprint of the authority's key, where it is known from elsewhere. Raises UsageError, and
    changes nothing, unless the bundle fits the key, what was asked for and the authority known so far, and is valid.
    """
    at = at or today()
    bundle = Bundle.of(content, what)
    key, path = read_key(folder / KEY), folder / CERTIFICATE
    asked = read_request(folder / f"{bundle.identity.name}{REQUEST}")
    if bundle.certificate.fingerprint != fingerprint(key.public_key()):
        raise UsageError(f"{what} is for another key than {folder / KEY}; is it that of another folder or request?")
    if (bundle.identity, bundle.certificate.hosts) != (asked.identity, asked.hosts):
        raise UsageError(
            f"{what} is for the {_said(bundle.identity, bundle.certificate.hosts)}, and what was asked for is the "
            f"{_said(asked.identity, asked.hosts)}"
        )
    ca = fingerprint(bundle.authority.public_key())
    if authority is not None and _digits(authority) != _digits(ca):
        raise UsageError(f"{what} is of an authority whose key is {ca}, and not {authority}: do not trust it")
    bundle.require_valid(what, at)
    if path.exists():
        before = Bundle.of(files.read(path, "certificate"), str(path))
        if fingerprint(before.authority.public_key()) != ca:
            raise UsageError(
                f"{what} is of another authority ({ca}) than {path} ({fingerprint(before.authority.public_key())}); "
                f"if the federation has a new one, remove {path} and install it again"
            )
        if before.certificate.until > bundle.certificate.until:
            raise UsageError(f"{what} is older than {path}, which is valid until {moment(before.certificate.until)}")
    files.write(path, content)
    return Held.of(folder, at=at)


def laptop(folder: Path, clients: Sequence[str], hosts: Sequence[str] = (), days: int = 90) -> list[Held]:
    """A whole federation in a new folder, for one machine: an authority, a server, and the clients of those names.

    The server answers at the loopback addresses, and at `hosts`. Who reads the folder has everybody's keys.
    """
    names = [*map(named, clients)]
    if not names:
        raise UsageError("a federation needs clients: --clients a,b,c")
    if len({name.lower() for name in (*names, SERVER)}) <= len(names):
        raise UsageError(f"every client needs a name of its own, and none {SERVER!r}: {', '.join(names)}")
    with files.new_folder(folder) as aside:
        authority = init(aside / AUTHORITY, folder.resolve().name)
        for name in (SERVER, *names):
            place, is_server = aside / name, name == SERVER
            asked, _ = request(place, name, "server" if is_server else "client", (*LOOPBACK, *hosts) * is_server)
            _, bundle = authority.sign(asked, days)
            install(bundle, str(place), place, authority.fingerprint)
    return [Held.of(folder / name) for name in (SERVER, *names)]


def read_request(path: Path) -> Request:
    """What stands in a request's file; raises UsageError."""
    return Request.of(files.read(path, "request"), str(path))


def renewal(name: str) -> str:
    """The command that asks for another certificate by the same key."""
    return f"fedloom certs request {name} --renew"


def _said(identity: Identity, hosts: Sequence[str]) -> str:
    return f"{identity} at {', '.join(hosts)}" if hosts else str(identity)


def _digits(fingerprint: str) -> str:
    return re.sub("[-: ]", "", fingerprint).lower()
