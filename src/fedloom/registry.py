"""The methods by name, read from their files without importing them: the folder `fedloom/methods` is the registry.

Nothing here imports torch, so that listing methods is immediate.
"""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from fedloom.errors import UsageError, unknown
from fedloom.sources import declared
from fedloom.user_files import module_at

Base = TypeVar("Base")


@dataclass(frozen=True)
class Entry:
    """A method's file as the registry sees it, read without importing it."""

    name: str
    folder: str
    path: Path

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
            known = folder.startswith("fedloom.methods.")
            if known and any((alias.asname or alias.name) in bases for alias in node.names):
                return entry_of(name)
        return None

    def _class(self) -> ast.ClassDef:
        return method_class_in(ast.parse(self.path.read_text()), self.path)

    def load(self, base: type[Base]) -> type[Base]:
        """The method's class, imported: the one in its file that derives from `base`, which is Method."""
        inside = f"fedloom.methods.{self.folder}.{self.name}"
        module = importlib.import_module(inside) if self.folder else module_at(self.path)
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


@cache
def catalogue() -> tuple[Entry, ...]:
    """Every method of the library, by name; the folder is the registry, but for files that methods share (`_x.py`)."""
    root = Path(__file__).parent / "methods"
    files = [path for path in root.glob("*/*.py") if not path.stem.startswith("_")]
    return tuple(sorted((Entry(p.stem, p.parent.name, p) for p in files), key=lambda entry: entry.name))


def entry_of(name: str) -> Entry:
    """The registry's entry of a name, or of a user's file (`my_method.py`)."""
    if name.endswith(".py"):
        return Entry(Path(name).stem, "", Path(name))
    entries = {entry.name: entry for entry in catalogue()}
    if name not in entries:
        raise unknown("method", name, entries)
    return entries[name]


def method_class_in(tree: ast.Module, path: Path) -> ast.ClassDef:
    """The one class of a method's file that derives from Method (or from another method)."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]
    if len(classes) != 1:
        raise UsageError(f"{path}: a method's file has exactly one class derived from Method, found {len(classes)}")
    return classes[0]
