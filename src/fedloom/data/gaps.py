"""Gaps: cells in which nothing stands. All of them are told at once, and dropped or filled in as the settings say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedloom.data.source import FEATURES, Column, Source
from fedloom.errors import UsageError, unknown

if TYPE_CHECKING:
    import pyarrow as pa

POLICIES = ("refuse", "drop", "mean", "most_frequent")
FILLED = ("number", "category", "date")  # the roles of what is filled in, and a text beside these


def resolve_gaps(
    data: str, splits: Mapping[str, pa.Table], roles: Sequence[Column], missing: str, marks: Mapping[str, str]
) -> tuple[dict[str, pa.Table], tuple[Column, ...]]:
    """The splits without the rows that `missing` drops, and the roles with a note of it.

    Gaps of numbers and categories stay where they are to be filled in, from training rows that are not dealt yet.
    `marks` are, per column, the words that stood for nothing. Raises UsageError for gaps that may not be.
    """
    import pyarrow as pa

    if missing not in POLICIES:
        raise unknown("way with missing values", missing, POLICIES)
    open_at = {
        column.name: {split: _gaps(table.column(column.name)) for split, table in splits.items()}
        for column in roles
        if column.role != "ignored"
    }
    counts = {name: sum(int(gap.sum()) for gap in gaps.values()) for name, gaps in open_at.items()}
    role = {column.name: column.role for column in roles}
    filled = (*FILLED, "text") if {*FILLED} & {*role.values()} else FILLED
    if missing in ("mean", "most_frequent"):
        wrong = [name for name, count in counts.items() if count and role[name] not in filled]
    else:
        wrong = [name for name, count in counts.items() if count] if missing == "refuse" else []
    if wrong:
        rows = sum(table.num_rows for table in splits.values())
        raise UsageError(_complaint(data, rows, {name: counts[name] for name in wrong}, role, missing, marks))
    noted = list(roles)
    if missing == "drop":
        kept = {}
        for split, table in splits.items():
            whole = ~np.any([gaps[split] for gaps in open_at.values()], axis=0)
            if not whole.any():
                raise UsageError(
                    f"missing=drop leaves no row of {data}; fill the gaps in, or exclude the emptiest columns"
                )
            kept[split] = table.filter(pa.array(whole))
        told = "{} rows without it are dropped"
    else:
        kept, told = dict(splits), "{} gaps, filled in"
    for place, column in enumerate(noted):
        if count := counts.get(column.name, 0):
            note = ", ".join(filter(None, (column.note, told.format(count))))
            noted[place] = replace(column, note=note)
    return kept, tuple(noted)


def _complaint(
    data: str, rows: int, counts: Mapping[str, int], role: Mapping[str, str], missing: str, marks: Mapping[str, str]
) -> str:
    """What is missing where, and what can be done: one sentence for all columns."""
    parts = []
    for name, count in counts.items():
        what = f"the {role[name]} " if role[name] in ("client", "label", "series", "time") else ""
        marked = f" (such as {marks[name]})" if marks.get(name) else ""
        parts.append(f"{what}{name!r} in {count}{marked}")
    choices = ["repair them, or set missing=drop to leave those rows out"]
    if missing == "refuse" and any(role[name] in FILLED for name in counts):
        choices.append("missing=mean or missing=most_frequent to fill features in from the training rows")
    if any(role[name] in FEATURES for name in counts):
        choices.append("exclude=NAME to do without the column")
    if any(marks.get(name) for name in counts):
        choices.append("keep=NAME to take such a mark for a value")
    never = f"; missing={missing} fills in numbers, dates and categories only" if missing != "refuse" else ""
    return f"{data} has missing values among its {rows} rows: {', '.join(parts)}; {', '.join(choices)}{never}"


def _gaps(column: pa.ChunkedArray) -> np.ndarray:
    """Which rows have nothing, or a NaN, in a column, bool [N]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column.type, pa.FixedShapeTensorType):
        values = column.combine_chunks().to_numpy_ndarray()
        if values.ndim != 2 or values.dtype.kind != "f":
            return np.zeros(len(column), dtype=bool)  # pixels are looked at where they are made floats
        nothing: np.ndarray = np.isnan(values).any(axis=1)
        return nothing
    nothing = column.is_null().to_numpy()
    if pa.types.is_floating(column.type):
        nothing = nothing | pc.is_nan(column).fill_null(False).to_numpy()
    return nothing


def fill(x: torch.Tensor, rows: torch.Tensor, source: Source) -> tuple[Column, ...]:
    """Fills the gaps (NaN) of x `[N, D]` in place, from `rows` alone; gives the roles with what stands there now.

    Mean: numbers and dates take theirs, categories their most frequent one. Most frequent: all do (of equals, the
    least). A text that is missing is one without words.
    """
    if not source.fill:
        return source.roles
    found, start = list(source.roles), 0
    used = [place for place, column in enumerate(found) if column.role in FEATURES]
    for place, width in zip(used, source.widths, strict=True):
        block, column = x[:, start : start + width], found[place]
        start += width
        gaps = block.isnan()
        seen = block[rows]
        seen = seen[~seen.isnan().any(1)].double()
        if not len(seen):
            raise UsageError(
                f"column {column.name!r} of {source.name} has no value in any training row to fill its gaps in with; "
                f"set exclude={column.name}"
            )
        if column.role == "text":
            value, named = torch.zeros(width), "no word"
        elif column.role in ("number", "date") and source.fill == "mean":
            value = seen.mean(0)
            named = f"the mean {_fill_text(value)} of the training rows"
        elif column.role in ("number", "date"):
            several, counts = seen.unique(dim=0, return_counts=True)
            value = several[int(counts.argmax())]
            named = f"the most frequent value {_fill_text(value)} of the training rows"
        else:
            most = seen.sum(0).argmax()
            value = torch.nn.functional.one_hot(most, width)
            named = f"the most frequent value {column.values[int(most)]!r} of the training rows"
        value = value.to(block.dtype)
        found[place] = column = replace(column, fill=tuple(value.tolist()))  # of a column without gaps here, too
        if gaps.any():
            block.copy_(block.where(~gaps, value))
            found[place] = replace(column, note=f"{column.note} with {named}")
    return tuple(found)


def _fill_text(value: torch.Tensor) -> str:
    return f"{float(value):.6g}" if value.numel() == 1 else "of each place"
