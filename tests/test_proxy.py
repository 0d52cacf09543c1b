"""Clients that dial through a proxy: a tunnel, in which certificates reach from end to end, or one clear sentence."""

import contextlib
import logging
import re
import socket
import threading
import time
from concurrent.futures import CancelledError

import pytest
from federation import Federation, keys, spec_of
from proxying import Connecting
from test_deploy import left, serial
from test_remote import difference

from fedloom.deploy.config import ClientConfig
from fedloom.deploy.line import Line
from fedloom.deploy.proxy import Proxy
from fedloom.deploy.tls import client_context, server_context
from fedloom.errors import Unreachable, Untrusted, UsageError

# A server that stops leaves connections that were just being made to the system.
pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

PASSWORD = "ge:heim/%@"
CODED = "ge%3Aheim%2F%25%40"


class Through(Federation):
    """A federation whose clients dial through a proxy."""

    proxy = ""

    def config_of(self, name):
        at = super().config_of(name)
        at.write_text(f'proxy = "{self.proxy}"\n' + at.read_text())
        return at


@pytest.mark.parametrize("known", [None, f"north:{PASSWORD}"])
def test_a_run_through_a_proxy_has_the_same_bits(certificates, tmp_path, known):
    federation = Through(tmp_path, certificates, 2)
    with Connecting(known) as proxy:
        federation.proxy = f"http://{f'north:{CODED}@' if known else ''}127.0.0.1:{proxy.port}"
        made = federation.run(spec_of())
    assert difference(left(made.record), left(serial(spec_of(), 2))) is None
    assert len(proxy.opened) >= 4  # each client looks who is there, and then asks
    assert {*proxy.opened} == {f"localhost:{federation.port}"}
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".toml"]
    for secret in (PASSWORD, CODED, "bm9ydGg6"):
        assert not any(secret.encode() in path.read_bytes() for path in kept)


@pytest.fixture
def line(certificates):
    """`line(proxy, to)`: a client's end of the line, through a proxy."""
    made = []

    def dialled(text, to=1):
        proxy = Proxy.of(text, "localhost")
        made.append(Line(("localhost", to), client_context(certificates / "a"), None, proxy))
        return made[-1]

    yield dialled
    for one in made:
        one.close()


