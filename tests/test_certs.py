"""Keys, requests, certificates: what is made, what is refused, and what lies on the disk."""

import hashlib
import json
import os
import re
import shutil
import stat
import sys
from datetime import timedelta

import pytest

pytest.importorskip("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedloom.cli import main
from fedloom.deploy import authority, certs, files
from fedloom.deploy.authority import Authority
from fedloom.deploy.certificate import Request, due, fingerprint, read_key, today
from fedloom.deploy.certs import Held, install, laptop, renew, request
from fedloom.deploy.identity import Identity, hosts_of, identity, named, of_uris
from fedloom.deploy.shown import shown
from fedloom.errors import UsageError

NOW = today()
posix = pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def tree(folder):
    """What lies in a folder: every path with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def ca(tmp_path):
    return authority.init(tmp_path / "authority", "Clinics")


@pytest.fixture
def north(tmp_path, ca):
    """A client's folder with its certificate."""
    folder = tmp_path / "north"
    asked, _ = request(folder, "north", "client", (), "North Clinic")
    install(ca.sign(asked)[1], "bundle", folder)
    return folder


# The way of a request through the mail


def test_a_request_goes_by_mail_through_three_folders(tmp_path):
    """The authority, a client and a server each see their own folder and the mail."""
    ca = authority.init(tmp_path / "safe" / "ca", "Clinics")
    mail = tmp_path / "mail"
    mail.mkdir()
    for role, name, hosts in (("client", "north", ()), ("server", "hub", ("Fed.Example.org", "10.0.0.7", "::0001"))):
        site = tmp_path / f"at {name}"
        _, path = request(site, name, role, hosts, f"{name} & Söhne")
        sent = mail / "in.pem"
        sent.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # as mail does to text
        before = tree(site)
        asked = certs.read_request(sent)
        made, bundle = Authority(ca.folder).sign(asked)
        assert tree(site) == before and b"PRIVATE" not in sent.read_bytes() + bundle
        held = install(bundle.replace(b"\n", b"\r\n"), "bundle", site, ca.fingerprint)
        assert held.identity == made.identity == Identity(role, name, f"{name} & Söhne")
        assert made.hosts == (("fed.example.org", "10.0.0.7", "::1") if hosts else ())
        assert made.fingerprint == fingerprint(asked.key) == fingerprint(read_key(site / "key.pem").public_key())
        assert Held.of(site, role) == held
        sent.unlink()
    assert [one.identity.name for one in ca.issued()] == ["north", "hub"]


def test_what_a_certificate_says(ca, tmp_path):
    made = {}
    for role, name, hosts in (("client", "a", ()), ("server", "hub", ("localhost", "::1"))):
        asked, _ = request(tmp_path / name, name, role, hosts, "Org")
        made[role], _ = ca.sign(asked, at=NOW)
    for role, usage in (("client", ExtendedKeyUsageOID.CLIENT_AUTH), ("server", ExtendedKeyUsageOID.SERVER_AUTH)):
        found = made[role].signed
        of = {type(one.value): one.value for one in found.extensions}
        assert of[x509.ExtendedKeyUsage] == x509.ExtendedKeyUsage([usage])
        assert not of[x509.BasicConstraints].ca
        assert of[x509.KeyUsage].digital_signature and not of[x509.KeyUsage].key_cert_sign
        assert isinstance(found.public_key().curve, ec.SECP256R1)
        assert found.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value == "Org"
        assert found.not_valid_after_utc == NOW + timedelta(days=90)
        assert found.not_valid_before_utc <= NOW
        names = of[x509.SubjectAlternativeName]
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        assert uri == {"client": "fedloom:client/a", "server": "fedloom:server/hub"}[role]
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["::1"]
    constraints = ca.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and constraints.value.ca and constraints.value.path_length == 0
    assert 3650 <= (ca.certificate.not_valid_after_utc - NOW).days <= 3653


def test_serial_numbers_are_random(ca, tmp_path):
    asked, _ = request(tmp_path / "a", "a", "client")
    serials = {ca.sign(asked)[0].signed.serial_number for _ in range(4)}
    assert len(serials) == 4 and min(serials) > 1 << 64


def test_a_slow_clock_is_borne_but_not_before_the_authority(ca, tmp_path):
    asked, _ = request(tmp_path / "a", "a", "client")
    late = ca.sign(asked, at=NOW + timedelta(days=30))[0]
    assert late.since == NOW + timedelta(days=29)
    early = ca.sign(asked, at=ca.certificate.not_valid_before_utc + timedelta(hours=1))[0]
    assert early.since == ca.certificate.not_valid_before_utc


# The disk


@posix
def test_keys_are_for_their_owner_alone(tmp_path, ca, north):
    assert mode(north / "key.pem") == mode(ca.folder / "key.pem") == 0o600
    assert mode(north) == mode(ca.folder) == mode(ca.folder / "issued") == 0o700
    laptop(tmp_path / "fed", ["a"])
    assert {mode(path) for path in (tmp_path / "fed").rglob("key.pem")} == {0o600}
    assert {mode(path) for path in (tmp_path / "fed").rglob("*") if path.is_dir()} == {0o700}


@posix
@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o660, 0o644])
def test_a_key_that_others_may_read_is_refused(tmp_path, ca, north, bits):
    (north / "key.pem").chmod(bits)
    with pytest.raises(UsageError, match=rf"mode {bits:04o}.*chmod 600"):
        Held.of(north)
    with pytest.raises(UsageError, match="may be read by others"):
        renew(north, "north")
    asked, _ = request(tmp_path / "b", "b", "client")
    (ca.folder / "key.pem").chmod(bits)
    with pytest.raises(UsageError, match="may be read by others"):
        ca.sign(asked)
    (north / "key.pem").chmod(0o400)
    assert Held.of(north).identity.name == "north"


