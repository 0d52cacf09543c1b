"""Points in time: strings as dates, and what a network sees of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

DAY = 86_400_000_000  # microseconds
DAYS = 5  # numbers that a date becomes, without those of the time of day
SINCE = 10_957  # days from 1970 to 2000: float32 then tells minutes apart
WRITTEN = {  # how dates are written beside 2024-01-31, by what they match
    "%d.%m.%Y": r"\d{1,2}\.\d{1,2}\.\d{4}",
    "%Y/%m/%d": r"\d{4}/\d{1,2}/\d{1,2}",
    "%d/%m/%Y": r"\d{1,2}/\d{1,2}/\d{4}",
    "%m/%d/%Y": r"\d{1,2}/\d{1,2}/\d{4}",
    "%d-%m-%Y": r"\d{1,2}-\d{1,2}-\d{4}",
    "%m-%d-%Y": r"\d{1,2}-\d{1,2}-\d{4}",
}
OF_DAY = {"": "", " %H:%M": r" \d{1,2}:\d{2}", " %H:%M:%S": r" \d{1,2}:\d{2}:\d{2}"}
ISO = r"^\d{4}-\d{2}-\d{2}([ T].*)?$"


def parsed(column: pa.ChunkedArray, written: tuple[str, ...] = tuple(WRITTEN)) -> dict[str, pa.ChunkedArray]:
    """The strings as points in time (UTC, us), by the way of writing in which each of them is one.

    ISO 8601 (2024-01-31, with a time of day or not) goes by the name "" and is the only one where it fits. Two others
    fit where day and month cannot be told apart; none where the strings are no dates.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if column.null_count == len(column):
        return {}
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC")) if _all_match(column, ISO) else ():
        try:
            return {"": column.cast(kind).cast(pa.timestamp("us"))}
        except pa.ArrowInvalid:
            continue
    found = {}
    for day in written:
        for clock, digits in OF_DAY.items():
            if day and _all_match(column, f"^{WRITTEN[day]}{digits}$"):
                read = pc.strptime(column, format=day + clock, unit="us", error_is_null=True)
                if read.null_count == column.null_count and _same_day(column, read, day):
                    found[day] = read
    return found


def is_date(kind: pa.DataType) -> bool:
    """Whether a column's values are points in time."""
    import pyarrow as pa

    return bool(pa.types.is_date(kind) or pa.types.is_timestamp(kind))


def with_hours(column: pa.ChunkedArray) -> bool:
    """Whether some points in time are none of midnight."""
    there = _microseconds(column.drop_null())
    return bool((there % DAY != 0).any())


def told(column: pa.ChunkedArray) -> str:
    """What a network sees of them, in words."""
    parts = ["in time", "in the year", "in the week", *["in the day"] * with_hours(column)]
    return f"as places {', '.join(parts[:-1])} and {parts[-1]}"


def places(column: pa.ChunkedArray, hours: bool) -> np.ndarray:
    """Where dates are in time, in the year, in the week and, with `hours`, in the day: float32 `[N, 5 or 7]`.

    These are days since 2000, and a sine and a cosine each of the parts that come again. What is missing is NaN.
    """
    gaps = column.is_null().to_numpy()
    at = _microseconds(column.fill_null(0)) / DAY
    day = np.floor(at)
    months = day.astype("datetime64[D]")
    year = months.astype("datetime64[Y]").astype("datetime64[D]")
    turns = [(months - year).astype(np.float64) / 365.25, (day + 3) % 7 / 7]  # 1970 began on a Thursday
    turns += [at - day] if hours else []
    around = [part(2 * np.pi * turn) for turn in turns for part in (np.sin, np.cos)]
    values = np.stack([at - SINCE, *around], axis=1).astype(np.float32)
    values[gaps] = np.nan
    return values


def _same_day(column: pa.ChunkedArray, read: pa.ChunkedArray, written: str) -> bool:
    """Whether strings name the days that they were read as: Arrow takes the 31st of February for the 2nd of March."""
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = pc.extract_regex(column, r"(?P<a>\d+)\D(?P<b>\d+)\D(?P<c>\d+)")
    places = re.findall(r"%(\w)", written)
    day = pc.struct_field(parts, [places.index("d")]).cast(pa.int64())
    return bool(pc.all(pc.equal(day, pc.day(read))).as_py())


def _microseconds(column: pa.ChunkedArray) -> np.ndarray:
    import pyarrow as pa

    naive = column.cast(pa.timestamp("us", getattr(column.type, "tz", None)), safe=False)
    values: np.ndarray = naive.cast(pa.int64()).to_numpy()
    return values


def _all_match(column: pa.ChunkedArray, pattern: str) -> bool:
    import pyarrow.compute as pc

    return bool(pc.all(pc.match_substring_regex(column, pattern)).as_py())
