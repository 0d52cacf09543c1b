"""The settings of a server and of a client: what is not what it should be is said in a sentence, with its file."""

import pytest

from fedloom.deploy.config import ClientConfig, ServerConfig, address
from fedloom.errors import UsageError

SERVER = 'clients = ["a", "b"]\n'
CLIENT = 'server = "localhost:8443"\n[data]\nshare = true\n'


def server(tmp_path, text):
    (tmp_path / "server.toml").write_text(text)
    return ServerConfig.read(tmp_path / "server.toml")


def client(tmp_path, text):
    (tmp_path / "client.toml").write_text(text)
    return ClientConfig.read(tmp_path / "client.toml")


def test_what_is_left_out_has_its_default(tmp_path):
    made = server(tmp_path, SERVER)
    assert (made.clients, made.listen, made.certificates) == (("a", "b"), "0.0.0.0:8443", "certs/server")
    assert (made.rounds.deadline, made.rounds.quorum, made.rounds.enough) == (None, 1, 1.0)
    assert (made.rounds.start, made.rounds.lease, made.reply_bytes, made.folder) == (None, 60.0, 1 << 30, tmp_path)
    assert made.rounds.patience == 24 * 60 * 60
    other = client(tmp_path, CLIENT)
    assert (other.server, other.server_name, other.state, other.device) == ("localhost:8443", None, "state", "cpu")
    assert other.data.share and other.data.file is None and other.methods == {} and other.threads == 1


def test_what_is_given_is_taken(tmp_path):
    made = server(
        tmp_path,
        SERVER + 'listen = "[::1]:9"\nreply_bytes = 5\n[rounds]\ndeadline = 30\nquorum = 2\nenough = 0.5\nlease = 2\n'
        "start = 1\npatience = 7\n",
    )
    assert (made.rounds.deadline, made.rounds.quorum, made.rounds.enough) == (30.0, 2, 0.5)
    assert (made.rounds.lease, made.rounds.start, made.reply_bytes) == (2.0, 1, 5)
    assert made.rounds.patience == 7.0
    (tmp_path / "m.py").write_text("")
    other = client(tmp_path, 'server = "h:1"\nthreads = 3\n[data]\nfile = "x.csv"\n[methods]\nmine = "m.py"\n')
    assert (other.data.file, other.methods, other.threads) == ("x.csv", {"mine": "m.py"}, 3)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("localhost:8443", "localhost", 8443), ("10.0.0.7:1", "10.0.0.7", 1), ("[::1]:9", "::1", 9)],
)
def test_addresses(text, host, port):
    assert address(text, "listen") == (host, port)


@pytest.mark.parametrize(
    "text", ["localhost", "localhost:", ":8443", "https://h:1", "h:99999", "::1:8", "h:1/x", "h:-1"]
)
def test_what_is_no_address(text):
    with pytest.raises(UsageError, match=r"listen=.* is no address; give host and port"):
        address(text, "listen")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "server.toml lacks clients"),
        ("clients = []", "clients is empty"),
        ('clients = ["a", "a"]', "clients has a twice"),
        ('clients = "a"', "expected a list of texts"),
        ("clients = [1]", "expected a list of texts"),
        ('clients = ["a/b"]', "is no name for a client"),
        ("clients = [", "is no TOML"),
        (SERVER + 'listen = "nowhere"', "is no address"),
        (SERVER + "listen = 8443", "listen"),
        (SERVER + "listn = 1", "did you mean 'listen'"),
        (SERVER + "folder = 1", "unknown setting 'folder'"),
        (SERVER + 'reply_bytes = "much"', "reply_bytes"),
        (SERVER + "rounds = 3", r"expected a table: \[rounds\]"),
        (SERVER + "[rounds]\nleese = 3", "did you mean 'rounds.lease'"),
        (SERVER + "[rounds]\nlease = 0.5", "rounds.lease is 0.5; it must be at least 1 second"),
        (SERVER + "[rounds]\nquorum = 0", "rounds.quorum is 0; it must be at least 1"),
        (SERVER + "[rounds]\nquorum = 3", "rounds.quorum is 3, and there are 2 clients"),
        (SERVER + "[rounds]\nstart = 3", "rounds.start is 3, and there are 2 clients"),
        (SERVER + "[rounds]\nstart = 0", "rounds.start is 0; it must be at least 1"),
        (SERVER + "[rounds]\nenough = 0.0", "rounds.enough is 0.0; it must be a share"),
        (SERVER + "[rounds]\nenough = 1.5", "rounds.enough is 1.5; it must be a share"),
        (SERVER + "[rounds]\ndeadline = 0", "rounds.deadline is 0.0; it must be seconds above 0"),
        (SERVER + '[rounds]\nquorum = "two"', "rounds.quorum"),
        (SERVER + "[rounds]\npatience = 0", "rounds.patience is 0.0; it must be seconds above 0"),
        (SERVER + "[rounds]\npatience = inf", "rounds.patience is inf; it must be a finite number"),
    ],
)
def test_what_a_server_must_not_be_told(text, expected, tmp_path):
    with pytest.raises(UsageError, match=expected) as told:
        server(tmp_path, text)
    assert "server.toml" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[data]\nshare = true", "client.toml lacks server"),
        ('server = "h:1"', r"\[data\] has nothing; give one of"),
        ('server = "h:1"\n[data]\nshare = true\nfile = "x"', "has share and file; give one of"),
        ('server = "h:1"\n[data]\nfile = "x"\nloader = "y"', "has file and loader; give one of"),
        ('server = "h:1"\n[data]\nfil = "x"', "did you mean 'data.file'"),
        ('server = "h:1"\ndata = 3', r"expected a table: \[data\]"),
        ('server = "h"\n[data]\nshare = true', "is no address"),
        (CLIENT + '[methods]\nmine = "nowhere.py"', "methods.mine: there is no file .*nowhere.py"),
        (CLIENT + "[methods]\nmine = 3", "expected a table of texts"),
        ("threads = 0\n" + CLIENT, "threads is 0; it must be at least 1"),
        ("stat = 1\n" + CLIENT, "did you mean 'state'"),
    ],
)
def test_what_a_client_must_not_be_told(text, expected, tmp_path):
    with pytest.raises(UsageError, match=expected) as told:
        client(tmp_path, text)
    assert "client.toml" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("kind", [ServerConfig, ClientConfig])
def test_a_file_that_is_not_there_is_named(kind, tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*nowhere.toml"):
        kind.read(tmp_path / "nowhere.toml")
