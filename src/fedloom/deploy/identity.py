"""Who a certificate speaks for: one name in one role, and the hosts that a server answers at."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from fedloom.errors import UsageError, unknown

Role = Literal["client", "server"]
SCHEME = "fedloom"  # of the URI in a certificate that says role and name
AUTHORITY = "ca"  # the folder beside those of the parties, which no party may be called

_NAME = re.compile("[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_DNS = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")
_LONGEST = 64  # characters of an organisation, as X.520 has it


@dataclass(frozen=True)
class Identity:
    """A name in a role, and the organisation that it belongs to, if one is named."""

    role: Role
    name: str
    organisation: str | None = None

    @property
    def uri(self) -> str:
        """What stands in the certificate, among its alternative names."""
        return f"{SCHEME}:{self.role}/{self.name}"

    def __str__(self) -> str:
        return f"{self.role} {self.name}" + (f" of {self.organisation}" if self.organisation else "")


def identity(role: str, name: str, organisation: str | None = None) -> Identity:
    """The identity of checked parts; raises UsageError."""
    for known in get_args(Role):
        if role == known:
            return Identity(known, named(name), None if organisation is None else text(organisation, "organisation"))
    raise unknown("role", role, get_args(Role))


def of_uris(uris: Iterable[str], organisation: str | None) -> Identity | None:
    """The identity that exactly one of the URIs of a certificate gives, or None."""
    ours = [uri for uri in uris if uri.lower().startswith(f"{SCHEME}:")]
    if len(ours) != 1:
        return None
    role, _, name = ours[0].removeprefix(f"{SCHEME}:").partition("/")
    try:
        return identity(role, name, organisation)
    except UsageError:
        return None


def named(name: str) -> str:
    """The name of a party, unchanged; raises UsageError if it is none."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for a client or server: take 1 to 64 of the letters A to Z, digits, '-', '.' and "
            "'_', a letter or digit first and last"
        )
    if name.lower() == AUTHORITY:
        raise UsageError(f"{name!r} is the folder of the certificate authority; take another name")
    return name


def text(given: str, what: str) -> str:
    """The name of an organisation or federation, unchanged; raises UsageError if it is none."""
    if not given.strip() or given != given.strip() or len(given) > _LONGEST or not given.isprintable():
        raise UsageError(
            f"{given!r} is no name of {'an' if what[0] in 'aeiou' else 'a'} {what}: take 1 to {_LONGEST} printable "
            "characters, no space first or last"
        )
    return given


def hosts_of(given: Iterable[str]) -> tuple[str, ...]:
    """DNS names (in lower case) and IP addresses, each once, in their order; raises UsageError for anything else."""
    found = []
    for host in given:
        try:
            found.append(str(ipaddress.ip_address(host)))
        except ValueError:
            name = host.lower().rstrip(".")
            if not _DNS.fullmatch(name) or name.rpartition(".")[2].isdigit():
                raise UsageError(
                    f"{host!r} is no host: give the name that clients dial, such as fed.example.org, or an IP address, "
                    "without scheme, port and '*' (names with other letters in their xn-- form)"
                ) from None
            found.append(name)
    return tuple(dict.fromkeys(found))
