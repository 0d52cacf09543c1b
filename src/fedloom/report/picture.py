"""One picture: a figure with its title and its words, as a page, a notebook and a file have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.errors import UsageError, unknown
from fedloom.letters import printable
from fedloom.report.style import save, svg

if TYPE_CHECKING:
    from markupsafe import Markup

FORMATS = ("svg", "pdf", "png")
SHARP = 200  # dots an inch of a .png
# What would make two files of one picture differ.
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows, in words; `draw` makes its figure (of matplotlib) when it is first looked at.

    In a notebook it shows itself; `save` writes it to a file.
    """

    title: str
    alt: str
    draw: Callable[[], Any]
    themed: bool = True  # whether its colours follow a page's

    @cached_property
    def figure(self) -> Any:
        """The figure, of matplotlib."""
        return self.draw()

    @property
    def drawing(self) -> Markup:
        """The figure as it stands in a page."""
        from markupsafe import Markup

        return Markup(svg(self.figure, self.title, self.themed))  # matplotlib has escaped its text

    def save(self, path: str | Path) -> Path:
        """Writes the picture to a .svg, .pdf or .png file, and gives its path; the same picture has the same bytes."""
        path = Path(path)
        form = form_of(path)
        try:
            if form == "svg":
                path.write_text(self._repr_svg_(), encoding="utf-8")
            else:
                save(self.figure, path, format=form, dpi=SHARP, facecolor="white", metadata=UNDATED[form])
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; choose another file (--out)") from error
        return path

    def _repr_svg_(self) -> str:
        """The picture by itself: on white, in its own size, with its words for who does not see it."""
        wide, high = (72 * inches for inches in self.figure.get_size_inches())
        drawing = svg(self.figure, self.title, themed=False)
        head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img"'
        head += f' aria-label="{escape(printable(self.alt))}" width="{wide:g}" height="{high:g}"'
        return drawing.replace("<svg", head, 1).replace(">", '><rect width="100%" height="100%" fill="#fff"/>', 1)

    def __repr__(self) -> str:
        return f"Picture({self.title!r})"


def form_of(path: Path) -> str:
    """The form of a file of a picture, by its name; raises UsageError for one that pictures do not have."""
    form = path.suffix.removeprefix(".").lower()
    if form not in FORMATS:
        raise UsageError(f"cannot make a picture {path}; take a file that ends in .svg, .pdf or .png")
    return form


def save_all(pictures: Mapping[str, Picture], folder: str | Path, form: str) -> list[Path]:
    """Writes each picture to `folder/NAME.form`, and gives the paths; files that are there are replaced."""
    if form not in FORMATS:
        raise unknown("format of pictures", form, FORMATS)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}; choose another place") from error
    return [one.save(folder / f"{name}.{form}") for name, one in pictures.items()]
