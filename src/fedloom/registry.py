"""The methods by name, read from their files without importing them: the folder `fedloom/methods` is the registry.

Installed packages add methods by entry points, users by files of their own. Nothing here imports torch or a package's
code, so that listing methods is immediate.
"""

from __future__ import annotations

import ast
import importlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from fedloom.errors import UsageError
from fedloom.members import Offer, Registry
from fedloom.sources import declared, declared_by
from fedloom.user_files import USERS, class_in, module_at

Base = TypeVar("Base")
LIBRARY = "fedloom.methods."  # begins the module names of the library's methods


@dataclass(frozen=True)
class Entry:
    """A method's file as the registry sees it, read without importing it."""

    name: str
    folder: str
    path: Path

    @property
    def home(self) -> str:
        """The folder of a method of the library, the package that adds it, or nothing for a user's file."""
        return self.folder

    @property
    def doc(self) -> str:
        """The docstring of the method's class."""
        return ast.get_docstring(self._class()) or ""

    @property
    def question(self) -> str:
        """The docstring's first line: the question that the method answers."""
        return self.doc.partition("\n")[0]

    def fields(self) -> list[tuple[str, str, str, str]]:
        """(name, type, default, comment) of every hyper-parameter; the comment gives the paper's symbol."""
        own = declared(self.path.read_text(), self._class())
        base = self._base()
        if base is None:
            return own
        mine = {field[0]: field for field in own}
        inherited = base.fields()
        return [mine.pop(field[0], field) for field in inherited] + list(mine.values())

    def _base(self) -> Entry | None:
        """The method of the library that this one derives from, if any."""
        tree = ast.parse(self.path.read_text())
        bases = [ast.unparse(base) for base in method_class_in(tree, self.path).bases]
        for node in (node for node in tree.body if isinstance(node, ast.ImportFrom)):
            folder, _, name = (node.module or "").rpartition(".")
            if folder.startswith(LIBRARY) and any((alias.asname or alias.name) in bases for alias in node.names):
                return entry_of(name)
        return None

    def _class(self) -> ast.ClassDef:
        return method_class_in(ast.parse(self.path.read_text()), self.path)

    def load(self, base: type[Base]) -> type[Base]:
        """The method's class, imported: the one in its file that derives from `base`, which is Method."""
        inside = f"{LIBRARY}{self.folder}.{self.name}"
        module = importlib.import_module(inside) if self.folder else module_at(self.path)
        return class_in(module, base)


@dataclass(frozen=True)
class Added(Entry):
    """A method that an installed package adds, at the place that its entry point names."""

    offer: Offer

    @staticmethod
    def by(offer: Offer) -> Added:
        """The entry of an offer; its file is looked for where modules lie, for a search by import would run code."""
        parts = offer.module.split(".")
        places = [Path(folder, *parts) for folder in sys.path]
        files = [file for place in places for file in (place.with_name(f"{place.name}.py"), place / "__init__.py")]
        path = next((file for file in files if file.is_file()), Path(offer.module))
        return Added(offer.name, "", path, offer)

    @property
    def home(self) -> str:
        return self.offer.package

    @property
    def doc(self) -> str:
        return super().doc if self._text() else ""

    def fields(self) -> list[tuple[str, str, str, str]]:
        if self._text():
            return super().fields()
        bases = [cls for cls in reversed(self.load(object).__mro__) if "__dataclass_fields__" in vars(cls)]
        return list({field[0]: field for cls in bases for field in declared_by(cls)}.values())

    def load(self, base: type[Base]) -> type[Base]:
        found: type[Base] = METHODS.taken(self.offer, base)
        _ADDED[found] = self.name
        return found

    def _class(self) -> ast.ClassDef:
        found = self._text()
        assert found is not None
        return found

    def _text(self) -> ast.ClassDef | None:
        """The class as its module's text has it; None where it only passes through that module."""
        if not self.path.is_file():
            return None
        classes = (node for node in ast.parse(self.path.read_text()).body if isinstance(node, ast.ClassDef))
        return next((node for node in classes if node.name == self.offer.attribute), None)


@cache
def catalogue() -> tuple[Entry, ...]:
    """Every method of the library, by name; the folder is the registry, but for files that methods share (`_x.py`)."""
    root = Path(__file__).parent / "methods"
    files = [path for path in root.glob("*/*.py") if not path.stem.startswith("_")]
    return tuple(sorted((Entry(p.stem, p.parent.name, p) for p in files), key=lambda entry: entry.name))


@cache
def class_names() -> dict[str, Entry]:
    """The library's methods by the names of their classes."""
    return {entry._class().name: entry for entry in catalogue()}


METHODS = Registry[Entry]("method", "fedloom.methods", lambda: {entry.name: entry for entry in catalogue()})
_ADDED: dict[type, str] = {}  # classes of packages that were loaded, and what they are called


def entries() -> tuple[Entry, ...]:
    """Every method that has a name: the library's, then those that packages add."""
    return (*catalogue(), *(Added.by(offer) for offers in METHODS.added.values() for offer in offers))


def entry_of(name: str) -> Entry:
    """The registry's entry of a name, or of a user's file (`my_method.py`)."""
    if name.endswith(".py"):
        return Entry(Path(name).stem, "", Path(name))
    if name.startswith("__main__/"):
        raise UsageError(
            f"the method {name.removeprefix('__main__/')} was written in a notebook, where no file gives it again; "
            "write it into a file (%%writefile my_method.py) and name that"
        )
    return METHODS[name] if name in METHODS.own else Added.by(METHODS.offer(name))


def added_name(cls: type) -> str | None:
    """The name by which an installed package adds a method's class; None if none does."""
    if cls in _ADDED or cls.__module__.startswith((LIBRARY, USERS)):
        return _ADDED.get(cls)
    places = ((offer, (offer.module, offer.attribute)) for offers in METHODS.added.values() for offer in offers)
    return next((offer.name for offer, place in places if place == (cls.__module__, cls.__qualname__)), None)


def known_as(cls: type) -> str | None:
    """What a spec calls a method's class, so that any process finds it: a name or a user's file. None: neither."""
    if cls.__module__.startswith(LIBRARY):
        return cls.__module__.rpartition(".")[2]
    if cls.__module__.startswith(USERS):
        return str(sys.modules[cls.__module__].__file__)
    return added_name(cls)


def method_class_in(tree: ast.Module, path: Path) -> ast.ClassDef:
    """The one class of a method's file that derives from Method (or from another method); networks may stand beside."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]
    methods = _methods(tree)
    found = [node for node in classes if any(_named(base) in methods for base in node.bases)] or classes
    if len(found) != 1:
        raise UsageError(f"{path}: a method's file has exactly one class derived from Method, found {len(found)}")
    return found[0]


def _methods(tree: ast.Module) -> set[str]:
    """What a file calls Method, Plugin, and the methods that it imports."""
    names = {"Method", "Plugin"}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            of_methods = node.level > 0 or (node.module or "").startswith(LIBRARY)
            for alias in node.names:
                if of_methods or alias.name in ("Method", "Plugin"):
                    names.add(alias.asname or alias.name)
    return names


def _named(base: ast.expr) -> str:
    """The last name of a base: `Method` of `fedloom.Method`."""
    return ast.unparse(base).rpartition(".")[2]