@posix
@pytest.mark.parametrize("bits", [0o720, 0o702, 0o777])
def test_a_folder_that_others_may_change_is_refused(north, bits):
    north.chmod(bits)
    with pytest.raises(UsageError, match=r"others may write to .*chmod 700"):
        Held.of(north)
    north.chmod(0o755)
    assert Held.of(north)


def test_nothing_is_overwritten(tmp_path, ca, north):
    before = tree(tmp_path)
    for attempt, words in (
        (lambda: request(north, "north", "client"), "has a key already.*--renew"),
        (lambda: authority.init(ca.folder, "Clinics"), "nothing is overwritten"),
        (lambda: laptop(tmp_path, ["a"]), "nothing is overwritten"),
        (lambda: authority.init(north / "key.pem", "Clinics"), "nothing is overwritten"),
    ):
        with pytest.raises(UsageError, match=words):
            attempt()
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert request(tmp_path / "empty", "e", "client")[1].exists()  # a folder that was made for it
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="nothing is overwritten"):
        request(tmp_path / "link", "l", "client")


def test_nothing_is_half_written(tmp_path, monkeypatch, ca, north):
    """A failure at any write leaves all files as they were."""
    real, left = files.write_aside, 0

    def fails(*given, **how):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        real(*given, **how)

    before = tree(tmp_path)
    monkeypatch.setattr(files, "write_aside", fails)
    for target, attempt in (
        ("fed", lambda: laptop(tmp_path / "fed", ["a", "b"])),
        ("b", lambda: request(tmp_path / "b", "b", "client")),
        ("north", lambda: renew(north, "north")),
    ):
        for count in range(30):
            left = count
            try:
                attempt()
            except UsageError as error:
                assert "No space left on device" in str(error)
                assert tree(tmp_path) == before
            else:
                break
        assert 1 <= count < 29, target
        if target != "north":
            shutil.rmtree(tmp_path / target)


def test_what_a_kill_left_is_cleared(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "key.pem").write_text("an old key")
    request(tmp_path / "a", "a", "client")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["a.request.pem", "key.pem"]


# Names


