"""What the strings of a column stand for: numbers, times or words, and gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.data import cells, dates
from fedloom.data.arrow import is_string
from fedloom.data.roles import FEW, Wanted
from fedloom.data.source import listed
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa


def parse_values(
    data: str, splits: dict[str, pa.Table], wanted: Wanted, separator: str, decimal: str = ""
) -> tuple[dict[str, pa.Table], dict[str, str], dict[str, str], dict[str, str]]:
    """The splits with strings as numbers or dates where nothing else is in them, null for gaps; what marked these;
    notes; and how dates are written that are not as 2024-01-31.

    `decimal` is the mark between a number and its fraction: a comma, a point, or what the cells and their `separator`
    make likely, of which the notes tell, by column.

    Strings that only a file's layout made so (`separator`) are numbers wherever they can be; those of a typed file as
    features only. Raises UsageError, for all columns at once, where numbers and other things are mixed.
    """
    import pyarrow as pa

    marks: dict[str, str] = {}
    problems: list[str] = []
    dotted: dict[str, str] = {}
    notes: dict[str, str] = {}
    written: dict[str, str] = {}
    commas = False
    made = {split: dict(zip(table.column_names, table.columns, strict=True)) for split, table in splits.items()}
    for name, first in made["train"].items():
        if not is_string(first.type):
            continue
        parts = [cells.trim(columns[name]) for columns in made.values()]
        column = pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())
        timed = name == wanted.time
        kept = name in wanted.keep and not timed
        feature = timed or not wanted.has_role(name)
        european = cells.european(separator, decimal)
        bare, marks[name] = (column, "") if kept else cells.null_markers(column)
        found = cells.numbers(bare, european, decimal != ",") if separator or feature else None
        if found is None and (separator or feature) and not kept:
            sure, marked = cells.null_markers(column, (cells.PYTHONS,))
            if (found := cells.numbers(sure, european, decimal != ",")) is not None:
                bare, marks[name] = sure, marked
        if found is not None:
            column = found
            if european and not decimal:
                if cells.any_matches(bare, ","):
                    commas, notes[name] = True, "decimal commas"
                dotted |= cells.thousands(name, bare)
        else:
            column = bare
            ways = dates.parsed(bare) if feature and not kept else {}
            if len(ways) == 1:
                ((written[name], column),) = ways.items()
            elif ways:
                problems.append(_undated(name, bare) + ("" if timed else f": {_choices(name)}"))
            elif feature and not (kept or timed) and (problem := _mixed(name, bare)):
                problems.append(problem)
        start = 0
        for split, table in splits.items():
            made[split][name] = column.slice(start, table.num_rows)
            start += table.num_rows
    problems += [*dotted.values()] if commas else []
    if problems:
        raise UsageError(f"{data}: {'; '.join(problems)}")
    tables = {split: pa.table(columns, metadata=splits[split].schema.metadata) for split, columns in made.items()}
    return tables, marks, notes, written


def _undated(name: str, column: pa.ChunkedArray) -> str:
    """What is wrong with dates of which none has a day beyond the twelfth."""
    some = listed(column.drop_null().unique().to_pylist(), 3)
    return (
        f"column {name!r} holds dates, such as {some}, of which day and month cannot be told apart; write them as "
        "2024-01-31"
    )


def _choices(name: str) -> str:
    return f"exclude={name} leaves the column out, keep={name} takes every value for a category"


def _mixed(name: str, column: pa.ChunkedArray) -> str:
    """What is wrong with strings of which at least half are numbers, or are written as numbers sometimes are."""
    values = column.drop_null()
    choices = _choices(name)
    others = cells.strangers(values)
    if not len(others):  # numbers too long to be any: names
        return ""
    if len(others) <= len(values) / 2:
        several = "value that is no number" if len(others) == 1 else "values that are no numbers"
        some = listed(others.unique().to_pylist(), 3)
        return f"column {name!r} holds {len(others)} {several}, such as {some}: {choices}"
    written = cells.share(values, cells.GROUPED) > 0.5
    if written or (len(values.unique()) > FEW and cells.share(values, cells.WITH_UNIT) > 0.5):
        some = listed(values.unique().to_pylist(), 3)
        return f"column {name!r} holds numbers written as text, such as {some}; write them as 1234.5: {choices}"
    return ""
