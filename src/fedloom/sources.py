"""What the text of a class says, read without running it: its fields with their comments, and the calls it makes."""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
import tokenize
import typing
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path

from fedloom import ranges

# Names that say more of a field than its type: Positive, LearningRate, ...
RANGED = {name: alias for name, alias in vars(ranges).items() if typing.get_origin(alias) is typing.Annotated}


def declared(source: str, cls: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    """(name, type, default, comment) of every field of a dataclass, read from its text.

    The comment is the first one on the field's lines, or one that has the line above to itself.
    """
    comments: dict[int, str] = {}
    above: dict[int, str] = {}
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = token.line.lstrip().startswith("#")
            (above if alone else comments)[token.start[0] + alone] = token.string.lstrip("# ")
    comments = above | comments
    return [
        (
            node.target.id,
            _type(node.annotation),
            ast.unparse(node.value) if node.value else "",
            next((comments[n] for n in range(node.lineno, (node.end_lineno or 0) + 1) if n in comments), ""),
        )
        for node in cls.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and "ClassVar" not in ast.unparse(node.annotation)
    ]


def _type(annotation: ast.expr) -> str:
    """The type that an annotation names, without the range of a number and where a search looks."""
    match annotation:
        case ast.BinOp(left, ast.BitOr(), right):
            return f"{_type(left)} | {_type(right)}"
        case ast.Subscript(named, inner):
            name = ast.unparse(named).rpartition(".")[2]
            if name == "Annotated" and isinstance(inner, ast.Tuple):
                return _type(inner.elts[0])
            return _type(inner) if name in RANGED else ast.unparse(annotation)
    text = ast.unparse(annotation)
    alias = RANGED.get(text.rpartition(".")[2])
    return typing.get_args(alias)[0].__name__ if alias and not alias.__parameters__ else text


def declared_by(cls: type) -> list[tuple[str, str, str, str]]:
    """The same of a class that is imported."""
    source = Path(inspect.getfile(cls)).read_text()
    found = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    return declared(source, next(found))


def functions_of(classes: Iterable[type]) -> dict[str, ast.FunctionDef]:
    """The functions of some classes as their text has them, the last one of each name; none where there is no text."""
    found: dict[str, ast.FunctionDef] = {}
    for text in (text for cls in classes for text in _texts(cls)):
        found |= {f.name: f for f in ast.walk(ast.parse(textwrap.dedent(text))) if isinstance(f, ast.FunctionDef)}
    return found


def _texts(cls: type) -> Iterator[str]:
    try:
        yield inspect.getsource(cls)
    except (OSError, TypeError):  # a class of a notebook has no file, but its functions have their cells
        for function in filter(inspect.isfunction, vars(cls).values()):
            with contextlib.suppress(OSError, TypeError):
                yield inspect.getsource(function)


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
