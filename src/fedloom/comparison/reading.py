"""What the words, lists and mappings mean in which a comparison is asked for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.errors import UsageError, unknown
from fedloom.fields import loaded, parse
from fedloom.method import Method
from fedloom.parsing import named
from fedloom.ranges import hints_of
from fedloom.registry import entry_of, known_as
from fedloom.runs.spec import placed_function, placed_measures, resolved_path
from fedloom.user_files import function_text
from fedloom.user_networks import named_network, placed_network


def mapping(path: str | Path) -> dict[str, Any]:
    """What a YAML file says, which must be a mapping."""
    try:
        settings = loaded(Path(path).read_text(encoding="utf-8"), f"the spec {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the spec {path}: {error}".replace("\n", " ")) from error
    if not isinstance(settings, dict):
        raise UsageError(f"the spec {path} is not a mapping of settings to values")
    return settings


def settings_label(settings: Mapping[str, Any]) -> str:
    """A name for what differs: `lr=0.1,mu=0.01`."""
    plain = {name: named_network(v).rpartition("/")[2] if callable(v) else v for name, v in settings.items()}
    return ",".join(f"{name}={value}" for name, value in plain.items()) or "default"


def given_fields(method: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a method's mapping, without its name."""
    return {name: value for name, value in method.items() if name != "name"}


def fields_of(method: type[Method]) -> set[str]:
    """The names of a method's fields."""
    return {f.name for f in dataclasses.fields(method)}


def labelled(given: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Method]]:
    """Methods by label; two of one name without labels are called by their fields too."""
    if isinstance(given, str | Method | type):
        given = [given]
    pairs = given.items() if isinstance(given, Mapping) else [(None, one) for one in given]
    made = [(label, one() if _is_kind(one) else one) for label, one in pairs]
    entries = [(label, one, entry_from(label if one is None else one)) for label, one in made]
    names = [Path(entry["name"]).stem for _, _, entry in entries]
    entered: dict[str, dict[str, Any]] = {}
    objects: dict[str, Method] = {}
    for (label, one, entry), name in zip(entries, names, strict=True):
        own = entry.pop("label", None)
        called = name if names.count(name) == 1 else f"{name}:{settings_label(given_fields(entry))}"
        label = str(label or own or called)
        if label in entered:
            raise UsageError(f"two methods are called {label!r}; give one a label: {{name: {name}, label: ...}}")
        entered[label] = entry
        if isinstance(one, Method) and known_as(type(one)) is None:
            objects[label] = one
    return entered, objects


def entry_from(one: Any) -> dict[str, Any]:
    """The name and the given fields of a method: from its name with or without fields, a mapping, or a Method."""
    if _is_kind(one):
        one = one()
    if isinstance(one, Method):
        defaults = {f.name: f.default for f in dataclasses.fields(one)}
        changed = {n: v for n, v in one.fields().items() if getattr(one, n) != defaults[n]}
        wrapped = {n: entry_from(getattr(one, n)) for n in changed if isinstance(getattr(one, n), Method)}
        return {"name": one.to_spec()["name"]} | changed | wrapped
    if isinstance(one, str):
        one = named(one)
    if not isinstance(one, Mapping) or not isinstance(one.get("name"), str):
        raise UsageError(f"{one!r} is no method; give a name, a file or a mapping such as {{name: fedprox, mu: 0.1}}")
    name = one["name"]
    return dict(one) | {"name": str(Path(name).resolve()) if name.endswith(".py") else name}


def _is_kind(one: Any) -> bool:
    return isinstance(one, type) and issubclass(one, Method)


