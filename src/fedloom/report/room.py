"""How much room a table needs in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNCUT = 10_000  # columns, in which every table has room


def fits(console: Console, table: Table) -> bool:
    """Whether a table has room, with no cell cut or broken."""
    needs = console.measure(table, options=console.options.update(max_width=UNCUT)).maximum
    return needs <= console.width
