"""LEAF's JSON files: `users`, and in `user_data` the x and y of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.data.source import listed
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
