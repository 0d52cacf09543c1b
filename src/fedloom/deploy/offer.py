"""What a server tells clients of a run, its settings and which method with which text; and what they make of it.

No code travels, and no name that could become code: a method is named as the library, or the client's own settings,
name it, and counts only if its text is the same on both sides.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedloom._version import __version__
from fedloom.data.embedded import EMBEDDED
from fedloom.encoding import Pieces
from fedloom.engines.wired import name_of
from fedloom.errors import UsageError
from fedloom.method import Method, build
from fedloom.plugin import Plugin
from fedloom.registry import METHODS, known_as
from fedloom.runs.spec import Spec
from fedloom.site import Site

# Settings that concern the server alone, or each side by itself.
AT_SERVER = (
    "data", "init", "availability", "speed", "bandwidth", "latency", "step_seconds", "server_speed", "deadline",
    "overselect", "clock", "dropout", "lost", "participation", "track", "engine", "workers", "threads", "device",
    "max_seconds", "max_steps", "max_bytes", "max_virtual_seconds",
)  # fmt: skip
FILES = (".py", "/", "\\")  # what a text has that names a file


def offered(spec: Spec, method: Method, rows: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The offer of a run; raises UsageError where it has what cannot be offered.

    `rows` is what clients must know to bring rows of their own.
    """
    settings = dataclasses.asdict(spec)
    plain = {field.name: settings[field.name] for field in dataclasses.fields(Spec) if field.name not in AT_SERVER}
    plain |= {"method": _named(method)}
    for where, text in _texts(plain):
        if any(part in text for part in FILES):
            raise UsageError(
                f"{where}={text} names a file, and clients on machines of their own follow no file name that comes "
                "from the server; put it into a package that is installed on both sides (docs/extending.md)"
            )
    own = any(part in spec.data for part in FILES) or spec.in_python or lies_here(spec.data)
    data = {} if own else {"data": spec.data}
    return {"fedloom": __version__, "settings": plain | data, "texts": digests(method), "rows": rows}


def accepted(offer: Mapping[str, Any], methods: Mapping[str, Path]) -> tuple[Spec, Method]:
    """The settings of an offer, and the method as it is here; raises UsageError for what this side does not follow.

    `methods` are files of this side's own, by the names under which servers may ask for them.
    """
    if offer["fedloom"] != __version__:
        raise UsageError(
            f"the server has fedloom {offer['fedloom']}, and this client has {__version__}; install the same version "
            "on both sides"
        )
    settings: dict[str, Any] = dict(offer["settings"])
    for where, text in _texts(settings):
        if any(part in text for part in FILES):
            raise UsageError(f"the server names a file, {where}={text!r}; no file name from elsewhere is followed")
    spec = Spec.of(settings)
    method = _built(spec.method, methods)
    here = digests(method)
    for name, digest in offer["texts"].items():
        if here.get(name) != digest:
            raise UsageError(
                f"the method {name} has another text at the server than here; install the same version of it on both "
                "sides"
            )
    return dataclasses.replace(spec, method={"name": spec.method["name"], **method.fields()}), method


def lies_here(data: str) -> bool:
    """Whether data are a file or a folder of this machine, and no name that every side knows."""
    return data not in EMBEDDED and Path(data).expanduser().exists()


def network_of(site: Site) -> dict[str, str]:
    """What tells whether two sides have one network: digests of its `layout`, and of its `initial` weights."""
    return {"layout": site.initial.layout.digest, "initial": name_of(Pieces({"w": site.initial})).hex()}


def digests(method: Method) -> dict[str, str]:
    """A digest of the text of a method, and of those that it wraps, by name: of their files, and of their bases'."""
    found = {}
    for one in method.nested:
        texts = hashlib.blake2b(digest_size=16)
        for base in type(one).__mro__:
            if issubclass(base, Method) and base not in (Method, Plugin):
                try:
                    texts.update(Path(inspect.getsourcefile(base) or "").read_bytes())
                except (OSError, TypeError) as error:
                    raise UsageError(
                        f"the method {one.name()} has no file, and clients on machines of their own need one; write "
                        "it into a file"
                    ) from error
        found[one.name()] = texts.hexdigest()
    return found


def _named(method: Method) -> dict[str, Any]:
    """A method by its names alone, and its fields."""
    fields = {
        field.name: _named(value) if isinstance(value := getattr(method, field.name), Method) else value
        for field in dataclasses.fields(method)
    }
    return {"name": Path(known_as(type(method)) or method.name()).stem, **fields}


def _built(named: Mapping[str, Any], methods: Mapping[str, Path]) -> Method:
    """The method of this side that an offer names, with those that it wraps."""
    name = str(named.get("name"))
    if name not in methods and name not in METHODS:
        raise UsageError(
            f"the server asks for the method {name!r}, which is not here; install it, or name its file under "
            f'[methods] in the client\'s settings: {name} = "FILE.py"'
        )
    fields = {
        field: _built(value, methods) if isinstance(value, Mapping) and "name" in value else value
        for field, value in named.items()
        if field != "name"
    }
    return build(str(methods[name]) if name in methods else name, fields)


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every text in settings, and where it stands."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield where, str(key)
            yield from _texts(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, where)
