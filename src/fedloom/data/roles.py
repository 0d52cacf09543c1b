"""What each column of a table is used as: told in words, and refused with the choices where it cannot be told apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedloom.data import dates
from fedloom.data.arrow import is_string
from fedloom.data.source import FEATURES, Column, listed
from fedloom.data.text import BLANKLESS
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

LABELS = ("label", "labels", "target", "targets", "y", "class", "intent", "income")
ENOUGH = 20  # rows from which on a column's values say what it is
MOST_CATEGORIES = 1000
FEW = 20  # values that a number may have to be looked upon as a name
SAMPLED = 2000  # rows that are looked at before all are
WORDS = 3  # of a text, on average; shorter strings are names
EXCLUDED = "excluded"  # why a column that the user left out is ignored

_IDENTIFIER = re.compile(
    r"(?i:(^|[\W_])(id|ids|idx|uuid|guid|pk|mrn|ssn)$|^(index|row|rowid|row_?(number|no|nr)|serial)$)"
    r"|^(Unnamed: \d+|#|)$|[a-z](Id|ID|Idx|UUID)$"
)
_PERSON = re.compile(
    r"(client|user|speaker|writer|patient|participant|customer)([\W_]?(id|name|no|nr))?", re.IGNORECASE
)
_GENERIC = ("label", "labels", "target", "targets", "intent")  # no feature is called so
_MANY = re.compile(r"(labels?|targets?|class(es)?)([\W_]|(?=\d))|y(?=[\W_]?\d)")  # begins the names of several labels
_COPY = r"(fine|coarse|sub|super|raw|true|original)?[\W_]*{}s?[\W_]*(name|text|id|idx|str|string|code|encoded)?"


@dataclass(frozen=True)
class Wanted:
    """What the settings say of columns: the label, which names the clients, which are left out or taken as they are."""

    label: str
    client: str | None = None
    exclude: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()  # columns beside x and y
    kind: str = "class"  # what the label is: a class, an amount, labels, shares, a mask
    size: tuple[int, int] | tuple[()] = ()  # width and height to which masks are resized
    series: str = ""  # the column that tells series of windows apart, and that by which they are sorted
    time: str = ""

    def has_role(self, name: str) -> bool:
        """Whether a column's use is said, so that nothing is left to find out."""
        return name in (self.label, self.client, *self.exclude, *self.beside, *self.sequence)

    @property
    def sequence(self) -> tuple[str, ...]:
        """The columns that put rows in their places in series, and are no features."""
        return tuple(name for name in (self.series, self.time) if name and name not in self.keep)

    @property
    def beside(self) -> tuple[str, ...]:
        """The columns that go with the rows and are no features."""
        return tuple(name for name in self.metadata if name not in self.keep)


def roles(data: str, table: pa.Table, wanted: Wanted) -> tuple[Column, ...]:
    """Every column of a training table, in order. Raises UsageError where the data leave open what a column is."""
    seen = _Seen(data, table, wanted)
    found = {name: seen.role(name) for name in table.column_names}
    used = [name for name, column in found.items() if column.role in FEATURES]
    if not used:  # a number that counts the rows is better than nothing, and is told
        counting = [name for name, column in found.items() if column.note.startswith(COUNTS)]
        found |= {name: Column(name, "number", found[name].note) for name in counting}
        used = counting
    if not used and not seen.problems:
        left = "; ".join(f"{name!r}: {c.note}" for name, c in found.items() if c.role == "ignored")
        raise UsageError(
            f"{data} has no feature columns beside {listed([wanted.label])}{f' ({left})' if left else ''}; give a file "
            "that has some, or name in keep= what is one"
        )
    pictures = [name for name in used if found[name].role == "image"]
    texts = [name for name in used if found[name].role == "text"]
    if len(pictures) > 1:
        raise UsageError(f"{data} has several image columns ({listed(pictures)}); exclude all but one")
    if pictures:
        beside = "beside images nothing else is read"
        if kept := [name for name in used if name in wanted.keep and name not in pictures]:
            raise UsageError(f"{data} has images, and {beside}; leave {listed(kept)} out of keep")
        found |= {name: Column(name, "ignored", beside) for name in used if name not in pictures}
        return tuple(found.values())
    others = [name for name in used if name not in texts]
    problems = list(seen.problems.values())
    problems += seen.check_other_labels(others)
    if problems:
        raise UsageError(f"{data}: {'; '.join(problems)}")
    return tuple(found.values())


