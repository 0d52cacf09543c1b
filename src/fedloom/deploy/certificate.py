"""Keys, requests and certificates as this library makes and reads them: ECDSA P-256, one URI, one usage."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedloom.deploy.files import read, read_private
from fedloom.deploy.identity import Identity, Role, hosts_of, identity, of_uris
from fedloom.errors import UsageError

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
except ImportError:
    raise UsageError('certificates need the extra: pip install "fedloom[net]"') from None

USAGES: dict[Role, ObjectIdentifier] = {
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
}
SLACK = timedelta(days=1)  # by which a clock may be slow at the other end
MARKS = (3, 14, 30)  # days before the end at which a warning is due

Key = ec.EllipticCurvePrivateKey


def new_key() -> Key:
    """A private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_bytes(key: Key) -> bytes:
    """A private key as PEM, for a file of mode 0600."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_key(path: Path) -> Key:
    """The private key in a file that nobody else may read; raises UsageError for anything else."""
    content = read_private(path, "private key")
    try:
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError) as error:  # no PEM, another algorithm, or one under a password
        raise UsageError(f"{path} is no private key without a password: {error}") from None
    if not isinstance(key, Key) or not _is_p256(key.public_key()):
        raise UsageError(f"{path} is no ECDSA key on the curve P-256; make one: fedloom certs request")
    return key


def fingerprint(key: object) -> str:
    """128 bits of the SHA-256 of a public key, in groups of four hexadecimal digits: a key's name for the telephone."""
    assert isinstance(key, ec.EllipticCurvePublicKey)
    whole = hashlib.sha256(
        key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ).hexdigest()
    return "-".join(whole[at : at + 4] for at in range(0, 32, 4))


@dataclass(frozen=True)
class Request:
    """What somebody asks a certificate for, as read from a request that its key has signed."""

    identity: Identity
    hosts: tuple[str, ...]  # that a server answers at; a client has none
    key: ec.EllipticCurvePublicKey

    @staticmethod
    def of(content: bytes, what: str) -> Request:
        """Reads a PEM file's bytes; raises UsageError for whatever is not exactly such a request."""
        require_blocks(content, what, "CERTIFICATE REQUEST", 1)
        with _reading(what):
            asked = x509.load_pem_x509_csr(content)
            own, key = asked.is_signature_valid, asked.public_key()
            kinds = {type(one.value) for one in asked.extensions}
            found = _of_extensions(asked.subject, asked.extensions, what)
        if not own:
            raise UsageError(f"{what} was not signed by its own key: it was changed on its way; ask for it again")
        if not isinstance(key, ec.EllipticCurvePublicKey) or not _is_p256(key):
            raise UsageError(f"{what} is of no ECDSA key on the curve P-256; make it with: fedloom certs request")
        if extra := kinds - {x509.SubjectAlternativeName, x509.ExtendedKeyUsage}:
            more = ", ".join(sorted(kind.__name__ for kind in extra))
            raise UsageError(f"{what} asks for more than a name in a role: {more}; make it with: fedloom certs request")
        return Request(*found, key)

    def signed_by(self, key: Key) -> bytes:
        """The request as PEM."""
        built = x509.CertificateSigningRequestBuilder(_subject(self.identity))
        for extension in _extensions(self.identity, self.hosts):
            built = built.add_extension(extension, critical=False)
        return built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def request_of(identity: Identity, hosts: Iterable[str], key: Key) -> Request:
    """A request of checked parts; raises UsageError if a server has no host, or a client one."""
    found = hosts_of(hosts)
    if identity.role == "server" and not found:
        raise UsageError("a server needs the name or address that its clients dial: --host fed.example.org")
    if identity.role == "client" and found:
        raise UsageError(f"a client dials out and is never dialled: leave --host {found[0]} out")
    return Request(identity, found, key.public_key())


@dataclass(frozen=True)
class Certificate:
    """A certificate of a client or a server."""

    identity: Identity
    hosts: tuple[str, ...]
    signed: x509.Certificate

    @property
    def since(self) -> datetime:
        """When it begins to be valid."""
        return self.signed.not_valid_before_utc

    @property
    def until(self) -> datetime:
        """When it ends."""
        return self.signed.not_valid_after_utc

    @property
    def fingerprint(self) -> str:
        """Its key's."""
        return fingerprint(self.signed.public_key())

    @property
    def pem(self) -> bytes:
        """For a file."""
        return pem(self.signed)

    @staticmethod
    def of(found: x509.Certificate, what: str) -> Certificate:
        """Reads what a certificate says; raises UsageError if this library would not have made it."""
        with _reading(what):
            key = found.public_key()
            said = _of_extensions(found.subject, found.extensions, what)
        if not isinstance(key, ec.EllipticCurvePublicKey) or not _is_p256(key):
            raise UsageError(f"{what} is of no ECDSA key on the curve P-256")
        return Certificate(*said, found)


def issue(request: Request, ca: x509.Certificate, key: Key, days: int, at: datetime) -> Certificate:
    """A certificate for what was asked, by the authority with that key, that ends `days` days after `at`."""
    asked = request.identity
    built = _begun(_subject(asked), ca.subject, request.key, max(at - SLACK, ca.not_valid_before_utc), days, at)
    built = built.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    built = built.add_extension(_key_usage(signs_certificates=False), critical=True)
    for extension in _extensions(asked, request.hosts):
        built = built.add_extension(extension, critical=False)
    identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    built = built.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
    )
    return Certificate(asked, request.hosts, built.sign(key, hashes.SHA256()))