@pytest.mark.parametrize("name", ["a", "A-1", "north.clinic_2", "0", "x" * 64])
def test_names_that_are_names(name):
    assert named(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "x" * 65, "a b", "ä", "a/b", "../a", ".a", "a.", "-a", "a-", "a\n", "a\0", "\u0430", "a:b", "a,b", "CA", "ca"],
)
def test_names_that_are_none(name, tmp_path):
    with pytest.raises(UsageError, match=r"is no name|is the folder of the certificate authority"):
        named(name)
    with pytest.raises(UsageError):
        request(tmp_path / "x", name, "client")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", " ", " a", "a ", "a\nb", "x" * 65, "a\u202eb", "a\x1b[31m"])
def test_organisations_that_are_none(text, tmp_path):
    with pytest.raises(UsageError, match="is no name of an organisation"):
        identity("client", "a", text)
    with pytest.raises(UsageError, match="is no name of a federation"):
        authority.init(tmp_path / "ca", text)


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ("Fed.Example.org", "fed.example.org"),
        ("fed.example.org.", "fed.example.org"),
        ("localhost", "localhost"),
        ("fed_server", "fed_server"),
        ("10.0.0.1", "10.0.0.1"),
        ("2001:DB8::0:1", "2001:db8::1"),
    ],
)
def test_hosts(given, host):
    assert hosts_of([given, host]) == (host,)


@pytest.mark.parametrize(
    "host",
    ["", "*.example.org", "https://fed.example.org", "fed:8443", "a b", "münchen.de", "-a.org", "a..b", "x" * 64,
     "300.0.0.1", "1.2.3", ".".join(["x" * 60] * 5), "a.org\n"],
)  # fmt: skip
def test_hosts_that_are_none(host):
    with pytest.raises(UsageError, match=r"is no host.*without scheme"):
        hosts_of([host])


def test_a_server_has_hosts_and_a_client_has_none(tmp_path):
    with pytest.raises(UsageError, match="a server needs the name"):
        request(tmp_path / "hub", "hub", "server")
    with pytest.raises(UsageError, match=r"leave --host a\.org out"):
        request(tmp_path / "a", "a", "client", ["a.org"])
    with pytest.raises(UsageError, match="unknown role 'servr'; did you mean 'server'"):
        request(tmp_path / "a", "a", "servr", ["a.org"])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("uris", "found"),
    [
        (["fedloom:client/a"], Identity("client", "a")),
        (["fedloom:server/a.b"], Identity("server", "a.b")),
        (["https://x.org", "fedloom:client/a"], Identity("client", "a")),
        ([], None),
        (["fedloom:client/a", "fedloom:client/a"], None),
        (["Fedloom:client/a"], None),
        (["fedloom:client/a/"], None),
        (["fedloom:other/a"], None),
    ],
)
def test_what_a_uri_says(uris, found):
    assert of_uris(uris, None) == found


# What the authority refuses to sign


