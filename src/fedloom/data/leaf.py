"""LEAF's JSON files: `users`, and in `user_data` the x and y of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedloom.data.arrow import is_string, raw_values
from fedloom.data.holdout import HELD_OUT, percent, refuse_share
from fedloom.data.preprocessing import Feature, Preprocessing
from fedloom.data.source import Source, Table, listed
from fedloom.data.text import PADDING, UNKNOWN, points
from fedloom.data.windows import hold_last_out
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

USER = "user"  # the column of who a row is of


def leaf_table(files: Sequence[Path]) -> pa.Table:
    """The rows of all users of some files, in the files' order: columns `x`, `y` and `user`.

    Where an x is a list with texts in it, its places are columns `x0`, `x1`, ... of texts.
    """
    import pyarrow as pa

    rows: list[tuple[Any, Any, str]] = []
    for file in files:
        for user, own in _users(file):
            x, y = own.get("x"), own.get("y")
            if not isinstance(x, list) or not isinstance(y, list) or len(x) != len(y):
                raise UsageError(
                    f"{file}: user {user!r} has no x and y of one length; expected a row in each per sample"
                )
            rows += zip(x, y, [user] * len(x), strict=True)
    if not rows:
        raise UsageError(f"{files[0]} has users and no rows; give files that have some")
    x, y, users = zip(*rows, strict=True)
    columns: dict[str, Any] = {"x": x}
    if any(isinstance(one, list) and any(isinstance(part, str) for part in one) for one in x):
        widths = {len(one) for one in x}
        if len(widths) > 1:
            raise UsageError(f"{files[0]} has rows of {len(widths)} lengths with texts in them; expected one length")
        columns = {f"x{place}": [str(one[place]) for one in x] for place in range(widths.pop())}
    try:
        return pa.table({**{name: pa.array(part) for name, part in columns.items()}, "y": pa.array(y), USER: users})
    except (pa.ArrowException, TypeError, OverflowError) as error:
        told = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"{files[0]} has rows of no common type ({told}); expected LEAF's layout") from None


def are_letters(table: pa.Table) -> bool:
    """Whether each x is a text, all of one length, and each y the letter that follows, as in LEAF's Shakespeare."""
    import pyarrow.compute as pc

    if "x" not in table.column_names:
        return False
    x, y = (table.column(name) for name in ("x", "y"))
    if not (is_string(x.type) and is_string(y.type)) or x.null_count or y.null_count:
        return False
    lengths = pc.unique(pc.utf8_length(x)).to_pylist()
    return len(lengths) == 1 and lengths[0] > 1 and pc.unique(pc.utf8_length(y)).to_pylist() == [1]


def letters(data: str, train: pa.Table, test: pa.Table | None, share: float | None) -> Source:
    """Next-letter prediction on texts that are cut already: rows of letters, and the letter that follows each.

    All letters of the training rows are classes. Without test rows they are each user's last `share` (None:
    `HELD_OUT`), in the order in which rows stand, so that no letter that is to be predicted there is predicted, or
    read, in training. Test rows with another letter to predict are left out.
    """
    length = _length(train)
    told = [f"each x is a text of {length} letters and y the next one: they are read letter by letter"]
    if test is not None:
        refuse_share(data, share, test.num_rows)
        if not are_letters(test) or _length(test) != length:
            raise UsageError(f"{data} has texts of {length} letters in its training split alone; give both splits such")
    else:
        train, test = hold_last_out(data, train, USER, share or HELD_OUT)
        share_told = f"the last {percent(share or HELD_OUT)} of each user's rows"
        told.append(f"{share_told} are held out as test rows, {test.num_rows} in all")
        if not train.num_rows or not test.num_rows:
            raise UsageError(
                f"{data} has too few rows of each user to hold some out; give test rows in a folder test beside train"
            )
    alphabet = np.unique(np.concatenate([_points(train, "x"), _points(train, "y")]))
    read, asked = (_numbered(table, alphabet, length) for table in (train, test))
    if left := test.num_rows - len(asked.y):
        told.append(f"{left} test rows are left out, whose next letter stands in no training row")
    classes = tuple(map(chr, alphabet))
    known = PADDING, UNKNOWN, *classes
    how = Preprocessing("text", (Feature("x", "text"),), (length,), tokens="characters", vocabulary=known)
    return Source(
        *(data, "text", classes, read, asked, known), preprocessing=how, decisions=tuple(told), test_share=share
    )


def _length(table: pa.Table) -> int:
    """How many letters each text of a table has."""
    return len(table.column("x")[0].as_py())


def _points(table: pa.Table, name: str) -> np.ndarray:
    return points("".join(table.column(name).to_pylist()))


def _numbered(table: pa.Table, alphabet: np.ndarray, length: int) -> Table:
    """The rows whose y is in the alphabet: letters as tokens, of which the first two are padding and unknown."""
    found = []
    for name in ("x", "y"):
        letter = _points(table, name)
        place = np.searchsorted(alphabet, letter).clip(max=len(alphabet) - 1)
        found.append((place, alphabet[place] == letter))
    (x, known), (y, there) = found
    tokens = np.where(known, x + 2, 1).reshape(-1, length)
    users = {USER: raw_values(table.column(USER))[there]}
    return Table(torch.from_numpy(tokens[there]), torch.from_numpy(y[there]), users)


def _users(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The users of a file with their data, in their order."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {file}: {str(error).splitlines()[0]}; expected JSON in LEAF's layout") from None
    data = found.get("user_data") if isinstance(found, dict) else None
    users = found.get("users") if isinstance(found, dict) else None
    if not isinstance(users, list) or not isinstance(data, dict):
        raise UsageError(
            f"{file} is not in LEAF's layout, a JSON object with users and user_data; save other tables as .csv"
        )
    if lacking := [user for user in users if not isinstance(data.get(user), dict)]:
        raise UsageError(
            f"{file} names the user {listed(lacking)} and has no data of it in user_data; give whole files"
        )
    return [(str(user), data[user]) for user in users]
