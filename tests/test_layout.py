"""The page on the layout of the code is true: every file has a floor, and imports from none above it."""

import sys
from pathlib import Path

import pytest
from test_imports import ROOT, arrows

DOCS = Path(__file__).resolve().parent.parent / "docs"
sys.path.insert(0, str(DOCS))
from layout import floor_of, floors, lines, picture  # noqa: E402

PAGE = (DOCS / "layout.md").read_text()


def short(module):
    return module.removeprefix("fedloom").lstrip(".") or "__init__"


def test_no_file_imports_from_a_floor_above_it():
    found = floors(PAGE)
    height = {module: floor_of(short(module), found) for module in arrows(ROOT)}
    up = [(one, other) for one, its in arrows(ROOT).items() for other in its if height[other] > height[one]]
    assert not up
    assert len(set(height.values())) == len(found) == 10


def test_a_place_of_its_own_goes_before_that_of_its_package():
    found = [("above", ["a", "b"]), ("below", ["a.deep"])]
    assert [floor_of(module, found) for module in ("a", "a.x", "a.deep", "a.deep.er", "b")] == [1, 1, 0, 0, 1]
    with pytest.raises(ValueError, match="no floor has ab"):
        floor_of("ab", found)


def test_the_picture_shows_every_unit_with_its_lines():
    drawn, found = picture(PAGE, ROOT), floors(PAGE)
    counts = {unit: lines(unit, ROOT, found) for _, units in found for unit in units}
    assert all(f">{unit}</text>" in drawn and f">{count}</text>" in drawn for unit, count in counts.items())
    assert sum(counts.values()) == sum(len(path.read_text().splitlines()) for path in ROOT.rglob("*.py"))
