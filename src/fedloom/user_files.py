"""Importing users' files: each by its path, so that two files of one name stay two modules."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fedloom.errors import UsageError
from fedloom.fields import FORMERLY

Base = TypeVar("Base")
USERS = "fedloom_user_"  # begins the module names of users' files

# A function of one's own in a setting: `FILE.py:NAME`, and of a measure whether less is better: `FILE.py:NAME:low`.
FUNCTION = re.compile(r"(?P<file>.+\.py|python):(?P<name>[A-Za-z_]\w*)(:(?P<better>low|high))?")
GIVEN: dict[tuple[str, str], Callable[..., Any]] = {}  # those that were given in this process, by file and name


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
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise UsageError(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == FORMERLY:
                raise UsageError(f"{path} imports {FORMERLY}, which is called fedloom now: import that") from error
            raise
    return sys.modules[name]
