"""Values of named fields: read from text, checked against the annotation that declares them."""

import math
import textwrap
import types
import typing
from collections import deque
from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from fedloom.errors import UsageError, unknown

MOST_VALUES = 100_000  # of a YAML text, each as often as aliases repeat it
MOST_DEPTH = 32  # lists and mappings inside one another
FORMERLY = "manyhands"  # what the project was called when it wrote its first records


class _Read(yaml.composer.Composer, yaml.constructor.SafeConstructor, yaml.resolver.Resolver):
    """What the events of a YAML text say, read once and safely; to it a date is a word: no setting is one."""

    def __init__(self, events: list[yaml.Event]) -> None:
        for part in (yaml.composer.Composer, yaml.constructor.SafeConstructor, yaml.resolver.Resolver):
            part.__init__(self)
        self.events = deque(events)

    def check_event(self, *choices: type[yaml.Event]) -> bool:
        return isinstance(self.events[0], choices)

    def peek_event(self) -> yaml.Event:
        return self.events[0]

    def get_event(self) -> yaml.Event:
        return self.events.popleft()


_Read.yaml_implicit_resolvers = {
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
        depth, events = 0, list[yaml.Event]()
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # which needs no stack, as composing does
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEPTH:
                raise UsageError(f"{where} has more than {MOST_DEPTH} lists or mappings inside one another")
            events.append(event)
        read = _Read(events)
        node = read.get_single_node()
        if node is not None and _values(node, {}) > MOST_VALUES:
            raise UsageError(f"{where} has more than {MOST_VALUES} values, with those that aliases repeat")
        return None if node is None else read.construct_document(node)
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
    words, plain = _accepted(hint, typing.get_args(hint))
    if words:
        if value not in words:
            raise unknown(where, value, words)
        return value
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


@cache
def _accepted(hint: Any, inside: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[type, ...]]:
    """The words of which an annotation accepts one, or else the types that it accepts, in the order of its text.

    `inside` are the arguments of the annotation: unions in other orders are equal, and their texts are not.
    """
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return inside, ()
    kinds = inside if origin in (types.UnionType, typing.Union) else (hint,)
    return (), tuple(typing.get_origin(kind) or kind for kind in kinds)
