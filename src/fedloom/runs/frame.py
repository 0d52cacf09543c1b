"""Rows as a table of pandas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.errors import UsageError


def frame(rows: Sequence[Mapping[str, Any]], index: Sequence[str] | None = None) -> Any:
    """Rows as a DataFrame; raises UsageError where pandas is not installed."""
    try:
        import pandas as pd
    except ImportError:
        raise UsageError("frame() makes a DataFrame of pandas, which is not installed: pip install pandas") from None
    return pd.DataFrame(list(rows), index=index)
