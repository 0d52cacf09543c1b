"""The flags of `fedloom run`: settings of a run and fields of its method, read where these are declared."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from fedloom.errors import UsageError
from fedloom.parsing import named
from fedloom.registry import Entry, entry_of
from fedloom.runs.spec import Spec, with_overrides
from fedloom.sources import declared_by

ALONE = frozenset({"--json", "--help"})  # the flags of `run` that take no value, whatever the method
METAVARS = {"int": "INTEGER", "float": "NUMBER", "str": "TEXT"}
NULL = ("null", "none", "~")


@dataclass(frozen=True)
class Flag:
    """One flag: `setting` is `rounds`, or `method.lr`; kind (its type), default and comment are text, as declared."""

    name: str
    setting: str
    kind: str
    default: str
    comment: str
    group: str

    @property
    def parameter(self) -> inspect.Parameter:
        """The option as typer reads it off a function's signature."""
        yes_or_no = self.kind == "bool"
        default = f"default {self.default}" if self.default not in ("", "None", "()") else ""
        option = typer.Option(
            None,
            f"--{self.name}/--no-{self.name}" if yes_or_no else f"--{self.name}",
            help=escape("; ".join(filter(None, (self.comment, default)))),
            metavar=None if yes_or_no else METAVARS.get(self.kind.partition(" ")[0], "VALUE"),
            show_default=False,
            rich_help_panel=self.group,
        )
        given = bool | None if yes_or_no else str | None
        return inspect.Parameter(self.key, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=given)

    @property
    def key(self) -> str:
        """The name of the parameter."""
        return re.sub(r"\W", "_", self.setting)

    def assignment(self, value: object) -> str:
        """`name=value` as a spec takes it; where text is wanted, `no` and `1` are text."""
        words = re.findall(r"\w+", self.kind)
        if isinstance(value, bool):
            value = str(value).lower()
        elif "int" in words and str(value).isdecimal():
            pass  # read as it stands; where text would do too, quotes would make a float of it
        elif "str" in words and not (str(value).lower() in NULL and "None" in words):
            value = json.dumps(value, ensure_ascii=False)
        return f"{self.setting}={value}"


def positionals(args: Sequence[str]) -> Iterator[str]:
    """The arguments that are neither a flag nor the value of one."""
    words = iter(args)
    for word in words:
        if not word.startswith("-"):
            yield word
        elif word not in ALONE and "=" not in word:
            next(words, None)


def entry(target: str, overrides: Sequence[str] = ()) -> Entry:
    """The method that a name, a file or a spec (with `name=value` after it) stands for."""
    if target.endswith((".yaml", ".yml")):
        target = Spec.read(target).method["name"]
    for override in overrides:
        name, _, value = override.partition("=")
        target = value if name in ("method", "method.name") else target
    target = named(target)["name"]
    found = entry_of(target)
    try:
        found.fields()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the method {target}: {error}") from error
    return found


def flags_of(method: Entry | None) -> list[Flag]:
    """Every setting but the method, then the fields of the method; a field that shares its name is `--method.NAME`."""
    fields = [("", "Settings", field) for field in declared_by(Spec) if field[0] != "method"]
    if method is not None:
        fields += [("method.", f"Fields of {method.name}", field) for field in method.fields()]
    flags, taken = [], {"out", "json", "debug", "help"}
    for prefix, group, (name, kind, default, comment) in fields:
        spelled = name.replace("_", "-")
        spelled = f"method.{spelled}" if spelled in taken else spelled
        taken.add(spelled)
        flags.append(Flag(spelled, prefix + name, kind, default.strip("'\""), comment, group))
    return flags


def resolved(target: str, assignments: Sequence[str]) -> Spec:
    """The spec of a method's name, a method's file or a spec's file, with `name=value` applied."""
    if target.endswith((".yaml", ".yml")):
        return Spec.read(target, assignments)
    method = named(target)
    if method["name"].endswith(".py"):
        method["name"] = str(Path(method["name"]).resolve())
    for assignment in assignments:
        of_method, _, name = assignment.partition("=")[0].rpartition(".")
        if of_method == "method" and name in method.keys() - {"name"}:
            raise UsageError(
                f"the field {name} of {method['name']} is given twice, in {target} and by itself; keep one"
            )
    return Spec.of(with_overrides({"method": method}, assignments))


def with_flags(command: Callable[..., None], flags: Sequence[Flag]) -> Callable[..., None]:
    """The command with an option for every flag; what was given arrives after its `name=value` in `overrides`."""
    of_setting = {flag.setting: flag for flag in flags}

    @functools.wraps(command)
    def flagged(**given: Any) -> None:
        values = {flag: given.pop(flag.key) for flag in flags}
        written = []
        for override in given.pop("overrides") or ():
            name, equals, value = override.partition("=")
            known = equals and of_setting.get(name)
            written.append(known.assignment(value) if known else override)
        written += [flag.assignment(value) for flag, value in values.items() if value is not None]
        command(overrides=written, **given)

    signature = inspect.signature(command, eval_str=True)
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
    flagged.__signature__ = signature.replace(parameters=[*own, *(flag.parameter for flag in flags)])  # type: ignore[attr-defined]
    return flagged