def authority(name: str, key: Key, days: int, at: datetime) -> x509.Certificate:
    """The certificate of an authority, which signs clients and servers but no other authorities."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    built = _begun(subject, subject, key.public_key(), at - SLACK, days, at)
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    built = built.add_extension(_key_usage(signs_certificates=True), critical=True)
    return built.sign(key, hashes.SHA256())


def pem(found: x509.Certificate) -> bytes:
    """A certificate for a file."""
    return found.public_bytes(serialization.Encoding.PEM)


def certificates_in(content: bytes, what: str, count: int) -> list[x509.Certificate]:
    """The certificates of a PEM file, which has nothing else in it; raises UsageError."""
    require_blocks(content, what, "CERTIFICATE", count)
    with _reading(what):
        return x509.load_pem_x509_certificates(content)


def read_authority(path: Path) -> x509.Certificate:
    """The certificate of an authority in a file; raises UsageError."""
    (found,) = certificates_in(read(path, "certificate of an authority"), str(path), 1)
    return checked_authority(found, str(path))


def checked_authority(found: x509.Certificate, what: str) -> x509.Certificate:
    """An authority's own certificate, unchanged; raises UsageError if it is none."""
    try:
        found.verify_directly_issued_by(found)
        is_one = found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (InvalidSignature, *_UNREADABLE):
        is_one = False
    if not is_one:
        raise UsageError(f"{what} is not the certificate of an authority")
    return found


def issued_by(found: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether an authority signed a certificate."""
    try:
        found.verify_directly_issued_by(ca)
    except (InvalidSignature, *_UNREADABLE):
        return False
    return True


def name_of(ca: x509.Certificate) -> str:
    """The federation that an authority is of."""
    return _one(ca.subject, NameOID.COMMON_NAME) or "(without a name)"


def require_blocks(content: bytes, what: str, kind: str, count: int) -> None:
    """Raises UsageError unless a file has so many PEM blocks of a kind and no others: above all no private key."""
    if b"PRIVATE KEY-----" in content:
        raise UsageError(f"{what} holds a private key, which never leaves its machine and belongs into no mail")
    begins, ours = content.count(b"-----BEGIN "), content.count(f"-----BEGIN {kind}-----".encode())
    if (begins, ours) != (count, count):
        words = kind.lower() + ("" if count == 1 else "s")
        raise UsageError(f"{what} is not what was expected, a PEM file with {count} {words}: it has {ours} of {begins}")


def today() -> datetime:
    """The time, in whole seconds, as certificates have it."""
    return datetime.now(UTC).replace(microsecond=0)


def moment(at: datetime) -> str:
    """A time as it stands in sentences and tables."""
    return f"{at:%Y-%m-%d %H:%M} UTC"


def due(until: datetime, at: datetime) -> int | None:
    """The mark that a certificate has passed: 30, 14 or 3 days before its end, 0 behind it; None before all of them."""
    if at >= until:
        return 0
    return next((mark for mark in MARKS if until - at <= timedelta(days=mark)), None)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Around parsing what others have made: whatever is wrong with it is a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except _UNREADABLE as error:
        raise UsageError(f"{what} cannot be read: {error}") from None


_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, since: datetime, days: int, at: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number(), since, at + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )  # fmt: skip


def _subject(identity: Identity) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, one) for one in [identity.organisation] if one is not None]
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, identity.name)])


def _extensions(identity: Identity, hosts: Iterable[str]) -> list[x509.ExtensionType]:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return [x509.SubjectAlternativeName(names), x509.ExtendedKeyUsage([USAGES[identity.role]])]


def _of_extensions(subject: x509.Name, given: x509.Extensions, what: str) -> tuple[Identity, tuple[str, ...]]:
    """Identity and hosts, both ways: what `_subject` and `_extensions` make of them is what is there."""
    names = given.get_extension_for_class(x509.SubjectAlternativeName).value
    usages = given.get_extension_for_class(x509.ExtendedKeyUsage).value
    found = of_uris(names.get_values_for_type(x509.UniformResourceIdentifier), _one(subject, NameOID.ORGANIZATION_NAME))
    if found is None:
        raise UsageError(f"{what} does not say who it is for: it has not exactly one name of the form {_FORM}")
    hosts = hosts_of(str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress))
    if usages != x509.ExtendedKeyUsage([USAGES[found.role]]):
        raise UsageError(f"{what} says that it is for the {found}, but its key may be used for something else")
    if names != _extensions(found, hosts)[0] or subject != _subject(found):
        raise UsageError(f"{what} has other names beside that of the {found}; make it with: fedloom certs request")
    if bool(hosts) != (found.role == "server"):
        raise UsageError(f"{what} has hosts that do not go with the role: a server has one or more, a client none")
    return found, hosts


_FORM = identity("client", "NAME").uri + " or " + identity("server", "NAME").uri


def _one(subject: x509.Name, kind: ObjectIdentifier) -> str | None:
    values = [str(attribute.value) for attribute in subject.get_attributes_for_oid(kind)]
    return values[0] if len(values) == 1 else None


def _is_p256(key: ec.EllipticCurvePublicKey) -> bool:
    return isinstance(key.curve, ec.SECP256R1)


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
