"""Cells of text: which of them are gaps, and which columns of them are numbers."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.data.files import PLAIN, Files, guessed_encoding
from fedloom.data.source import listed
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

SEPARATORS = ",;\t|"
MARKERS = ("?", "-", "--", ".", "na", "n/a", "#n/a", "<na>", "nan", "null")  # what stands for nothing, in any case
PYTHONS = "none"  # ... in a column of numbers; beside words it may be an answer
HEAD = 2**16  # bytes of a file that tell its separator
BLOCK, WIDEST = 2**20, 2**30  # bytes that Arrow reads at once: as a rule, and at most
LONG = r"^[+-]?\d{17,}$"  # a number of so many digits is a name: no float holds it
GROUPED = r"^[+-]?\d{1,3}([,. '\x{a0}\x{202f}]\d{3})+([.,]\d+)?$|^[+-]?\d+,\d+$"  # 1,234 and 1.234,5 and 1,5
WITH_UNIT = r"^[+-]?[$€£¥]?\s?\d[\d.,]*\s?(%|[$€£¥]|[A-Za-zµ°]{1,4})?$"  # 5 kg, 12%, $3.50
DECIMAL_COMMA = r"^[+-]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?$"
THOUSANDS = r"^[+-]?\d{1,3}(\.\d{3})+$"


def read_csv(file: Path, how: Files = PLAIN) -> tuple[pa.Table, str, list[str]]:
    """The table of a file, all of its columns strings, what separates them, and what was found out, in words.

    A comma, semicolon, tab or bar separates: the one that the first lines have alike. An empty cell is null. Raises
    what Arrow raises, UsageError.
    """
    import pyarrow as pa
    import pyarrow.csv

    with file.open("rb") as opened:
        head = opened.read(HEAD)
    if not how.encoding and (head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head):
        raise UsageError(
            f"{file} is not UTF-8 but, it seems, UTF-16; set encoding=utf-16, or save it again with the encoding UTF-8"
        )
    encoding = how.encoding or guessed_encoding(file)
    separator = how.sep or _separator(head.decode(encoding, "replace"))
    told = [] if how.sep or separator == "," else [f"cells are separated by {separator!r} (sep= says another)"]
    told += [] if how.encoding or encoding == "utf-8" else ["text is in Windows-1252 (encoding= says another)"]
    parsing = pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    reading = pa.csv.ReadOptions(block_size=_block(file), encoding=encoding)
    try:
        with pa.csv.open_csv(file, reading, parsing) as opened_csv:
            names = opened_csv.schema.names
        as_text = pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True
        )
        table = pa.csv.read_csv(file, reading, parsing, as_text)
    except (UnicodeError, pa.ArrowInvalid) as error:
        if isinstance(error, UnicodeError) or "utf8" in str(error).lower():
            raise UsageError(f"{file} is not in the encoding {encoding}; set another: encoding=NAME") from None
        raise
    names = [name.strip() for name in names]
    figures = len(names) > 1 and all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name) for name in names)
    if figures and [float(name) for name in names] != [float(names[0]) + place for place in range(len(names))]:
        raise UsageError(f"{file} begins with numbers, {listed(names)}; its first line must name the columns")
    return table.rename_columns(names), separator, told


def _block(file: Path) -> int:
    """Bytes that Arrow reads at once: a row, of which the first two are looked at, must lie within one block."""
    with file.open("rb") as opened:
        longest = max(len(opened.readline(WIDEST)), len(opened.readline(WIDEST)))
    return min(max(BLOCK, 4 * longest), WIDEST)


def _separator(head: str) -> str:
    """What the first lines have equally many of, at least one; of several, what they have most of."""
    lines = head.splitlines()
    lines = [line for line in (lines[:-1] if len(lines) > 1 else lines) if line.strip()][:20]
    best, most = ",", 1
    for separator in SEPARATORS:
        widths = {len(row) for row in csv.reader(io.StringIO("\n".join(lines)), delimiter=separator)}
        if len(widths) == 1 and (width := widths.pop()) > most:
            best, most = separator, width
    return best


def trim(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings without blanks around them; nothing, or nothing but blanks, is null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    bare = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.equal(bare, ""), pa.scalar(None, pa.string()), bare)


def null_markers(column: pa.ChunkedArray, also: tuple[str, ...] = ()) -> tuple[pa.ChunkedArray, str]:
    """The strings with null for every marker of a gap, and which markers those were, in words."""
    import pyarrow as pa
    import pyarrow.compute as pc

    marked = pc.is_in(pc.utf8_lower(column), value_set=pa.array([*MARKERS, *also]))
    words = Counter(column.filter(marked).to_pylist())
    return pc.if_else(marked, pa.scalar(None, pa.string()), column), listed(sorted(words))


def numbers(column: pa.ChunkedArray, commas: bool = False, points: bool = True) -> pa.ChunkedArray | None:
    """The strings as whole numbers, fractions or truth values, if each of them is one.

    `commas`: decimal commas too; not `points`: a point parts thousands, and no decimals.
    """
    import pyarrow as pa

    if any_matches(column, LONG):
        return None
    if not points and share(column, DECIMAL_COMMA) == 1 and any_matches(column, r"[.]"):
        return _without_commas(column)
    for kind in (pa.int64(), pa.float64(), pa.bool_()):
        try:
            return column.cast(kind)
        except pa.ArrowInvalid:
            continue
    if commas and share(column, DECIMAL_COMMA) == 1:
        return _without_commas(column)
    return None


def european(separator: str, decimal: str) -> bool:
    """Whether cells may have decimal commas: as a setting says, or where the comma does not separate them."""
    return decimal == "," or (not decimal and separator not in ("", ","))


def _without_commas(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers with decimal commas, `1.234,5`, as fractions."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.replace_substring(pc.replace_substring(column, ".", ""), ",", ".").cast(pa.float64())


def thousands(name: str, column: pa.ChunkedArray) -> dict[str, str]:
    """By name, what is wrong with a column whose points all have three digits behind them, if others have commas."""
    import pyarrow.compute as pc

    values = column.drop_null()
    pointed = values.filter(pc.match_substring(values, "."))
    if not len(pointed) or share(pointed, THOUSANDS) < 1:
        return {}
    told = (
        f"column {name!r} has points in numbers, such as {listed(pointed.unique().to_pylist(), 3)}, and others commas"
    )
    return {
        name: f"{told}: write all with a decimal point and no thousands' mark, or set exclude={name}; decimal=, takes "
        "every comma for the decimal mark, and points for thousands'"
    }


def strangers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Those of the strings that are no plain numbers."""
    import pyarrow.compute as pc

    plain = pc.match_substring_regex(column, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
    return column.filter(pc.invert(plain))


def any_matches(column: pa.ChunkedArray, pattern: str) -> bool:
    """Whether one of the strings matches."""
    import pyarrow.compute as pc

    return pc.any(pc.match_substring_regex(column, pattern)).as_py() or False


def share(column: pa.ChunkedArray, pattern: str) -> float:
    """How much of the strings, gaps aside, matches."""
    import pyarrow.compute as pc

    return pc.mean(pc.match_substring_regex(column, pattern)).as_py() or 0.0
