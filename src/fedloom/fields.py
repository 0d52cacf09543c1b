"""Values of named fields: read from text, checked against the annotation that declares them."""

import math
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any

import yaml

from fedloom.errors import UsageError, unknown

MOST_VALUES = 100_000  # of a YAML text, each as often as aliases repeat it
MOST_DEPTH = 32  # lists and mappings inside one another
FORMERLY = "manyhands"  # what the project was called when it wrote its first records


class _Loader(yaml.SafeLoader):
    """YAML's safe reader, to which a date is a word: no setting is one."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def dumped(values: Mapping[str, Any]) -> str:
    """The YAML text of plain values, in their order."""
    # libyaml, ten times as fast, comes with the wheels of all usual systems.
    return str(yaml.dump(values, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False))


def loaded(text: str, where: str) -> Any:
    """What a YAML text says, within bounds; UsageError with `where` for what is none or goes beyond them."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):  # which needs no stack, as composing does
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEPTH:
                raise UsageError(f"{where} has more than {MOST_DEPTH} lists or mappings inside one another")
        node = yaml.compose(text, Loader=_Loader)
        if node is not None and _values(node, {}) > MOST_VALUES:
            raise UsageError(f"{where} has more than {MOST_VALUES} values, with those that aliases repeat")
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"cannot read {where}: {' '.join(str(error).split())}") from error


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node comes to; one that holds itself comes to too many."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_values(one, known) for one in inner)
    return known[id(node)]


def current_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says, with the version that wrote it under the project's name of today."""
    return {"fedloom" if name == FORMERLY else name: value for name, value in record.items()}


def parse(text: str) -> Any:
    """A value as YAML reads it (`0.1`, `true`, `null`, `[1, 2]`), also for `1e-3`, which YAML takes for a word."""
    value = loaded(text, f"the value {textwrap.shorten(repr(text), 100)}")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def coerced(where: str, value: Any, hint: Any) -> Any:
    """The value in the type its annotation asks for (an int is a fine float), or an error that names `where`."""
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            raise unknown(where, value, typing.get_args(hint))
        return value
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    accepted = typing.get_args(hint) if union else (hint,)
    plain = tuple(typing.get_origin(kind) or kind for kind in accepted)
    if isinstance(value, str) and str not in plain:
        value = parse(value)  # YAML takes 1e-3 for a word
    if isinstance(value, int) and not isinstance(value, bool) and int not in plain and float in plain:
        value = float(value)
    if isinstance(value, list) and tuple in plain:
        value = tuple(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        wanted = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in plain)
        got = textwrap.shorten(repr(value), 200)
        raise UsageError(f"{where} is {got}, of type {type(value).__name__}; it must be of type {wanted}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where} is {value}; it must be a finite number")
    return value
