"""Values of named fields: read from text, checked against the annotation that declares them."""

import math
import types
import typing
from typing import Any

import yaml

from manyhands.errors import UsageError, unknown


def parse(text: str) -> Any:
    """A value as YAML reads it (`0.1`, `true`, `null`, `[1, 2]`), also for `1e-3`, which YAML takes for a word."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{text!r} is not a value: {error}".replace("\n", " ")) from error
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def named(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """A name and what follows its colon: `krum:f=4,m=3` is ("krum", [], {"f": 4, "m": 3}), `topk:0.01` has [0.01]."""
    name, _, rest = text.partition(":")
    positional: list[Any] = []
    options: dict[str, Any] = {}
    for part in rest.split(",") if rest.strip() else []:
        option, equals, value = part.partition("=")
        if not equals and options:
            raise UsageError(f"{text!r}: {part.strip()!r} has no name; only the first values may do without")
        if not equals:
            positional.append(parse(part))
        elif option.strip() in options:
            raise UsageError(f"{text!r} gives {option.strip()!r} twice")
        else:
            options[option.strip()] = parse(value)
    return name.strip(), positional, options


def fitting(where: str, value: Any, hint: Any) -> Any:
    """The value in the type its annotation asks for (an int is a fine float), or an error that names `where`."""
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            raise unknown(where, value, typing.get_args(hint))
        return value
    accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(kind) or kind for kind in accepted)
    if isinstance(value, str) and str not in plain:
        value = parse(value)  # YAML takes 1e-3 for a word
    if isinstance(value, int) and not isinstance(value, bool) and int not in plain and float in plain:
        value = float(value)
    if isinstance(value, list) and tuple in plain:
        value = tuple(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        wanted = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in plain)
        raise UsageError(f"{where} is {value!r}, of type {type(value).__name__}; it must be of type {wanted}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where} is {value}; it must be a finite number")
    return value