def forged(key=None, subject=(), names=("fedloom:client/a",), usages=(ExtendedKeyUsageOID.CLIENT_AUTH,), more=()):
    """A request as somebody may write it by other means."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    parts = [x509.NameAttribute(kind, value) for kind, value in subject or [(NameOID.COMMON_NAME, "a")]]
    built = x509.CertificateSigningRequestBuilder(x509.Name(parts))
    general = [name if isinstance(name, x509.GeneralName) else x509.UniformResourceIdentifier(name) for name in names]
    if general:
        built = built.add_extension(x509.SubjectAlternativeName(general), critical=False)
    if usages:
        built = built.add_extension(x509.ExtendedKeyUsage(list(usages)), critical=False)
    for extension in more:
        built = built.add_extension(extension, critical=False)
    return built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


DNS, SERVER = x509.DNSName("fed.example.org"), ExtendedKeyUsageOID.SERVER_AUTH


def test_a_request_of_other_means_that_says_the_same_is_taken():
    assert Request.of(forged(), "it").identity == Identity("client", "a")
    found = Request.of(forged(names=("fedloom:server/a", DNS), usages=(SERVER,)), "it")
    assert (found.identity, found.hosts) == (Identity("server", "a"), ("fed.example.org",))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"usages": (SERVER,)}, "may be used for something else"),
        ({"usages": (ExtendedKeyUsageOID.CLIENT_AUTH, SERVER)}, "may be used for something else"),
        ({"usages": (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)}, "may be used for something else"),
        ({"usages": ()}, "cannot be read"),
        ({"names": ()}, "cannot be read"),
        ({"names": ("https://a.org",)}, "does not say who it is for"),
        ({"names": ("fedloom:client/a", "fedloom:client/b")}, "does not say who it is for"),
        ({"names": ("fedloom:client/a", "fedloom:server/a")}, "does not say who it is for"),
        ({"names": ("fedloom:client/..",)}, "does not say who it is for"),
        ({"names": ("fedloom:client/a", "https://a.org")}, "has other names beside"),
        ({"names": ("fedloom:client/a", x509.RFC822Name("a@a.org"))}, "has other names beside"),
        ({"names": ("fedloom:client/a", DNS)}, "has hosts that do not go with the role"),
        ({"names": ("fedloom:server/a",), "usages": (SERVER,)}, "has hosts that do not go with the role"),
        ({"names": ("fedloom:server/a", x509.DNSName("*.org")), "usages": (SERVER,)}, "is no host"),
        ({"subject": [(NameOID.COMMON_NAME, "b")]}, "has other names beside"),
        ({"subject": [(NameOID.COMMON_NAME, "a"), (NameOID.COUNTRY_NAME, "DE")]}, "has other names beside"),
        ({"subject": [(NameOID.ORGANIZATION_NAME, n) for n in "xy"] + [(NameOID.COMMON_NAME, "a")]}, "has other names"),
        ({"more": (x509.BasicConstraints(ca=True, path_length=None),)}, "asks for more than .*: BasicConstraints"),
        ({"more": (x509.OCSPNoCheck(),)}, "asks for more than .*: OCSPNoCheck"),
        ({"key": ec.generate_private_key(ec.SECP384R1())}, "no ECDSA key on the curve P-256"),
        ({"key": rsa.generate_private_key(65537, 2048)}, "no ECDSA key on the curve P-256"),
    ],
)  # fmt: skip
def test_a_request_must_have_one_name_in_one_role_and_nothing_else(how, words):
    with pytest.raises(UsageError, match=words):
        Request.of(forged(**how), "it")


def test_a_request_that_was_changed_on_its_way_is_refused():
    whole = x509.load_pem_x509_csr(forged()).public_bytes(serialization.Encoding.DER)
    other = whole.replace(b"fedloom:client/a", b"fedloom:client/b").replace(b"\x0c\x01a", b"\x0c\x01b")
    assert other != whole
    changed = x509.load_der_x509_csr(other).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(UsageError, match="was not signed by its own key"):
        Request.of(changed, "it")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it has 0 of 0"),
        (b"hello", "it has 0 of 0"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "cannot be read"),
        (forged() + forged(), "it has 2 of 2"),
    ],
)
def test_what_is_no_request(content, words):
    with pytest.raises(UsageError, match=words):
        Request.of(content, "it")


def test_a_private_key_in_the_mail_is_told(north, ca):
    key, bundle = (north / "key.pem").read_bytes(), (north / "certificate.pem").read_bytes()
    for content in (forged() + key, key):
        with pytest.raises(UsageError, match="holds a private key, which never leaves its machine"):
            Request.of(content, "it")
    with pytest.raises(UsageError, match="holds a private key"):
        install(bundle + key, "it", north)


def test_a_name_belongs_to_one_key(tmp_path, ca, north):
    for name in ("north", "North"):
        asked, _ = request(tmp_path / f"{name}2", name, "client")
        with pytest.raises(UsageError, match=r"the name '[nN]orth' (was given to another key|is taken by)"):
            ca.sign(asked)
    asked, _ = request(tmp_path / "as server", "north", "server", ["a.org"])
    with pytest.raises(UsageError, match="the name 'north' is taken by the client north of North Clinic"):
        ca.sign(asked, new=True)  # not even so
    assert [one.identity.name for one in ca.issued()] == ["north"]
    again, _ = renew(north, "north")
    assert again.identity == Identity("client", "north", "North Clinic")
    assert ca.sign(again, days=91)[0].fingerprint == ca.issued()[0].fingerprint  # the same key may come again


def test_a_lost_key_is_replaced_when_told(tmp_path, ca, north):
    asked, _ = request(tmp_path / "north2", "north", "client")
    _, bundle = ca.sign(asked, new=True)
    assert install(bundle, "it", tmp_path / "north2").identity.name == "north"
    ca.sign(renew(tmp_path / "north2", "north")[0])  # it is the name's from then on
    with pytest.raises(UsageError, match="was given to another key"):
        ca.sign(renew(north, "north")[0])
    with pytest.raises(UsageError, match="is for another key"):
        install(bundle, "it", north)


def test_a_key_belongs_to_one_name(ca, north):
    key = read_key(north / "key.pem")
    asked = Request.of(forged(key, [(NameOID.COMMON_NAME, "b")], ("fedloom:client/b",)), "it")
    with pytest.raises(UsageError, match="this key is that of the client north of North Clinic; the client b needs"):
        ca.sign(asked)


@pytest.mark.parametrize("days", [0, -1, 4000])
def test_days_that_do_not_go(tmp_path, ca, days):
    asked, _ = request(tmp_path / "a", "a", "client")
    with pytest.raises(UsageError, match=r"--days -?\d+"):
        ca.sign(asked, days)
    assert not ca.issued()
    with pytest.raises(UsageError, match="an authority is valid for 1 to"):
        authority.init(tmp_path / "other", "x", days * 10)


def test_the_authority_trusts_its_own_folder_no_further(tmp_path, ca, north):
    other = authority.init(tmp_path / "other", "Clinics")
    asked, _ = request(tmp_path / "b", "b", "client")
    made, _ = other.sign(asked)
    (ca.folder / "issued" / "b.pem").write_bytes(made.pem)
    with pytest.raises(UsageError, match="was not signed by this authority"):
        ca.sign(asked)
    (ca.folder / "issued" / "b.pem").unlink()
    shutil.copy(other.folder / "key.pem", ca.folder / "key.pem")
    with pytest.raises(UsageError, match="is not the key of"):
        ca.sign(asked)
    with pytest.raises(UsageError, match="is no folder of a certificate authority; make one"):
        Authority(tmp_path)
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "ca.pem").write_bytes(made.pem)
    with pytest.raises(UsageError, match="is not the certificate of an authority"):
        Authority(tmp_path / "fake")


# What a party refuses to install


def refused(content, folder, words, **how):
    before = tree(folder)
    with pytest.raises(UsageError, match=words):
        install(content, "it", folder, **how)
    assert tree(folder) == before


def test_a_bundle_must_fit_the_key_the_request_and_the_authority(tmp_path, ca):
    folder = tmp_path / "a"
    asked, path = request(folder, "a", "client", (), "Org")
    made, bundle = ca.sign(asked)
    own, root = made.pem, bundle.removeprefix(made.pem)
    key = read_key(folder / "key.pem")
    for name, role, organisation, hosts in (
        ("a", "server", "Org", ("a.org",)), ("a", "client", None, ()), ("a", "client", "Other", ()),
    ):  # fmt: skip
        other = authority.init(tmp_path / f"ca {role} {organisation}", "Clinics")
        wrong = certs.request_of(identity(role, name, organisation), hosts, key)
        refused(other.sign(wrong)[1], folder, "and what was asked for is the client a of Org")
    refused(own, folder, "it has 1 of 1")
    refused(root + own, folder, "is not the certificate of an authority")
    refused(own + own, folder, "is not the certificate of an authority")
    stranger = authority.init(tmp_path / "stranger", "Clinics")
    refused(
        own + (stranger.folder / "ca.pem").read_bytes(), folder, "was not signed by the authority that came with it"
    )
    theirs, _ = request(tmp_path / "b", "b", "client")
    refused(ca.sign(theirs)[1], folder, "b.request.pem is not there")
    twin, _ = request(tmp_path / "twin", "a", "client", (), "Org")
    refused(stranger.sign(twin)[1], folder, "is for another key than")
    refused(bundle, folder, "do not trust it", authority=stranger.fingerprint)
    refused(bundle, folder, "do not trust it", authority=ca.fingerprint[:-4])
    refused(bundle, folder, "do not trust it", authority="")
    held = install(bundle, "it", folder, ca.fingerprint.upper().replace("-", ":"))
    assert held.bundle.authority == ca.certificate
    refused(stranger.sign(asked, new=True)[1], folder, "is of another authority")
    path.unlink()
    refused(bundle, folder, "no request")


def signed(key, subject, by, issuer, ca):
    """A certificate of other means, by whatever key, that says it is an authority's or says it is not."""
    built = x509.CertificateBuilder(issuer, subject, key.public_key(), 7, NOW - timedelta(days=1), NOW + timedelta(9))
    return built.add_extension(x509.BasicConstraints(ca, None), critical=True).sign(by, hashes.SHA256())


