"""What the text of a class says, read without running it: its fields with their comments, and the calls it makes."""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
import tokenize
from collections.abc import Container, Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path


def declared(source: str, cls: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    """(name, type, default, comment on its lines) of every field of a dataclass, read from its text."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return [
        (
            node.target.id,
            ast.unparse(node.annotation),
            ast.unparse(node.value) if node.value else "",
            next((comments[n] for n in range(node.lineno, (node.end_lineno or 0) + 1) if n in comments), ""),
        )
        for node in cls.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and "ClassVar" not in ast.unparse(node.annotation)
    ]


def declared_by(cls: type) -> list[tuple[str, str, str, str]]:
    """The same of a class that is imported."""
    source = Path(inspect.getfile(cls)).read_text()
    found = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    return declared(source, next(found))


def functions_of(classes: Iterable[type]) -> dict[str, ast.FunctionDef]:
    """The functions of some classes as their text has them, the last one of each name; none where there is no text."""
    found: dict[str, ast.FunctionDef] = {}
    for cls in classes:
        with contextlib.suppress(OSError, TypeError):
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
            found |= {f.name: f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
    return found


def calls(
    texts: Mapping[str, ast.FunctionDef], functions: Container[str], boxes: Sequence[str], verbs: Container[str]
) -> list[tuple[str, str]]:
    """(verb, function) of every `x.verb(self.function, ...)` in some boxes and what these call of `self`."""
    asked: list[tuple[str, str]] = []
    left, seen = list(boxes), set[str]()
    while left:
        name = left.pop(0)
        if name in seen or name not in texts:
            continue
        seen.add(name)
        for node in ast.walk(texts[name]):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                own = [a.attr for a in node.args if isinstance(a, ast.Attribute) and _is_self(a.value)]
                if node.func.attr in verbs:
                    asked += [(node.func.attr, function) for function in own if function in functions]
                elif _is_self(node.func.value) and node.func.attr not in functions:
                    left.append(node.func.attr)
    return asked


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