REFUSALS = {
    "a password is wanted": (
        "x:y", None, "", UsageError,
        r"the proxy at 127.0.0.1:PORT wants a name and a password; give them as proxy = \"http://NAME:PASSWORD@127.0",
    ),
    "another password": (
        "x:y", None, f"x:{CODED}@", UsageError,
        "the proxy at 127.0.0.1:PORT does not accept the name and password in the client's settings; mend them",
    ),
    "it refuses": (
        None, b"HTTP/1.1 403 Forbidden\r\n\r\n", "", UsageError,
        r"the proxy at 127.0.0.1:PORT does not let this client through to localhost:1 \(403 Forbidden\); have CONNECT",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("how", ["verify", "ask"])
def test_a_proxy_that_refuses_is_told_in_a_sentence_at_once(line, case, how, caplog):
    known, answer, user, kind, sentence = REFUSALS[case]
    with Connecting(known, answer) as proxy, caplog.at_level(logging.DEBUG):
        one = line(f"http://{user}127.0.0.1:{proxy.port}")
        with pytest.raises(kind, match=sentence.replace("PORT", str(proxy.port))) as raised:
            one.verify() if how == "verify" else one.ask("/v1/hello", {})
    assert PASSWORD not in str(raised.value) + caplog.text
    assert CODED not in str(raised.value) + caplog.text
    assert not isinstance(raised.value, Untrusted)


TROUBLES = {
    "nobody is there": (None, r"the proxy at 127.0.0.1:PORT cannot be reached \(.*efused.*\); check proxy in the"),
    "the server is not there": (b"", r"does not reach the server at localhost:1 \(502 Bad Gateway\); is the server"),
    "it is no proxy": (b"220 smtp ready\r\n\r\n", "answered nothing that opens a tunnel; is it a proxy that knows"),
    "it hangs up": (b"HTTP/1.1", "answered nothing that opens a tunnel"),
}


@pytest.mark.parametrize("case", TROUBLES)
def test_a_proxy_in_trouble_is_dialled_again(line, case, caplog):
    answer, sentence = TROUBLES[case]
    with Connecting(answer=answer or None) as proxy:
        port = proxy.port
        if answer is None:
            proxy.__exit__()
        one = line(f"http://127.0.0.1:{port}")
        ended = []

        def verified():
            with contextlib.suppress(CancelledError):  # when the line is closed
                one.verify()
                ended.append(True)

        thread = threading.Thread(target=verified, daemon=True)
        with caplog.at_level(logging.WARNING):
            thread.start()
            until = time.monotonic() + 10
            while "trying again" not in caplog.text and time.monotonic() < until:
                time.sleep(0.05)
        assert not ended and thread.is_alive()
        assert len(caplog.records) == 1
        said = caplog.records[0].getMessage()
        caplog.clear()
    assert re.search(sentence.replace("PORT", str(port)), said), said


@pytest.mark.parametrize("how", ["verify", "ask"])
def test_a_proxy_that_looks_into_tls_is_refused(line, tmp_path, how):
    own = server_context(keys(tmp_path) / "server")  # of an authority of its own
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def look():
            with contextlib.suppress(OSError):
                while True:
                    end, _ = listening.accept()
                    with contextlib.suppress(OSError):
                        own.wrap_socket(end, server_side=True).close()

        threading.Thread(target=look, daemon=True).start()
        with Connecting(to=listening.getsockname()[1]) as proxy:
            one = line(f"http://127.0.0.1:{proxy.port}")
            with pytest.raises(Untrusted, match=r"was not signed by this federation's authority: .* in between"):
                one.verify() if how == "verify" else one.ask("/v1/hello", {})


def test_a_proxy_that_goes_away_meanwhile_is_named(line):
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    with pytest.raises(Unreachable, match=f"the proxy at 127.0.0.1:{port} cannot be reached"):
        line(f"http://127.0.0.1:{port}").ask("/v1/beat", {}, patient=False)


@pytest.mark.parametrize(
    "text",
    ["proxy.org:3128", "https://proxy.org:3128", "http://proxy.org", "http://x:y@:3128", "http://a:99999", "http://a:1/b",
     "socks5://a:1", "", "http://[::1:3"],
)  # fmt: skip
def test_what_is_no_proxy_is_refused_without_being_shown(text):
    with pytest.raises(UsageError, match=r"proxy is no address of a proxy; give it as \"http://HOST:PORT\"") as raised:
        Proxy.of(text, "localhost")
    assert not text or text not in str(raised.value)


def test_what_stands_in_an_address_of_a_proxy():
    assert Proxy.of(f"http://me:{CODED}@[::1]:3128/", "x") == Proxy("::1", 3128, "me", PASSWORD)
    assert Proxy.of("http://proxy.org:8", "x") == Proxy("proxy.org", 8)
    assert Proxy.of("http://[::1]:3128", "x").place == "[::1]:3128"
    assert Proxy.of(None, "x") is None


def test_the_environment_counts_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy.org:3128")
    monkeypatch.setenv("no_proxy", "inside.org")
    assert Proxy.of(None, "fed.org") is None
    assert Proxy.of("environment", "fed.org") == Proxy("proxy.org", 3128)
    assert Proxy.of("environment", "inside.org") is None
    monkeypatch.delenv("https_proxy")
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    with pytest.raises(UsageError, match="https_proxy is not set there"):
        Proxy.of("environment", "fed.org")


def test_a_password_is_shown_nowhere(tmp_path):
    at = tmp_path / "a.toml"
    at.write_text(f'server = "localhost:1"\nproxy = "http://me:{CODED}@proxy.org:3128"\n[data]\nshare = true\n')
    config = ClientConfig.read(at)
    for shown in (repr(config), str(Proxy.of(config.proxy, "x"))):
        assert CODED not in shown and PASSWORD not in shown
