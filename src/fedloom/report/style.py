"""The look of the report's pictures: one set of colours, as PNG for print and as SVG that follows the page's theme."""

from __future__ import annotations

import io
import re
import warnings
from typing import IO, TYPE_CHECKING, Any

from fedloom.letters import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Curves mostly in Okabe and Ito's colours, which differ for every kind of eye. In a themed SVG each colour becomes the
# page's `var(--NAME)`.
COLOURS = {
    "global": "#0072b2",
    "personal": "#d55e00",
    "worst": "#a8518a",
    "train": "#009e73",
    "ink": "#23272e",
    "soft": "#676d76",
    "faint": "#dedfdc",
}
# One colour a method, kept over all pictures: on a light page, on a dark one. Beyond them they come again, dashed.
SERIES = {
    "m0": ("#0b6fb0", "#5fb3ec"),
    "m1": ("#d4600a", "#f59c58"),
    "m2": ("#0a9a70", "#4ec9a0"),
    "m3": ("#a44f88", "#d891c2"),
    "m4": ("#b8860b", "#e0b84a"),
    "m5": ("#5b5fc7", "#a3a6f5"),
    "m6": ("#7a5c45", "#c39d80"),
    "m7": ("#c23b4e", "#ee8593"),
}


def quiet(axes: Axes) -> None:
    """Leaves of the frame only a line below and a faint grid behind."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["faint"])
    axes.grid(axis="y", color=COLOURS["faint"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=COLOURS["soft"], labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=COLOURS["soft"], fontsize=9)


def legend(axes: Axes, handles: Sequence[Artist] | None = None, ncols: int = 2) -> None:
    """Names what is drawn (or `handles`), above the axes, where it covers nothing."""
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1),
        ncols=ncols,
        frameon=False,
        fontsize=9,
        handlelength=1.6,
        labelcolor=COLOURS["ink"],
        borderaxespad=0.2,
        columnspacing=1.2,
    )


def save(figure: Figure, file: IO[Any] | Path, **settings: Any) -> None:
    """`figure.savefig`, silent about letters that its font lacks: names of data come in every script."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(file, **settings)


def svg(figure: Figure, name: str, themed: bool = True) -> str:
    """The figure as an `<svg>` element to stand in a page, its text as text and without a background.

    `name` keeps its ids apart from those of other figures; `themed=False` leaves the colours as they are.
    """
    from matplotlib import rc_context

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        save(figure, file, format="svg", dpi=200, transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<!DOCTYPE.*?>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)  # nothing refers to these
    text = re.sub(r'(?<=<svg) [^>]*(viewBox="[^"]*")[^>]*', r" \1", text, count=1)  # the page gives the width
    text = re.sub(r"\s*\n\s*", "\n", text)
    if themed:
        for variable, colour in (COLOURS | {name: light for name, (light, _) in SERIES.items()}).items():
            text = text.replace(colour, f"var(--{variable})")
    return printable(text)  # XML knows no control characters
