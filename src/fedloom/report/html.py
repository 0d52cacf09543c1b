"""How a page is made of a template: self-contained, and everything from files and data escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedloom.letters import printable
from fedloom.report import words


def page(template: str, facts: Mapping[str, Any], *filters: Callable[..., str]) -> str:
    """The whole page: no script, nothing to load. `filters` are known to the template by their functions' names.

    Raises LookupError if a fact is missing.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for say in (words.size, words.duration, words.percent, words.counted, *filters):
        environment.filters[say.__name__.strip("_")] = say
    try:
        return environment.get_template(template).render(facts)
    except UndefinedError as error:
        raise LookupError(error) from error