def test_an_authority_has_signed_itself_and_says_that_it_is_one(tmp_path):
    root, below = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("root", "below")]
    (tmp_path / "it").mkdir()
    for key, name, ca, is_one in ((root, 0, True, True), (root, 0, False, False), (below, 1, True, False)):
        made = signed(key, names[name], root, names[0], ca)
        (tmp_path / "it/ca.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        if is_one:
            assert Authority(tmp_path / "it").name == "root"
        else:
            with pytest.raises(UsageError, match="is not the certificate of an authority"):
                Authority(tmp_path / "it")


def test_a_fingerprint_is_the_beginning_of_the_hash_of_the_key(ca):
    key = ca.certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert ca.fingerprint.replace("-", "") == hashlib.sha256(key).hexdigest()[:32]
    assert re.fullmatch("([0-9a-f]{4}-){7}[0-9a-f]{4}", ca.fingerprint)


def test_a_bundle_for_other_hosts_is_refused(tmp_path, ca):
    folder = tmp_path / "hub"
    asked, _ = request(folder, "hub", "server", ["a.org"])
    other = certs.request_of(asked.identity, ["a.org", "evil.org"], read_key(folder / "key.pem"))
    refused(
        ca.sign(other)[1],
        folder,
        r"server hub at a\.org, evil\.org, and what was asked for is the server hub at a\.org",
    )


def test_a_bundle_is_installed_within_its_time(tmp_path, ca):
    folder = tmp_path / "a"
    asked, _ = request(folder, "a", "client")
    _, bundle = ca.sign(asked, 10, at=NOW)
    refused(bundle, folder, "ended on .*--renew", at=NOW + timedelta(days=10))
    refused(bundle, folder, "valid only from .*clock", at=NOW - timedelta(days=2))
    install(bundle, "it", folder)
    assert Held.of(folder, at=NOW + timedelta(days=10, seconds=-1))
    with pytest.raises(UsageError, match="ended on"):
        Held.of(folder, at=NOW + timedelta(days=10))


def test_a_certificate_is_renewed_and_not_set_back(tmp_path, ca):
    folder = tmp_path / "hub"
    asked, _ = request(folder, "hub", "server", ["old.org"])
    _, old = ca.sign(asked, 10)
    install(old, "it", folder)
    key = (folder / "key.pem").read_bytes()
    again, path = renew(folder, "hub", ["new.org"])
    assert again.identity == asked.identity and again.hosts == ("new.org",)
    _, new = ca.sign(certs.read_request(path), 90)
    assert install(new, "it", folder).bundle.certificate.hosts == ("new.org",)
    assert (folder / "key.pem").read_bytes() == key
    renew(folder, "hub", ["old.org"])
    refused(old, folder, "is older than")
    with pytest.raises(UsageError, match="a key already"):
        request(folder, "hub", "server", ["old.org"])
    assert renew(folder, "hub")[0].hosts == ("old.org",)  # as it was asked for before


def test_a_folder_must_be_ready_for_use(tmp_path, ca, north):
    with pytest.raises(UsageError, match=r"key.pem is not there: no private key"):
        Held.of(tmp_path / "nowhere")
    request(tmp_path / "new", "new", "client")
    with pytest.raises(UsageError, match=r"has no certificate yet.*fedloom certs install"):
        Held.of(tmp_path / "new")
    with pytest.raises(
        UsageError, match="is that of the client north of North Clinic, and what is needed is a server's"
    ):
        Held.of(north, "server")
    shutil.copy(tmp_path / "new/key.pem", north / "key.pem")
    with pytest.raises(UsageError, match="is not for the key beside it"):
        Held.of(north)


@pytest.mark.parametrize(
    "key",
    [
        b"nothing",
        ec.generate_private_key(ec.SECP384R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
        ),
    ],
)
def test_what_is_no_key(tmp_path, key):
    path = tmp_path / "key.pem"
    path.write_bytes(key)
    path.chmod(0o600)
    with pytest.raises(UsageError, match=r"is no (private key without a password|ECDSA key)"):
        read_key(path)


def test_what_is_too_long_is_not_read(tmp_path):
    (tmp_path / "long.pem").write_bytes(forged() + b" " * files.LARGEST)
    with pytest.raises(UsageError, match="has more than 65536 bytes"):
        certs.read_request(tmp_path / "long.pem")
    with pytest.raises(UsageError, match="cannot read"):
        certs.read_request(tmp_path)


# A laptop, and what is shown


def test_a_laptop_has_a_whole_federation(tmp_path):
    held = laptop(tmp_path / "fed", ["a", "b", "c"], ["my.host"], 5)
    assert [str(one.identity) for one in held] == ["server server", "client a", "client b", "client c"]
    assert held[0].bundle.certificate.hosts == ("localhost", "127.0.0.1", "::1", "my.host")
    assert len({one.bundle.certificate.fingerprint for one in held}) == 4
    assert {one.bundle.authority for one in held} == {Authority(tmp_path / "fed/ca").certificate}
    assert not list(tmp_path.rglob("*partial*"))
    assert held[1].bundle.certificate.until - today() <= timedelta(days=5)


@pytest.mark.parametrize("clients", [[], [""], ["a", "a"], ["a", "A"], ["server"], ["ca"], ["a", "../b"]])
def test_a_laptop_with_names_that_do_not_go(tmp_path, clients):
    with pytest.raises(UsageError):
        laptop(tmp_path / "fed", clients)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("left", "mark"),
    [
        (timedelta(days=30, seconds=1), None),
        (timedelta(days=30), 30),
        (timedelta(days=14, seconds=1), 30),
        (timedelta(days=14), 14),
        (timedelta(days=3, seconds=1), 14),
        (timedelta(days=3), 3),
        (timedelta(seconds=1), 3),
        (timedelta(0), 0),
        (timedelta(days=-9), 0),
    ],
)
def test_a_warning_is_due_at_30_14_and_3_days(left, mark, north):
    (line,) = shown(north)
    assert due(NOW + left, NOW) == mark
    warned = line.warning(line.until - left)
    assert (warned and warned[0]) == mark
    if warned:
        assert re.fullmatch(
            r"the certificate of the client north (ended|ends in \d+ days?,) on .* UTC; renew it: "
            r"fedloom certs request north --renew", warned[1]
        )  # fmt: skip


