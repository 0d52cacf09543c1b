"""The language in which settings name things: `topk:0.01+qsgd:4`, `krum:f=4`, `dirichlet:0.3`, `fedprox:mu=0.1`.

    NAME                a name alone
    NAME:1,x,a=2        then values, of which only the first may do without a name; each is read as YAML reads it
    ONE:1+OTHER:a=2     a chain of such terms

What a name stands for is its registry's to say. What values mean is said by the fields of a dataclass (`bound`), or by
the parameters of a function (`called`).
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from fedloom.errors import UsageError, nearest, unknown
from fedloom.fields import coerced, parse

T = TypeVar("T")


@dataclass(frozen=True)
class Term:
    """One name with its values: of `krum:3,m=2` the `values` are [3] and the `options` {"m": 2}.

    Values and options raise UsageError where the text has them in no such form; `rest` is that text as it stands.
    """

    text: str

    @property
    def name(self) -> str:
        """What stands before the colon."""
        return self.text.partition(":")[0].strip()

    @property
    def rest(self) -> str | None:
        """What stands behind the colon, unread; None where there is no colon."""
        _, colon, rest = self.text.partition(":")
        return rest if colon else None

    @property
    def values(self) -> list[Any]:
        """The first values, which have no name."""
        return self._read[0]

    @property
    def options(self) -> dict[str, Any]:
        """The values that have a name."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[list[Any], dict[str, Any]]:
        values: list[Any] = []
        options: dict[str, Any] = {}
        rest = self.rest or ""
        for part in rest.split(",") if rest.strip() else []:
            option, equals, value = part.partition("=")
            if not equals and options:
                raise UsageError(f"{self.text!r}: {part.strip()!r} has no name; only the first values may do without")
            if not equals:
                values.append(parse(part))
            elif option.strip() in options:
                raise UsageError(f"{self.text!r} gives {option.strip()!r} twice")
            else:
                options[option.strip()] = parse(value)
        return values, options


def chain(text: str) -> list[Term]:
    """The terms of a text, which `+` joins; at least one."""
    return [Term(part) for part in text.split("+")]


def named(text: str) -> dict[str, Any]:
    """A method, or what else has fields, in one word: `fedprox:mu=0.1,lr=0.05` as its name and its fields."""
    if text.endswith(".py") and (":" not in text or Path(text).is_file()):
        return {"name": text}
    term = Term(text)
    if term.values:
        raise UsageError(f"{text!r}: {term.values[0]!r} is not of the form field=value")
    if "name" in term.options:
        raise UsageError(f"{text!r} gives a name twice")
    return {"name": term.name} | term.options


def bound(
    term: Term, cls: type, owner: str = "", besides: Collection[str] = (), last: Collection[str] = ()
) -> dict[str, Any]:
    """A term's values as the fields of a dataclass, by name, in the types of its annotations.

    `owner` is what errors call the class (the term's name, if nothing else is said). An option whose name is a word of
    Python (`from`) is a field with an underscore behind it; a field that is `kw_only` needs its name. `besides` are
    fields that no text gives, and `last` those that come behind all others, as the base's fields do not. A field
    without a value is left out.

    Raises:
        UsageError: there are too many values, one twice, one of another type, or one for a field that does not exist.
    """
    owner = owner or term.name
    own = {field.name.rstrip("_"): field for field in dataclasses.fields(cls)}
    names = [name for name in own if name not in besides]
    names.sort(key=lambda name: name in last)
    bare = [name for name in names if not own[name].kw_only]
    if len(term.values) > len(bare):
        takes = f"its options are {', '.join(names)}" if names else "it has no options"
        raise UsageError(f"{owner} got {len(term.values)} values without a name; {takes}")
    given = dict(zip(bare, term.values, strict=False))
    for name, value in term.options.items():
        if name not in names:
            raise unknown(f"option of {owner}", name, names)
        if name in given:
            raise UsageError(f"{owner} got {name} twice, with its name and without")
        given[name] = value
    hints = typing.get_type_hints(cls)
    return {own[name].name: coerced(f"{owner}: {name}", value, hints[own[name].name]) for name, value in given.items()}


def called(term: Term, function: Callable[..., T], *first: Any, where: str, form: str = "") -> T:
    """`function(*first, *values, **options)`: what it returns for the term's values.

    `where` begins the error of values that the function does not take, and `form` says in it how they are written.

    Raises:
        UsageError: there are too many values or too few, one of another type than the function's annotation says, or
            one for a parameter that does not exist.
    """
    signature = inspect.signature(function)
    own = list(signature.parameters.values())[len(first) :]
    takes = f"is written as {form}" if form else f"takes {', '.join(map(_written, own)) or 'no options'}"
    try:
        given = signature.bind(*first, *term.values, **term.options).arguments
    except TypeError as error:
        strange = next((name for name in term.options if name not in signature.parameters), None)
        hint = nearest(strange, [one.name for one in own]) if strange else ""
        raise UsageError(f"{where}: {error}{hint}; {term.name} {takes}") from None
    for parameter in own:
        if parameter.name in given and parameter.kind is not parameter.VAR_KEYWORD:
            each = parameter.kind is parameter.VAR_POSITIONAL
            for value in given[parameter.name] if each else (given[parameter.name],):
                _check(f"{where}: {parameter.name}", value, _hint(function, parameter))
    return function(*first, *term.values, **term.options)


def _written(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f"{parameter.name.upper()},..."
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default}"


def _check(where: str, value: Any, hint: Any) -> None:
    if hint is not Any:
        coerced(where, value, hint)  # the value is handed on as it was written: 2 stays 2 where 2.0 would do


def _hint(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """A parameter's type; Any where it has none, or one whose name only type checkers know."""
    if parameter.annotation is parameter.empty:
        return Any
    alone = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        return typing.get_type_hints(alone, vars(sys.modules[function.__module__]))[parameter.name]
    except NameError:
        return Any
