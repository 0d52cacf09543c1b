"""Importing users' files: each by its path, so that two files of one name stay two modules."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, TypeVar

from fedloom.errors import UsageError
from fedloom.fields import FORMERLY

Base = TypeVar("Base")
USERS = "fedloom_user_"  # begins the module names of users' files

# A function of one's own in a setting: `FILE.py:NAME`, and of a measure whether less is better: `FILE.py:NAME:low`.
FUNCTION = re.compile(r"(?P<file>.+\.py|python):(?P<name>[A-Za-z_]\w*)(:(?P<better>low|high))?")
GIVEN: dict[tuple[str, str], Callable[..., Any]] = {}  # those that were given in this process, by file and name
READ: dict[str, tuple[Path, bytes]] = {}  # by module: the file that it was imported from, and what stood in it
STALE: set[str] = set()  # modules that are imported anew when they are asked for next


def function_text(function: Callable[..., Any]) -> str:
    """What stands for a function in a setting: `FILE.py:NAME`, or `python:NAME` for one that no file gives again.

    Raises UsageError for one without a name of its own.
    """
    name = getattr(function, "__name__", "")
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise UsageError(f"{function!r} has no name that a record could call it by; give a function made by `def`")
    try:
        file = inspect.getsourcefile(function) or ""
    except TypeError:
        file = ""
    whole = getattr(function, "__qualname__", "") == name and Path(file).is_file()
    place = str(Path(file).resolve()) if whole and file.endswith(".py") else "python"
    GIVEN[place, name] = function
    return f"{place}:{name}"


def function_at(text: str) -> Callable[..., Any]:
    """The function of a setting. Raises UsageError where there is none."""
    found = FUNCTION.fullmatch(text)
    assert found is not None
    file, name = found["file"], found["name"]
    place = file if file == "python" else str(Path(file).resolve())
    if (place, name) in GIVEN:
        return GIVEN[place, name]
    if place == "python":
        raise UsageError(
            f"the function {name} was given in Python, where no file gives it again; write it into a file and name it "
            f"so: FILE.py:{name}"
        )
    module = module_at(Path(place), "measure")
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UsageError(f"{file} has no function {name!r} (it has: {', '.join(known) or 'none'})")
    return function


def class_in(module: types.ModuleType, base: type[Base]) -> type[Base]:
    """The one class of a file that derives from `base`; raises UsageError if there is none, or more than one."""
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UsageError(
            f"{module.__file__}: expected exactly one class derived from {base.__name__}, found {len(found)}"
        )
    return found[0]


def module_at(path: Path, what: str = "method") -> types.ModuleType:
    """The module of a user's file, imported once. Raises UsageError where there is no such file."""
    path = path.resolve()
    if not path.is_file():
        raise UsageError(f"no {what} file {path}")
    # The folder's digest keeps two users' files of one name apart; the last part is what a method is called by.
    package = f"{USERS}{hashlib.blake2b(str(path.parent).encode(), digest_size=4).hexdigest()}"
    name = f"{package}.{path.stem}"
    if package not in sys.modules:  # so that `from .neighbour import ...` works
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(path.parent)]
    if name not in sys.modules or name in STALE:
        aside = {one: sys.modules.pop(one) for one in _of(package) & STALE}
        try:
            _import(name, path)
        finally:
            for one, module in aside.items():  # objects of the former text still find it
                sys.modules.setdefault(one, module)
        for one in _of(package):  # this one, and those beside it that it imports
            if sys.modules[one] is not aside.get(one) and (one in STALE or one not in READ):
                file = Path(str(sys.modules[one].__file__))
                READ[one] = file, file.read_bytes()
                STALE.discard(one)
    return sys.modules[name]


def reread() -> None:
    """Has users' files that changed since they were imported, and all beside them, be imported anew when asked for.

    Called before a run: an edit counts in the next run of the same notebook, and never within one.
    """
    changed = [name for name, (file, text) in READ.items() if not file.is_file() or file.read_bytes() != text]
    for package in {name.partition(".")[0] for name in changed}:
        STALE.update(_of(package))


def _of(package: str) -> set[str]:
    return {name for name in sys.modules if name.startswith(f"{package}.")}


class _Text(SourceFileLoader):
    """Takes a file as it stands: a kept translation may be of a text that was there in the same second."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _import(name: str, path: Path) -> None:
    if path.suffix != ".py":
        raise UsageError(f"{path} is not a Python file")
    spec = importlib.util.spec_from_file_location(name, path, loader=_Text(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == FORMERLY:
            raise UsageError(f"{path} imports {FORMERLY}, which is called fedloom now: import that") from error
        raise