def test_what_is_shown_of_files_and_folders(tmp_path, ca, north):
    _, path = request(tmp_path / "hub", "hub", "server", ["a.org"])
    names = [(line.kind, line.name, line.role, line.organisation, line.hosts) for line in shown(tmp_path)]
    first = ("authority", "Clinics", "authority", None, ())
    client = ("certificate", "north", "client", "North Clinic", ())
    assert names == [first, ("request", "hub", "server", None, ("a.org",)), client]
    assert [line.kind for line in shown(ca.folder)] == ["authority", "certificate"]
    assert [line.name for line in shown(north / "certificate.pem")] == ["north", "Clinics"]
    assert shown(ca.folder / "ca.pem")[0].fingerprint == ca.fingerprint
    (issued,) = (ca.folder / "issued").iterdir()
    assert shown(issued)[0].fingerprint == shown(north)[0].fingerprint
    assert shown(path)[0].until is None and shown(path)[0].warning(NOW) is None
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match="has neither keys nor certificates"):
        shown(tmp_path / "nothing")
    with pytest.raises(UsageError, match="holds a private key"):
        shown(north / "key.pem")


# The commands


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    return tmp_path


def said(capsys, *words, code=0):
    assert main(["certs", *words]) == code
    told = capsys.readouterr()
    return told.err if code else told.out


