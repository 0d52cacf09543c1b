"""Writes what editors and type checkers read: the settings as keywords, and the methods as classes of the package.

`python docs/hints.py` writes both files anew, after a setting, a method or one of its fields was added or changed.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

from fedloom import _HOMES
from fedloom.comparison.grid import OURS as COMPARED
from fedloom.comparison.grid import Comparison
from fedloom.registry import catalogue, class_names
from fedloom.runs.spec import KNOWN, Spec
from fedloom.sources import declared_by

SOURCE = Path(__file__).resolve().parent.parent / "src" / "fedloom"
HEAD = "# Written by docs/hints.py: what editors and type checkers read. Nothing of it runs."
WIDER = {
    "data": "Any",
    "measures": "object",  # names, and functions of Python
    "model": "Any",  # a name, or a module, class or function that makes one
    "loss": "object",  # a name, or a function
    "class_weights": "str | Sequence[float] | None",
    "init": "str | Path | None",
    "attack": "object",  # a text, or attacks made in Python
    "seeds": "int | str | Sequence[int]",
    "settings": "Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]]",
}
OURS = [name for name in COMPARED if name != "methods"]


def wider(kind: str) -> str:
    """The type that a caller may give where this one is kept: any sequence for a tuple, a name for a method."""
    kind = re.sub(r"\bdict\b", "Mapping", kind.replace("'", '"'))
    kind = re.sub(r"Signed\[(\w+)\]", r"\1", kind)
    kind = re.sub(r"tuple\[(\w+), \.\.\.\]", r"Sequence[\1]", kind).replace("Sequence[str]", "str | Sequence[str]")
    return "Method | str | Mapping[str, Any]" if kind == "Method" else kind


def union(kinds: set[str]) -> str:
    """One type for several."""
    words = {part.strip() for kind in kinds for part in re.split(r"\|(?![^\[]*\])", wider(kind))}
    return " | ".join(sorted(words - {"None"}, key=lambda word: ("[" in word, word)) + sorted(words & {"None"}))


def settings() -> str:
    """The text of `settings.pyi`."""
    own = {name: WIDER.get(name, wider(kind)) for name, kind, *_ in declared_by(Spec) if name != "method"}
    compared = {name: WIDER.get(name, wider(kind)) for name, kind, *_ in declared_by(Comparison) if name in OURS}
    fields: dict[str, set[str]] = defaultdict(set)
    for entry in catalogue():
        for name, kind, *_ in entry.fields():
            if name not in KNOWN:
                fields[name].add(kind)
    kinds = {
        "Settings(TypedDict, total=False)": own,
        "Fields(TypedDict, total=False)": {name: union(fields[name]) for name in sorted(fields)},
        "RunSettings(Settings, Fields, total=False)": {},
        "ComparisonSettings(Settings, total=False)": {"fields": "Mapping[str, Any]"} | compared,
    }
    imports = [
        "from collections.abc import Mapping, Sequence",
        "from pathlib import Path",
        "from typing import Any, Literal, TypedDict",
    ]
    lines = [HEAD, "", *imports, "", "from fedloom.method import Method"]
    for head, entries in kinds.items():
        lines += ["", f"class {head}:{'' if entries else ' ...'}"] + [f"    {n}: {kind}" for n, kind in entries.items()]
    return "\n".join([*lines, ""])


def package() -> str:
    """The text of `__init__.pyi`."""
    found = [(f"fedloom.{home}", name) for home, names in _HOMES.items() for name in names]
    found += [(f"fedloom.methods.{one.folder}.{one.name}", name) for name, one in class_names().items()]
    lines = [
        f"from {home} import {name} as {name}" for home, name in sorted([*found, ("fedloom._version", "__version__")])
    ]
    return "\n".join(
        ["# Written by docs/hints.py: what editors and type checkers read. Nothing of it runs.", "", *lines, ""]
    )


PAGES = {SOURCE / "settings.pyi": settings, SOURCE / "__init__.pyi": package}


def named_in(path: Path) -> set[str]:
    """The names that a stub exports."""
    tree = ast.parse(path.read_text())
    return {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


if __name__ == "__main__":
    for path, text in PAGES.items():
        path.write_text(text())
