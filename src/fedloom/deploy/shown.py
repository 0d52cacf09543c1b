"""What `fedloom certs show` tells of keys and certificates, and the warnings before they end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from cryptography import x509

from fedloom.deploy import files
from fedloom.deploy.authority import CERTIFICATE as OF_AUTHORITY
from fedloom.deploy.authority import ISSUED, Authority
from fedloom.deploy.certificate import (
    Certificate,
    Request,
    certificates_in,
    checked_authority,
    due,
    fingerprint,
    issued_by,
    moment,
    name_of,
)
from fedloom.deploy.certs import CERTIFICATE, KEY, REQUEST, Bundle, Held, renewal
from fedloom.errors import UsageError


@dataclass(frozen=True)
class Line:
    """What one certificate, request or authority says."""

    path: Path
    kind: Literal["certificate", "request", "authority"]
    name: str
    role: str
    organisation: str | None
    hosts: tuple[str, ...]
    since: datetime | None  # of a request: none
    until: datetime | None
    fingerprint: str

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        since, until = (None if one is None else one.isoformat() for one in (self.since, self.until))
        return dataclasses.asdict(self) | {"path": str(self.path), "since": since, "until": until}

    def warning(self, at: datetime) -> tuple[int, str] | None:
        """The mark that it has passed (30, 14 or 3 days before its end, 0 behind it) and a sentence; None before."""
        if self.until is None or (mark := due(self.until, at)) is None:
            return None
        of_party = self.kind == "certificate"
        whose = f"the certificate of the {self.role} {self.name}" if of_party else f"the authority {self.name!r}"
        left = (self.until - at).days
        when = "ended" if mark == 0 else f"ends in {left} day{'s' * (left != 1)},"
        how = f"renew it: {renewal(self.name)}" if of_party else "every party then needs the certificate of a new one"
        return mark, f"{whose} {when} on {moment(self.until)}; {how}"


def shown(path: Path) -> list[Line]:
    """What a file says (certificate, bundle, request), or a folder of a party, of an authority, or of such folders."""
    if not path.is_dir():
        return _of_file(path)
    if (path / OF_AUTHORITY).exists():
        ca = Authority(path)
        issued = [_of_certificate(path / ISSUED, one) for one in ca.issued()]
        return [_of_authority(path / OF_AUTHORITY, ca.certificate), *issued]
    if (path / KEY).exists():
        installed, asked = path / CERTIFICATE, next(path.glob(f"*{REQUEST}"), None)
        return _of_file(asked if asked and not installed.exists() else installed)[:1]
    inner = [one for one in sorted(path.iterdir()) if (one / KEY).exists() or (one / OF_AUTHORITY).exists()]
    if not inner:
        raise UsageError(f"{path} has neither keys nor certificates, nor folders that have")
    return [shown(one)[0] for one in inner]


def of_held(held: Held) -> Line:
    """What the certificate of a party's folder says."""
    return _of_certificate(held.folder / CERTIFICATE, held.bundle.certificate)


def _of_file(path: Path) -> list[Line]:
    content = files.read(path, "certificate or request")
    if b"CERTIFICATE REQUEST" in content:
        asked = Request.of(content, str(path))
        who, known = asked.identity, fingerprint(asked.key)
        return [Line(path, "request", who.name, who.role, who.organisation, asked.hosts, None, None, known)]
    if content.count(b"-----BEGIN ") == 2:
        bundle = Bundle.of(content, str(path))
        return [_of_certificate(path, bundle.certificate), _of_authority(path, bundle.authority)]
    (found,) = certificates_in(content, str(path), 1)
    if issued_by(found, found):
        return [_of_authority(path, checked_authority(found, str(path)))]
    return [_of_certificate(path, Certificate.of(found, str(path)))]


def _of_certificate(path: Path, one: Certificate) -> Line:
    who, known = one.identity, one.fingerprint
    return Line(path, "certificate", who.name, who.role, who.organisation, one.hosts, one.since, one.until, known)


def _of_authority(path: Path, ca: x509.Certificate) -> Line:
    since, until, known = ca.not_valid_before_utc, ca.not_valid_after_utc, fingerprint(ca.public_key())
    return Line(path, "authority", name_of(ca), "authority", None, (), since, until, known)
