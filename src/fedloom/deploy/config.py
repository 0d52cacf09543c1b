"""What a server, or a client, is told by its own file: TOML, whose paths are seen from the folder that it lies in."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedloom.deploy.identity import named
from fedloom.errors import UsageError, unknown
from fedloom.fields import coerced

C = TypeVar("C")
ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\s\[\]/]+):(?P<port>\d{1,5})")
GIB = 1 << 30


def address(text: str, where: str) -> tuple[str, int]:
    """Host and port of `fed.example.org:8443`, of IPv6 `[::1]:8443`; raises UsageError."""
    found = ADDRESS.fullmatch(text)
    if found is None or int(found["port"]) > 65535:
        raise UsageError(f"{where}={text!r} is no address; give host and port, such as fed.example.org:8443")
    return found["host"].strip("[]"), int(found["port"])


@dataclass(frozen=True)
class Rounds:
    """When a call of a round is over although not all have answered."""

    deadline: float | None = None  # seconds that a call lasts at most, once `quorum` have answered
    quorum: int = 1  # replies without which no call ends, nor a run goes on
    enough: float = 1.0  # share of those asked whose answers end a call; the others' are not taken
    start: int | None = None  # registered clients with which the first round begins (default: all)
    lease: float = 60.0  # seconds without a sign of life after which nobody waits for a client
    patience: float = 86400.0  # seconds that a run waits for silent clients without which it cannot go on

    def __post_init__(self) -> None:
        _typed(self, "rounds.")
        for name, holds, expected in (
            ("deadline", self.deadline is None or self.deadline > 0, "seconds above 0"),
            ("quorum", self.quorum >= 1, "at least 1"),
            ("start", self.start is None or self.start >= 1, "at least 1"),
            ("enough", 0 < self.enough <= 1, "a share above 0, at most 1"),
            ("lease", self.lease >= 1, "at least 1 second"),
            ("patience", self.patience > 0, "seconds above 0"),
        ):
            if not holds:
                raise UsageError(f"rounds.{name} is {getattr(self, name)}; it must be {expected}")


@dataclass(frozen=True)
class ServerConfig:
    """The settings of a server."""

    folder: Path  # that the file lies in
    clients: tuple[str, ...]  # names in the clients' certificates; the first is client 0 of the run, and so on
    listen: str = "0.0.0.0:8443"  # address and port
    certificates: str = "certs/server"  # folder of its certificate and key
    reply_bytes: int = GIB  # of an answer, at most
    rounds: Rounds = field(default_factory=Rounds)

    def __post_init__(self) -> None:
        _typed(self, "")
        address(self.listen, "listen")
        for name in self.clients:
            named(name)
        if not self.clients:
            raise UsageError("clients is empty; list the names in the clients' certificates")
        if twice := [name for name in self.clients if self.clients.count(name) > 1]:
            raise UsageError(f"clients has {twice[0]} twice; each certificate has one seat")
        for name in ("quorum", "start"):
            value = getattr(self.rounds, name)
            if value is not None and value > len(self.clients):
                raise UsageError(f"rounds.{name} is {value}, and there are {len(self.clients)} clients")

    @staticmethod
    def read(path: Path) -> ServerConfig:
        """From a file; raises UsageError for what it must not have, with what it may."""
        told, rounds = _read(path, ServerConfig), dict[str, Any]()
        if "rounds" in told:
            rounds = {"rounds": _made(Rounds, told.pop("rounds"), "rounds.", path)}
        return _made(ServerConfig, told | rounds, "", path, folder=path.resolve().parent)


@dataclass(frozen=True)
class DataConfig:
    """Where a client's data are: one of these."""

    share: bool = False  # of the data that the run's settings name: for trials, in which every side can read them all
    file: str | None = None  # a file, as `fedloom run --data` takes it
    loader: str | None = None  # a function that gives them: FILE.py:NAME

    def __post_init__(self) -> None:
        _typed(self, "data.")
        given = [name for name in ("share", "file", "loader") if getattr(self, name)]
        if len(given) != 1:
            raise UsageError(
                f'[data] has {" and ".join(given) or "nothing"}; give one of: file = "...", loader = '
                '"site.py:load", or share = true for a trial on data that every side has'
            )


@dataclass(frozen=True)
class ClientConfig:
    """The settings of a client."""

    folder: Path  # that the file lies in
    server: str  # address and port
    data: DataConfig
    server_name: str | None = None  # name in the server's certificate (default: any server of the federation)
    certificates: str = "certs/client"  # folder of its certificate and key
    state: str = "state"  # folder of what it remembers
    device: str = "cpu"  # cpu, cuda or auto
    threads: int = 1
    proxy: str | None = field(default=None, repr=False)  # http://NAME:PASSWORD@HOST:PORT, or "environment"
    methods: Mapping[str, str] = field(default_factory=dict)  # files of its own by the names that a server may ask for

    def __post_init__(self) -> None:
        _typed(self, "")
        address(self.server, "server")
        if self.threads < 1:
            raise UsageError(f"threads is {self.threads}; it must be at least 1")
        for name, file in self.methods.items():
            if not (self.folder / file).is_file():
                raise UsageError(f"methods.{name}: there is no file {self.folder / file}")

    @staticmethod
    def read(path: Path) -> ClientConfig:
        """From a file; raises UsageError for what it must not have, with what it may."""
        told = _read(path, ClientConfig)
        data = _made(DataConfig, told.pop("data", {}), "data.", path)
        return _made(ClientConfig, told, "", path, folder=path.resolve().parent, data=data)


def _read(path: Path, kind: type[Any]) -> dict[str, Any]:
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}") from error
    known = [one.name for one in dataclasses.fields(kind) if one.name != "folder"]
    for name in told:
        if name not in known:
            raise UsageError(f"{path}: {unknown('setting', name, known)}")
    return told


def _made(kind: type[C], told: Any, where: str, path: Path, **more: Any) -> C:
    known = [one.name for one in dataclasses.fields(kind) if one.name != "folder"]  # type: ignore[arg-type]
    if not isinstance(told, dict):
        raise UsageError(f"{path}: {where.rstrip('.')} is {told!r}; expected a table: [{where.rstrip('.')}]")
    for name in told:
        if name not in known:
            raise UsageError(f"{path}: {unknown('setting', where + name, [where + one for one in known])}")
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    given = plain | more
    for one in dataclasses.fields(kind):  # type: ignore[arg-type]
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING and one.name not in given:
            raise UsageError(f"{path} lacks {where}{one.name}")
    try:
        return kind(**given)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _typed(one: Any, where: str) -> None:
    """Makes the fields of settings what their types say; raises UsageError."""
    for name, hint in typing.get_type_hints(type(one)).items():
        value = getattr(one, name)
        if hint in (bool, int, float, str, float | None, int | None, str | None):
            object.__setattr__(one, name, coerced(f"{where}{name}", value, hint))
        elif hint == tuple[str, ...] and not (
            isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(part, str) for part in value)
        ):
            raise UsageError(f"{where}{name} is {value!r}; expected a list of texts")
        elif hint == Mapping[str, str] and not (
            isinstance(value, Mapping) and all(isinstance(part, str) for part in value.values())
        ):
            raise UsageError(f"{where}{name} is {value!r}; expected a table of texts")