def assigned(settings: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A comparison's settings with `name=value` applied: `method.lr` for all methods, `LABEL.lr` for one of them."""
    methods, _ = labelled(settings.get("methods") or ())
    shared = dict(settings.get("fields") or {})
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise UsageError(f"{assignment!r} is not of the form name=value")
        label, dot, field = name.rpartition(".")
        if not dot:
            settings[name] = parse(text)
        elif label in methods:
            methods[label][field] = parse(text)
        elif label == "method":
            shared[field] = parse(text)  # a method's own value stays
        else:
            raise unknown("method of this comparison", label, methods)
    return settings | {"methods": methods, "fields": shared}


def apply_shared_fields(
    methods: dict[str, dict[str, Any]], objects: Mapping[str, Method], shared: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The methods with shared fields, each where a method, or one that it wraps, has it and did not set it."""
    if not shared:
        return methods
    kinds = {label: type(objects[label]) if label in objects else class_of(one) for label, one in methods.items()}
    every = (fields_of(inner) for label, kind in kinds.items() for _, inner, _ in inside(kind, methods[label]))
    known = set().union(*every)
    for name in shared:
        if name not in known:
            raise unknown("field of these methods", name, known)
    return {label: _shared_with(one, kinds[label], shared) for label, one in methods.items()}


def inside(kind: type[Method], method: Mapping[str, Any]) -> Iterator[tuple[str, type[Method], Mapping[str, Any]]]:
    """A method and those that it wraps: what their fields' names begin with (`inner.`), the class, the mapping."""
    yield "", kind, method
    for name, one in _wrapped(kind, method).items():
        for prefix, its, given in inside(class_of(one), one):
            yield f"{name}.{prefix}", its, given


def placed(kind: type[Method], method: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A method's mapping with these fields; `inner.lr` is one of the method that it wraps as `inner`."""
    own = {name: value for name, value in fields.items() if "." not in name}
    wrapped = {}
    for name, one in _wrapped(kind, method).items():
        its = {key.removeprefix(f"{name}."): value for key, value in fields.items() if key.startswith(f"{name}.")}
        if its:
            wrapped[name] = placed(class_of(one), one, its)
    return dict(method) | own | wrapped


def value_at(method: Mapping[str, Any], field: str) -> Any:
    """A field of a method's mapping, `inner.lr` being one of the method that it wraps; None where it is not given."""
    name, dot, rest = field.partition(".")
    return value_at(method.get(name) or {}, rest) if dot else method.get(name)


def _shared_with(method: Mapping[str, Any], kind: type[Method], shared: Mapping[str, Any]) -> dict[str, Any]:
    """A method's mapping with those of the shared fields that it has and did not set, also in methods that it wraps."""
    own = {name: value for name, value in shared.items() if name in fields_of(kind)}
    wrapped = {name: _shared_with(one, class_of(one), shared) for name, one in _wrapped(kind, method).items()}
    changed = {name: one for name, one in wrapped.items() if len(one) > 1 or name in method}
    return {"name": method["name"]} | own | given_fields(method) | changed


def _wrapped(kind: type[Method], method: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The mappings of the methods that a method wraps, by field."""
    hints, fields = hints_of(kind), dataclasses.fields(kind)
    return {f.name: entry_from(method.get(f.name, f.default)) for f in fields if hints[f.name].type is Method}


def class_of(method: Mapping[str, Any]) -> type[Method]:
    """The class of a method's mapping."""
    return entry_of(method["name"]).load(Method)


def seeds_of(given: Any) -> tuple[int, ...]:
    """The seeds of a number of them, of a list, or of text such as `0,3`."""
    if isinstance(given, str):
        given = parse(f"[{given}]") if "," in given else parse(given)
    if isinstance(given, int) and not isinstance(given, bool):
        return tuple(range(given))
    if isinstance(given, Sequence) and not isinstance(given, str):
        return tuple(given)
    raise UsageError(f"seeds are {given!r}; give a number, such as 5, or a list of seeds")


def with_absolute_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Run settings in which paths hold in every working folder."""
    from fedloom.world.availability import located

    holding = {"data": resolved_path, "init": resolved_path, "availability": located}
    placed: dict[str, Any] = {
        name: of(settings[name]) for name, of in holding.items() if isinstance(settings.get(name), str)
    }
    placed |= {"measures": placed_measures(settings["measures"])} if "measures" in settings else {}
    if settings.get("loss"):
        loss = settings["loss"]
        placed["loss"] = placed_function(function_text(loss) if callable(loss) else loss)
    return settings | placed | ({"model": placed_network(settings["model"])} if settings.get("model") else {})


def combinations(axes: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Every combination of the axes' values; one empty one of no axes."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
