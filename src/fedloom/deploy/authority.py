"""The certificate authority of a federation: a folder with its key, its certificate and all that it has signed."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

from fedloom.deploy import files
from fedloom.deploy.certificate import (
    Certificate,
    Request,
    authority,
    certificates_in,
    fingerprint,
    issue,
    issued_by,
    key_bytes,
    moment,
    name_of,
    new_key,
    pem,
    read_authority,
    read_key,
    today,
)
from fedloom.deploy.identity import text
from fedloom.errors import UsageError
from fedloom.runs.writing import hold

KEY, CERTIFICATE, ISSUED = "key.pem", "ca.pem", "issued"
DIGITS = 6  # of the numbers of what was signed, in the names of the files
LIFE, LONGEST, LIFE_OF_PARTIES = 3652, 7305, 90  # days


class Authority:
    """Signs requests. Its folder may lie on a machine without a network, or on a stick in a safe."""

    def __init__(self, folder: Path):
        """Opens the folder; raises UsageError if it is none of an authority."""
        self.folder = folder
        if not (folder / CERTIFICATE).exists():
            raise UsageError(f"{folder} is no folder of a certificate authority; make one: fedloom certs init")
        self.certificate = read_authority(folder / CERTIFICATE)

    @property
    def name(self) -> str:
        """The federation."""
        return name_of(self.certificate)

    @property
    def fingerprint(self) -> str:
        """By which a party knows the authority: its key's."""
        return fingerprint(self.certificate.public_key())

    def issued(self) -> list[Certificate]:
        """All that it has signed, in this order."""
        found = []
        for path in sorted((self.folder / ISSUED).glob("*.pem")):  # their names begin with their number
            (one,) = certificates_in(files.read(path, "certificate"), str(path), 1)
            if not issued_by(one, self.certificate):
                raise UsageError(f"{path} was not signed by this authority; somebody put it there")
            found.append(Certificate.of(one, str(path)))
        return found

    def check(self, request: Request, new: bool = False) -> None:
        """Raises UsageError if a request is for a name that is another key's or role's, or by a key of another name.

        `new` allows another key for a name that had one.
        """
        wanted, key = request.identity, fingerprint(request.key)
        holder = key
        for one in self.issued():
            had = one.identity
            if had.name.lower() == wanted.name.lower():
                if (had.role, had.name) != (wanted.role, wanted.name):
                    raise UsageError(f"the name {wanted.name!r} is taken by the {had}; take one that differs in more")
                holder = one.fingerprint
            elif one.fingerprint == key:
                raise UsageError(f"this key is that of the {had}; the {wanted} needs one of its own")
        if holder != key and not new:
            raise UsageError(
                f"the name {wanted.name!r} was given to another key ({holder}; this one is {key}); if its owner says "
                "that the old key is gone, sign with --new-key"
            )

    def sign(
        self, request: Request, days: int = LIFE_OF_PARTIES, new: bool = False, at: datetime | None = None
    ) -> tuple[Certificate, bytes]:
        """The certificate for a request, and the bundle of it and the authority's own, for the mail back.

        It is valid for `days` days from `at` (default: now), and a day before, for slow clocks. Raises UsageError where
        `check` does, and if the authority's own certificate ends earlier.
        """
        at = at or today()
        if days < 1:
            raise UsageError(f"--days {days}: a certificate is valid for a day at least")
        if at + timedelta(days=days) > self.certificate.not_valid_after_utc:
            end = self.certificate.not_valid_after_utc
            most = max((end - at).days, 0)
            raise UsageError(f"the authority itself ends on {moment(end)}; take --days {most} at most")
        key = read_key(self.folder / KEY)
        if fingerprint(key.public_key()) != self.fingerprint:
            raise UsageError(f"{self.folder / KEY} is not the key of {self.folder / CERTIFICATE}")
        with hold(self.folder):
            self.check(request, new)
            made = issue(request, self.certificate, key, days, at)
            numbers = [int(path.name[:DIGITS]) for path in (self.folder / ISSUED).glob("[0-9]" * DIGITS + "-*.pem")]
            name = f"{max(numbers, default=0) + 1:0{DIGITS}}-{request.identity.name}.pem"
            files.write(self.folder / ISSUED / name, made.pem)
        return made, made.pem + pem(self.certificate)


def init(folder: Path, name: str, days: int = LIFE, at: datetime | None = None) -> Authority:
    """A new authority of a federation with that name, in a new folder; raises UsageError."""
    if not 1 <= days <= LONGEST:
        raise UsageError(f"--days {days}: an authority is valid for 1 to {LONGEST} days")
    name = text(name, "federation")
    with files.new_folder(folder) as aside:
        key = new_key()
        files.write(aside / KEY, key_bytes(key), private=True)
        files.write(aside / CERTIFICATE, pem(authority(name, key, days, at or today())))
        (aside / ISSUED).mkdir(mode=0o700)
    return Authority(folder)