COUNTS = "counts the rows"


class _Seen:
    """A training table, looked at column by column."""

    def __init__(self, data: str, table: pa.Table, wanted: Wanted) -> None:
        self.data, self.table, self.wanted = data, table, wanted
        self.problems: dict[str, str] = {}
        self.pairs: dict[str, tuple[int, int]] = {}
        labels = table.column(wanted.label)
        self.labelled = labels.is_valid().to_numpy(zero_copy_only=False)
        classed = wanted.kind == "class"
        self.y = _codes(labels.filter(labels.is_valid())) if classed else np.zeros(self.labelled.sum(), np.int64)
        self.classes = int(self.y.max()) + 1 if len(self.y) and classed else 0

    def role(self, name: str) -> Column:
        wanted, values = self.wanted, self.table.column(name).drop_null()
        if name == wanted.label:
            return Column(name, "label", self._label_note(values))
        if name == wanted.client:
            return Column(name, "client", f"{_distinct(values)} clients{_case_note(values)}")
        if name in wanted.exclude:
            return Column(name, "ignored", EXCLUDED)
        if name in wanted.beside:
            return Column(name, "metadata", f"{_distinct(values)} values; keep={name} makes it a feature too")
        if name in wanted.sequence:
            use = ("series", f"{_distinct(values)} series") if name == wanted.series else ("time", values_range(values))
            return Column(name, use[0], f"{use[1]}; keep={name} makes it a feature too")
        kept = name in wanted.keep
        kind = _kind(values, kept)
        if kind in ("image", "numbers"):
            width = f"{values.type.shape[0]} numbers a row" if kind == "numbers" else ""
            return Column(name, "number" if kind == "numbers" else kind, width)
        if not kept and (why := self._why_no_feature(name, values, kind)):
            return Column(name, "ignored", f"{why}; keep={name} makes it a feature" if len(values) and name else why)
        if kind == "text":
            return Column(name, "text", "kept" if kept else "")
        if kind == "date":
            return Column(name, "date", dates.told(values))
        if kind not in ("number", "category"):
            self.problems[name] = (
                f"column {name!r} is {kind}; expected numbers, strings, dates or images: convert it, or leave it out "
                f"with exclude={name}"
            )
        elif not kept:
            note = self._label_leak_note(name, values, kind)
            return Column(name, kind, note or (f"{_distinct(values)} values" if kind == "category" else ""))
        return Column(name, kind, "kept" if kept else "")

    def _label_note(self, values: pa.ChunkedArray) -> str:
        """What is to be said of the label."""
        if self.wanted.kind in ("labels", "shares"):
            return f"{values.type.shape[0]} {self.wanted.kind} a row"
        if self.wanted.kind == "mask":
            return "masks of {1} x {0} pixels".format(*values.type.shape)
        return (
            values_range(values)
            if self.wanted.kind == "amount" and len(values)
            else (f"{self.classes} classes{_case_note(values)}")
        )

    def _why_no_feature(self, name: str, values: pa.ChunkedArray, kind: str) -> str:
        """Why a column is no feature, if it is none; what comes from its name first."""
        rows = len(values)
        if not rows:
            return "has no values"
        if label_like(name, self.wanted.label):
            return "named as a label is"
        if _PERSON.fullmatch(name):
            return f"names whose a row is (partition=column:{name} makes clients of it)"
        if kind == "date" and rows >= ENOUGH and _distinct(values) == 1:
            return "the same in every row"
        if kind not in ("number", "category"):
            return ""
        if kind == "number" and _counts(values):
            return f"{COUNTS}, from {values_range(values)}"
        many = _distinct(values) if kind == "category" or _IDENTIFIER.search(name) else 0
        if _IDENTIFIER.search(name) and many > min(FEW, rows / 2):
            return f"an identifier by its name, {many:,} values in {rows:,} rows"
        if kind == "category" and rows >= ENOUGH and many > rows / 2:
            return f"an identifier, or nearly: {many:,} values in {rows:,} rows"
        if rows >= ENOUGH and (many == 1 if many else _constant(values)):
            return "the same in every row"
        several, mine = self._pairs_of(name) if self.classes else (0, 0)
        if several == self.classes > mine > 1:
            return f"a coarser label: every class of {self.wanted.label!r} has one value of it"
        return ""

    def _label_leak_note(self, name: str, values: pa.ChunkedArray, kind: str) -> str:
        """What is to be said of a column that tells the label by itself; a problem where it is the label's copy."""
        if self.wanted.kind != "class":
            return self._line_note(name, kind) if self.wanted.kind == "amount" else ""
        several, mine = self._pairs_of(name)
        if several == mine > 1 and (mine == self.classes or kind == "category"):
            self.problems[name] = (
                f"column {name!r} tells the label: each of its {mine} values has one class only; exclude={name} leaves "
                f"it out, keep={name} trains on it"
            )
        return self._separation_note(name, kind)

    def _line_note(self, name: str, kind: str) -> str:
        """Nothing to be said of a column beside an amount; a problem where the amount is a line of it."""
        if kind == "number" and len(self.y) >= ENOUGH:
            both = [_floats(self.table.column(one))[self.labelled] for one in (name, self.wanted.label)]
            there = np.isfinite(both).all(0)
            if there.sum() >= ENOUGH and abs(np.corrcoef([one[there] for one in both])[0, 1]) > 1 - 1e-9:
                self.problems[name] = (
                    f"column {name!r} tells the target {self.wanted.label!r}, which lies on a line of it; "
                    f"exclude={name} leaves it out, keep={name} trains on it"
                )
        return ""

    def _separation_note(self, name: str, kind: str) -> str:
        """A note on numbers of which those of one class all lie below those of the other."""
        if kind != "number" or self.classes != 2 or len(self.y) < ENOUGH:
            return ""
        x = _floats(self.table.column(name))[self.labelled]
        first, second = x[self.y == 0], x[self.y == 1]
        if np.nanmax(first, initial=-np.inf) < np.nanmin(second, initial=np.inf) or (
            np.nanmax(second, initial=-np.inf) < np.nanmin(first, initial=np.inf)
        ):
            return f"tells the label by itself; exclude={name} if it is known only afterwards"
        return ""

    def _pairs_of(self, name: str) -> tuple[int, int]:
        """How many pairs of a value and a class there are, and how many values; zeros where that says nothing."""
        if name not in self.pairs:
            self.pairs[name] = self._count_pairs(name)
        return self.pairs[name]

    def _count_pairs(self, name: str) -> tuple[int, int]:
        column = self.table.column(name)
        there = self.labelled & column.is_valid().to_numpy(zero_copy_only=False)
        rows = int(there.sum())
        if rows < max(50, 5 * self.classes):
            return 0, 0
        y = self.y[there[self.labelled]]
        for some in sorted({min(SAMPLED, rows), rows}):
            codes = _codes(column.filter(_mask(there)).slice(0, some))
            mine = int(codes.max()) + 1
            pairs = len(np.unique(codes * self.classes + y[:some]))
            if pairs > max(mine, self.classes) or mine > some / 5:
                return 0, 0
        return pairs, mine

    def check_other_labels(self, features: Sequence[str]) -> Iterator[str]:
        """A table of several labels, 0 or 1 each, of which one was named: the others must not become its features."""
        label = self.wanted.label
        names = [name for name in self.table.column_names if name in (label, *features)]
        at = names.index(label)
        if self.wanted.kind != "class" or label.lower() in LABELS or not _binary(self.table.column(label)):
            return
        first = last = at
        while first > 0 and _binary(self.table.column(names[first - 1])):
            first -= 1
        while last < len(names) - 1 and _binary(self.table.column(names[last + 1])):
            last += 1
        block = [name for name in names[first : last + 1] if name not in (label, *self.wanted.keep)]
        at_an_end = at in (0, len(names) - 1)  # where the label of a table of features usually is
        if block and not (at_an_end and len(block) > FEW):
            yield (
                f"the columns {listed(block)} beside the label {label!r} are 0 or 1 as it is: "
                f"exclude={','.join(block)} if they are labels too, keep={','.join(block)} if they are features"
            )


