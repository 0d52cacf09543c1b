"""A comparison's table in a terminal: a line a method where that fits, else a line a measure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table as Grid
from rich.text import Text

from fedloom.comparison.measures import about
from fedloom.comparison.table import Row, Table, table
from fedloom.report import exports
from fedloom.report.comparison import notes
from fedloom.report.room import fits

if TYPE_CHECKING:
    from rich.console import Console

    from fedloom.comparison.results import Results


def print_table(console: Console, results: Results) -> None:
    """The table, setting by setting, and what a reader must know of it."""
    made = table(results)
    for setting in results.settings:
        cells = {row.method: _cells(made, setting, row, len(results.seeds)) for row in made.of(setting)}
        wide = _wide(setting, cells)
        console.print(wide if fits(console, wide) else _tall(setting, cells))
        console.print()
    for note in notes(results, made):
        console.print(note, soft_wrap=True)


def _cells(made: Table, setting: str, row: Row, seeds: int) -> dict[str, Text]:
    """What is told of a method, by its head."""
    main, unit = made.qualities[0].name, about(made.metric).unit
    single = [name for name in made.having(f"personal_test_{main}", f"global_test_{main}") if "@" in name]
    lasting = made.having(f"newcomer_test_{main}", "incremental_accuracy", "forgetting")
    further = [f"global_test_{main}", *lasting, f"worst_client_{main}", *single, "rounds_to_target"]
    p = "" if row.test is None else "too few" if row.test.holm is None else exports.tested(row.test)
    effect = "" if row.test is None or row.test.effect is None else f"{row.test.effect:+.2f}"
    told = {
        exports.headed(made.metric): Text(exports.score(row.score, unit), "bold" if row.leads else ""),
        f"p against {made.references.get(setting)}": Text(p),
        "effect g": Text(effect),
    }
    told |= {about(name).words: Text(exports.measure(row, name)) for name in further if name != made.metric}
    return told | {"seeds": Text(f"{len(row.seeds)}/{seeds}"), "": Text(exports.state(row))}


def _wide(setting: str, cells: dict[str, dict[str, Text]]) -> Grid:
    grid = Grid(box=None, pad_edge=False, header_style="dim", title=setting, title_justify="left")
    grid.add_column("method")
    for head in next(iter(cells.values()), {}):
        grid.add_column(head, justify="right" if head else "left")
    for method, told in cells.items():
        lead = next(iter(told.values())).style
        grid.add_row(Text(method, lead), *told.values())
    return grid


def _tall(setting: str, cells: dict[str, dict[str, Text]]) -> Grid:
    """A line a measure under each method's name; what a method has nothing of is left out."""
    grid = Grid.grid(padding=(0, 2))
    grid.title, grid.title_justify = setting, "left"
    for method, told in cells.items():
        grid.add_row(Text(method, "bold"), "")
        for head, text in told.items():
            if text.plain:
                grid.add_row(Text(f"  {head}" if head else "  lacking", "dim"), text)
    return grid
