"""Importing users' files: each by its path, so that two files of one name stay two modules."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import TypeVar

from fedloom.errors import UsageError
from fedloom.fields import FORMERLY

Base = TypeVar("Base")
USERS = "fedloom_user_"  # begins the module names of users' files


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