def label_like(name: str, label: str) -> bool:
    """Whether a column is named as the label is: class_name beside class, target beside label, y2 beside y1."""
    name, label = name.lower(), label.lower()
    begins = _MANY.match(label)
    copies = any(re.fullmatch(_COPY.format(re.escape(word)), name) for word in (label, "label"))
    return name in _GENERIC or copies or (begins is not None and name.startswith(begins[0]))


def _kind(column: pa.ChunkedArray, kept: bool = False) -> str:
    """What a feature column holds: image, number, numbers, category, date, text, or its type if none of these."""
    import pyarrow as pa

    kind = column.type
    if isinstance(kind, pa.FixedShapeTensorType):
        return "numbers" if len(kind.shape) == 1 else "image"
    if pa.types.is_struct(kind):
        return "image" if {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)} else str(kind)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "image"
    if dates.is_date(kind):
        return "date"
    if is_string(kind):
        many = _distinct(column) > len(column) / 2
        return "text" if many and words_of(column) >= (WORDS - 1 if kept else WORDS) else "category"
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
    return "number" if any(is_number(kind) for is_number in kinds) else str(kind)


def words_of(column: pa.ChunkedArray) -> float:
    """The mean number of words of strings: blanks part them, and two letters of a script without blanks are one."""
    import pyarrow.compute as pc

    if not len(column):
        return 0.0
    parted = pc.mean(pc.add(pc.count_substring_regex(column, r"\s+"), 1)).as_py()
    letters = pc.mean(pc.count_substring_regex(column, f"[{BLANKLESS}]")).as_py()
    return float(parted + letters / 2)


