"""How files are read, where settings say it; what they leave open is found out, and told."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.errors import UsageError
from fedloom.parsing import Term, bound

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "bar": "|", "blank": " "}
COLUMNS = ".columns.yaml"  # ends the name of a file that says what rows mean, and has none
PIECE = 1 << 20  # bytes that are read at a time
LEAST_LETTERS = 0.5  # of the bytes beyond ASCII, those where Western letters lie
MOST_RUNS = 0.3  # of them, those that stand beside one another; in the West such letters stand alone as a rule


@dataclass(frozen=True)
class Windows:
    """How a series of rows is cut: `length` rows a window, one every `stride`, its target `horizon` rows after it.

    A client's rows are one series, or one for each value of the column `series`; their order is that in which they
    stand, or that of the column `time`.
    """

    length: int
    stride: int = 1
    horizon: int = 0
    series: str = field(default="", kw_only=True)
    time: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if self.series and self.series == self.time:
            raise UsageError(
                f"windows: series and time are both {self.series!r}; one column names the series, another says when a "
                "row was"
            )
        for name, value, least in (
            ("length", self.length, 2),
            ("stride", self.stride, 1),
            ("horizon", self.horizon, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise UsageError(
                    f"windows: {name} is {value!r}; expected a whole number from {least}, as in windows=32,stride=8,"
                    "horizon=1"
                )


@dataclass(frozen=True)
class Files:
    """Settings of how files are read: the cells of .csv files, the encoding of texts, the size of images, windows.

    An empty one is left to be found out, or the files as they are.
    """

    sep: str = ""
    encoding: str = ""
    decimal: str = ""
    resize: tuple[int, int] | tuple[()] = ()  # width and height
    windows: Windows | None = None
    ready: bool = False  # arrays [T, C] a row are windows, and no images
    series: str = ""  # the network that is asked for, if it reads series: arrays [T, C] then cannot be images

    @staticmethod
    def of(spec: Spec) -> Files:
        """The settings of a run; raises UsageError for what is none."""
        return Files.told(spec.sep, spec.encoding, spec.decimal, spec.resize, spec.windows)

    @staticmethod
    def told(
        sep: str | None,
        encoding: str | None,
        decimal: str | None,
        resize: int | str | None,
        windows: int | str | None = None,
    ) -> Files:
        """Settings as they are written: `sep=semicolon`, `encoding=latin-1`, `decimal=,`, `resize=64x48`."""
        separator = SEPARATORS.get(sep or "", sep or "")
        if len(separator) > 1:
            raise UsageError(f"sep is {sep!r}; expected one character, or one of {', '.join(SEPARATORS)}")
        if decimal not in (None, "", ",", "."):
            raise UsageError(f"decimal is {decimal!r}; expected a comma or a point")
        if decimal and decimal == separator:
            raise UsageError(f"sep and decimal are both {decimal!r}; a cell would end within its number")
        if encoding:
            try:
                codecs.lookup(encoding)
            except LookupError:
                raise UsageError(
                    f"unknown encoding {encoding!r}; expected utf-8, latin-1, cp1250, gbk or another that Python knows"
                ) from None
        ready = windows == GIVEN
        if str(windows).startswith(f"{GIVEN},"):
            raise UsageError(
                f"windows={windows}: windows that are given are cut and in order already, and take no options; write "
                "windows=given"
            )
        return Files(
            separator, encoding or "", decimal or "", _size(resize), None if ready else _windows(windows), ready
        )

    def refuse_unread(self, data: str, read: tuple[str, ...]) -> None:
        """Raises UsageError for a setting that has no effect on data of their kind; `read` are those that have one."""
        if self.ready and "ready" not in read:
            raise UsageError(
                f"windows=given says that arrays [T, C] a row are windows, and {data} has none; leave it out"
            )
        for name in ("sep", "encoding", "decimal", "resize", "windows"):
            if getattr(self, name) and name not in read:
                what = READ.get(name, "the cells of .csv files")
                raise UsageError(f"{name} says how {what} are read, and {data} has none; leave it out")


PLAIN = Files()
GIVEN = "given"
READ = {"resize": "images", "encoding": "text", "windows": "the rows of tables"}  # what settings say something of


def _windows(text: int | str | None) -> Windows | None:
    return None if text in (None, "") else Windows(**bound(Term(f"windows:{text}"), Windows))


def _size(resize: int | str | None) -> tuple[int, int] | tuple[()]:
    if resize in (None, ""):
        return ()
    parts = str(resize).lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() and 0 < int(part) <= 4096 for part in parts):
        raise UsageError(f"resize is {resize!r}; expected a number of pixels up to 4096, or WIDTHxHEIGHT, as 64x48")
    return int(parts[0]), int(parts[-1])


def guessed_encoding(file: Path) -> str:
    """`utf-8`, or `cp1252` (Windows' and, as far as it goes, Latin-1) where the bytes are those of Western letters.

    Raises UsageError for what looks like neither.
    """
    utf8, western = (_Trial(name) for name in ("utf-8", "cp1252"))
    high = letters = runs = 0
    with file.open("rb") as opened:
        while piece := opened.read(PIECE):
            utf8.decode(piece)
            western.decode(piece)
            beyond = [] if piece.isascii() else [place for place, byte in enumerate(piece) if byte >= 0x80]
            high += len(beyond)
            letters += sum(piece[place] >= 0xA0 for place in beyond)
            runs += sum(after == place + 1 for place, after in pairwise(beyond))
    utf8.decode(b"", final=True)
    if utf8.fits:
        return "utf-8"
    if not western.fits or letters < LEAST_LETTERS * high or runs > MOST_RUNS * high:
        raise UsageError(
            f"{file} is not UTF-8, and does not look like Latin-1 or Windows-1252; say which it is, as in "
            "encoding=cp1250, encoding=gbk or encoding=shift_jis"
        )
    return "cp1252"


class _Trial:
    """Whether all the bytes that come are text in an encoding."""

    def __init__(self, encoding: str) -> None:
        self.decoder = codecs.getincrementaldecoder(encoding)()
        self.fits = True

    def decode(self, piece: bytes, final: bool = False) -> None:
        try:
            if self.fits:
                self.decoder.decode(piece, final)
        except UnicodeDecodeError:
            self.fits = False
