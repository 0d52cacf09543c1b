"""The files that a run reads besides its spec, and whether they are still what they were when it began."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedloom.errors import UsageError
from fedloom.runs.spec import Spec

PIECE = 1 << 20  # bytes that are read at a time
TRACE = "trace:"  # before the file of an availability, after which come options


def digests(spec: Spec) -> dict[str, dict[str, str]]:
    """What a run of this spec reads: by its path, as what, and its digest."""
    method, *others = spec.code
    found = {str(path): {"what": one["what"], "digest": digest(path)} for one in others for path in code(one)}
    found |= {str(path): {"what": "method", "digest": digest(path)} for path in code(method)}
    trace = spec.availability.partition(",")[0].removeprefix(TRACE)
    weights = [("file of initial weights", spec.init)] if spec.init else []
    for what, name in (("data", spec.data), ("availability", trace), *weights):
        if Path(name).is_absolute() and Path(name).exists():  # a spec that was settled has paths that hold anywhere
            found[name] = {"what": what, "digest": digest(Path(name))}
    return found


def code(method: Mapping[str, Any]) -> list[Path]:
    """The files that a method's mapping names, its fields' included, and those beside them that they import."""
    left = [Path(name).resolve() for name in _named(method) if name.endswith(".py")]
    found: list[Path] = []
    while left:
        path = left.pop()
        if path.is_file() and path not in found:
            found.append(path)
            left += _neighbours(path)
    return found


def _named(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from [inner] if name == "name" and isinstance(inner, str) else _named(inner)
    elif isinstance(value, str) and value.endswith(".py"):
        yield value


def _neighbours(path: Path) -> list[Path]:
    """What stands in `from .neighbour import ...` and `from . import neighbour`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return []  # importing it will tell
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names += [node.module] if node.module else [alias.name for alias in node.names]
    return [path.with_name(f"{name.partition('.')[0]}.py") for name in names]


def digest(path: Path) -> str:
    """A digest of a file, or of all files of a folder with their names."""
    whole = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())
    try:
        for file in files:
            own = hashlib.blake2b(digest_size=32)
            with file.open("rb") as opened:
                while piece := opened.read(PIECE):
                    own.update(piece)
            name = b"" if path == file else file.relative_to(path).as_posix().encode(errors="surrogateescape")
            whole.update(hashlib.blake2b(name, digest_size=32).digest() + own.digest())
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error
    return whole.hexdigest()


def foreign(methods: Iterable[Mapping[str, Any]], record: Path, trust: bool) -> None:
    """Raises UsageError if a folder names code outside the current folder, unless `trust` says that it is known."""
    here = Path.cwd().resolve()
    for path in (path for method in methods for path in code(method)):
        if not trust and not path.is_relative_to(here):
            raise UsageError(
                f"{record} names the code {path}, which is not in the current folder and would be executed; "
                "if you know it, go on from its folder, or add --trust (in Python: trust=True)"
            )


def checked(
    methods: Iterable[Mapping[str, Any]], begun: object, record: Path, anew: str, trust: bool = False
) -> list[str]:
    """Raises UsageError if what now lies where a record's runs read is something else; returns what is to be told.

    `begun` is what `digests` gave when they began, `anew` says how to begin again. Other code is gone on with where
    `trust` says so, other data never.
    """
    if begun is None:
        return [f"{record} does not say what its data and files were (an older version began it): not compared"]
    if not isinstance(begun, Mapping) or not all(isinstance(one, Mapping) for one in begun.values()):
        raise UsageError(f"the manifest of {record} is damaged: its inputs are no files with digests")
    changed = [path for path, one in begun.items() if not _same(path, one.get("digest"))]
    for path in changed:
        if begun[path].get("what") != "method":
            raise UsageError(
                f"the {begun[path].get('what')} {path} changed since {record} began; "
                f"put it back as it was, or begin anew: {anew}"
            )
    changed += [str(path) for method in methods for path in code(method) if str(path) not in begun]
    if changed and not trust:
        raise UsageError(
            f"the method's file {changed[0]} changed since {record} began; put it back as it was, begin anew ({anew}), "
            "or go on with the new one from here: add --trust (in Python: trust=True)"
        )
    return [f"{record} goes on with another {path} than it began with" for path in changed]


def _same(path: str, there: object) -> bool:
    return Path(path).exists() and digest(Path(path)) == there