def values_range(values: pa.ChunkedArray) -> str:
    """The least and the greatest value, in words."""
    import pyarrow.compute as pc

    ends = pc.min_max(values).as_py()
    return f"{ends['min']} to {ends['max']}"


def _counts(values: pa.ChunkedArray) -> bool:
    """Whether whole numbers are 0, 1, 2, ... of the rows, from any start and in any order."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if len(values) < ENOUGH or not pa.types.is_integer(values.type):
        return False
    ends = pc.min_max(values).as_py()
    return ends["max"] - ends["min"] + 1 == len(values) == _distinct(values)


def _constant(values: pa.ChunkedArray) -> bool:
    ends = values.combine_chunks()
    return bool((_floats(ends) == _floats(ends[:1])).all())


def _binary(column: pa.ChunkedArray) -> bool:
    """Whether a column has 0 and 1, or true and false, and nothing else."""
    import pyarrow as pa

    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
        return False
    values = _floats(column.drop_null())
    return bool(np.isin(values[:SAMPLED], (0, 1)).all() and np.isin(values, (0, 1)).all())


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    import pyarrow as pa

    return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _distinct(values: pa.ChunkedArray) -> int:
    import pyarrow.compute as pc

    return int(pc.count_distinct(values).as_py())


def _codes(values: pa.ChunkedArray) -> np.ndarray:
    """The values as 0, 1, ..., int64 [N]."""
    coded = values.combine_chunks().dictionary_encode()
    return coded.indices.to_numpy().astype(np.int64)


def _mask(there: np.ndarray) -> pa.Array:
    import pyarrow as pa

    return pa.array(there)


def _case_note(values: pa.ChunkedArray) -> str:
    """A note on strings that differ by their case only."""
    if not is_string(values.type):
        return ""
    found: dict[str, list[str]] = {}
    for value in sorted(values.unique().to_pylist()):
        found.setdefault(value.casefold(), []).append(value)
    pairs = [same for same in found.values() if len(same) > 1]
    return f", of which {listed(pairs[0])} differ by case only" if pairs else ""
