"""The floors of the package as a picture, from the table in `layout.md` and the files themselves."""

from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, GAP = 860, 46, 130, 8  # of the picture, a floor, the floors' names, and between boxes
TEAL = "#00796b"
Floors = list[tuple[str, list[str]]]


def floors(page: str) -> Floors:
    """(name, units) of every floor in the page's table, the highest first; a unit is a module or a package."""
    table = page.split("| --- | --- | --- |\n", 1)[1].split("\n\n", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [(name, units.replace("`", "").split()) for name, units, _ in rows]


def floor_of(module: str, found: Floors) -> int:
    """The height of a module such as `boundary.cache`: that of the longest unit that it is, or is in; ground is 0."""
    fitting = [
        (len(unit), len(found) - 1 - place)
        for place, (_, units) in enumerate(found)
        for unit in units
        if module == unit or module.startswith(f"{unit}.")
    ]
    if not fitting:
        raise ValueError(f"no floor has {module}; give it a place in the table of docs/layout.md")
    return max(fitting)[1]


def picture(page: str, source: Path) -> str:
    """An SVG: a row of boxes for each floor, a box for each unit with its lines of code."""
    rows, found = [], floors(page)
    for place, (name, units) in enumerate(found):
        y = 10 + place * (HEIGHT + GAP)
        rows.append(f'<text x="{LEFT - 12}" y="{y + 28}" text-anchor="end" class="floor">{escape(name)}</text>')
        weights = [len(unit) + 2 for unit in units]
        room, x = WIDTH - LEFT - GAP * (len(units) - 1), float(LEFT)
        for unit, weight in zip(units, weights, strict=True):
            wide = room * weight / sum(weights)
            size, at = min(13.0, 1.4 * wide / len(unit)), f'x="{x + wide / 2:.1f}" text-anchor="middle"'
            rows.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{HEIGHT}" rx="5"/>'
                f'<text {at} y="{y + 21}" font-size="{size:.1f}">{unit}</text>'
                f'<text {at} y="{y + 37}" class="lines">{lines(unit, source, found)}</text>'
            )
            x += wide + GAP
    high = 20 + len(found) * (HEIGHT + GAP)
    style = (
        "text{font-family:sans-serif;fill:#fff}.floor{font-size:14px;font-weight:bold;fill:" + TEAL + "}"
        ".lines{font-size:9px;fill:#b2dfdb}rect{fill:" + TEAL + "}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 10} {high}" role="img" '
        f'aria-label="The floors of the package, the doors above and the ground below">'
        f"<style>{style}</style>{''.join(rows)}</svg>"
    )


def lines(unit: str, source: Path, found: Floors) -> int:
    """Lines of code of a module or a package, without what of it has a place of its own."""
    path = source.joinpath(*unit.split("."))
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    own = sum(len(file.read_text().splitlines()) for file in files)
    return own - sum(lines(part, source, found) for _, units in found for part in units if part.startswith(f"{unit}."))
