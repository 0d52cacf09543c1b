"""Which tests concern a method: what `pytest --method NAME` and `pytest --changed BASE` run.

A method's tests are those that its mutants name, and every test that has it among its parameters: the contract, the
identities, the engines. With a method go those that derive from it or wrap it, with a helper those that import it.
"""

import ast
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedloom.method import Method
from fedloom.registry import Entry, catalogue

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fedloom.methods"
OWN = (  # files that concern the method that they name, and no other
    r"src/fedloom/methods/\w+/(\w+)\.py",
    r"tests/methods/test_(\w+)\.py",
    r"tests/mutants/methods/(\w+)\.toml",
    r"benchmarks/claims/(\w+)\.(?:yaml|py)",
)
STUBS = {"src/fedloom/__init__.pyi", "src/fedloom/settings.pyi"}  # written from methods' files; nothing runs them
NOBODYS = {"CHANGELOG.md", *STUBS}  # which no test of a method reads


def touched(files: Iterable[str], modules: Mapping[str, set[str]], own: Mapping[str, set[str]]) -> set[str] | None:
    """The methods (and helpers) that files concern; None if one of them concerns everything."""
    found: set[str] = set()
    for file in {*files} - NOBODYS:
        named = {m[1] for pattern in OWN if (m := re.fullmatch(pattern, file))}
        concerned = (named | {name for name, tests in own.items() if named and file in tests}) & modules.keys()
        if not concerned:
            return None
        found |= concerned
    return found


def own_tests() -> dict[str, set[str]]:
    """By the name of a method or helper: the files of tests that its mutants are to be killed by."""
    parts = {path.stem: tomllib.loads(path.read_text()) for path in (ROOT / "tests/mutants/methods").glob("*.toml")}
    return {name: {test.partition("::")[0] for test in part["tests"]} for name, part in parts.items()}


def imports() -> dict[str, set[str]]:
    """By the name of each file in methods, helpers included: the others that it imports."""
    found = {}
    for path in (ROOT / "src/fedloom/methods").glob("*/*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        modules = [node.module.split(".") for node in nodes if node.module and node.module.startswith(f"{PACKAGE}.")]
        found[path.stem] = {module[3] for module in modules if len(module) > 3}
    found.pop("__init__", None)
    return found


def with_dependents(names: set[str], modules: dict[str, set[str]]) -> set[str]:
    """Those methods, and all whose files import theirs, at first or second hand."""
    while new := {name for name, imported in modules.items() if imported & names} - names:
        names = names | new
    return names


def concerns(item: Any, chosen: set[str], own: Mapping[str, set[str]]) -> bool:
    """Whether a test has one of these methods among its parameters, or is in a file of theirs."""
    params = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    inside = [part for param in params if isinstance(param, list | tuple) for part in param]  # a line of a table
    file = item.path.relative_to(ROOT).as_posix()
    theirs = {f"tests/methods/test_{name}.py" for name in chosen}.union(*(own.get(name, ()) for name in chosen))
    return file in theirs or any(_method(value) in chosen for value in params + inside)


def _method(value: Any) -> str | None:
    if isinstance(value, Entry):
        return value.name
    if isinstance(value, str):
        return value if any(value == entry.name for entry in catalogue()) else None
    cls = value if isinstance(value, type) else type(value)
    folder, _, name = cls.__module__.rpartition(".")
    return name if issubclass(cls, Method) and folder.startswith(f"{PACKAGE}.") else None