def test_the_commands_from_request_to_show(here, capsys):
    known = re.search(r"fingerprint: (\S+)", said(capsys, "init", "Clinics"))[1]
    said(capsys, "request", "hub", "--role", "server", "--host", "fed.example.org", "--host", "10.0.0.1")
    told = said(capsys, "request", "north", "--organisation", "North Clinic")
    assert "client north of North Clinic" in told
    for name in ("hub", "north"):
        path = f"certs/{name}/{name}.request.pem"
        assert "nobody is here to be asked" in said(capsys, "sign", path, code=2)
        assert not (here / f"certs/{name}/{name}.bundle.pem").exists()
        assert f"{name}.bundle.pem; mail it back" in said(capsys, "sign", path, "--yes")
        assert "nothing is overwritten" in said(capsys, "sign", path, "--yes", code=2)
        assert "do not trust it" in said(
            capsys, "install", f"certs/{name}/{name}.bundle.pem", "--authority", "0" * 32, code=2
        )
        said(capsys, "install", f"certs/{name}/{name}.bundle.pem", "--authority", known)
    lines = said(capsys, "show").splitlines()
    assert [line.split()[0] for line in lines] == ["name", "Clinics", "hub", "north"]
    assert known in lines[1] and "fed.example.org, 10.0.0.1" in lines[2]
    shown_as = json.loads(said(capsys, "show", "certs/north", "--json"))
    assert shown_as[0]["role"] == "client" and shown_as[0]["warning"] is None
    assert Held.of(here / "certs/hub", "server") and Held.of(here / "certs/north", "client")
    assert len(Authority(here / "certs/ca").issued()) == 2


def test_who_says_no_signs_nothing(here, capsys, monkeypatch):
    said(capsys, "init", "Clinics")
    said(capsys, "request", "north")
    monkeypatch.setattr("fedloom.cli.certs._at_terminal", lambda: True)
    monkeypatch.setattr("fedloom.cli.certs.typer.confirm", lambda question: False)
    assert "nothing was signed" in said(capsys, "sign", "certs/north/north.request.pem", code=2)
    assert not Authority(here / "certs/ca").issued()
    monkeypatch.setattr("fedloom.cli.certs.typer.confirm", lambda question: "for Clinics" in question)
    said(capsys, "sign", "certs/north/north.request.pem")
    assert len(Authority(here / "certs/ca").issued()) == 1


def test_one_command_makes_a_laptops_federation(here, capsys):
    assert "fed/b: client b" in said(capsys, "laptop", "fed", "--clients", "a,b", "--days", "20")
    told = said(capsys, "show", "fed")
    assert told.count("\nwarning: the certificate of the ") == 3
    assert "ends in 19 days" in told or "ends in 20 days" in told
    assert "already" in said(capsys, "laptop", "fed", "--clients", "a,b", code=2)


def test_certs_alone_says_what_there_is(capsys):
    told = said(capsys)
    assert all(command in told for command in ("init", "request", "sign", "install", "show", "laptop"))


def test_without_the_extra_it_is_named():
    import subprocess

    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from fedloom.cli import main; sys.exit(main(['certs', 'init', 'x']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and 'pip install "fedloom[net]"' in ended.stderr
