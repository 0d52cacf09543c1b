"""What was tried with which fields, and what came of it: lines through all fields, and which fields matter."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fedloom.quality import Quality
from fedloom.report.curves import SIZE
from fedloom.report.picture import Picture
from fedloom.report.style import COLOURS, quiet
from fedloom.report.words import counted, told

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST = 4  # trials that came to something, below which nothing is said of fields
PALE = 0.15  # opacity of the worst trial; the best has 1
HOW = (
    "Importance: |Spearman's rank correlation| of a field's values with the validation measure over the trials; of a "
    "field with choices the square root of the correlation ratio of the ranks. 0: alone it tells nothing, 1: it tells "
    "the order. Fields that a search moved together share what they tell, and what turns round in the middle is not "
    "seen."
)


@dataclass(frozen=True)
class Tried:
    """Trials that came to something: `fields` of each, `scores` [n] by the measure `by`.

    `moving` are the fields that differ among them, `logs` those of them that are on a log scale; `failed` is how many
    others there were.
    """

    title: str
    fields: Sequence[Mapping[str, Any]]
    scores: Sequence[float]
    by: Quality
    moving: Sequence[str]
    logs: frozenset[str]
    failed: int

    @staticmethod
    def of(
        title: str,
        fields: Sequence[Mapping[str, Any]],
        scores: Sequence[float | None],
        by: Quality,
        logs: Collection[str] = (),
    ) -> Tried:
        """Trials by their fields and scores; of those that have none it is kept how many they are."""
        good = [
            (one, score)
            for one, score in zip(fields, scores, strict=True)
            if score is not None and math.isfinite(score)
        ]
        names = dict.fromkeys(name for one, _ in good for name in one)
        moving = [name for name in names if len({repr(one.get(name)) for one, _ in good}) > 1]
        positive = {n for n in logs if all(_is_number(one.get(n)) and one[n] > 0 for one, _ in good)}
        return Tried(
            title,
            [one for one, _ in good],
            [score for _, score in good],
            by,
            moving,
            frozenset(positive & set(moving)),
            len(fields) - len(good),
        )

    def values(self, name: str) -> list[Any]:
        """A field's value in each trial."""
        return [one.get(name) for one in self.fields]

    def is_numeric(self, name: str) -> bool:
        """Whether a field is a number in all trials."""
        return all(map(_is_number, self.values(name)))

    @property
    def best(self) -> int:
        """The place of the best trial, the first of equals."""
        return max(range(len(self.scores)), key=lambda k: self.by.score(self.scores[k]))

    def importance(self) -> dict[str, float]:
        """How much each field alone tells of the order of the trials, by `HOW`: the most telling first."""
        from scipy.stats import rankdata

        ranks = rankdata([self.by.score(score) for score in self.scores])
        found = {name: self._told_by(name, ranks) for name in self.moving}
        return dict(sorted(found.items(), key=lambda one: -one[1]))

    def _told_by(self, name: str, ranks: np.ndarray) -> float:
        from scipy.stats import rankdata

        total = float(((ranks - ranks.mean()) ** 2).sum())
        if not total:
            return 0.0
        if self.is_numeric(name):
            values = rankdata(self.values(name))
            return float(abs(np.corrcoef(values, ranks)[0, 1]))
        groups: dict[str, list[float]] = {}
        for value, rank in zip(self.values(name), ranks.tolist(), strict=True):
            groups.setdefault(repr(value), []).append(rank)
        between = sum(len(own) * (sum(own) / len(own) - ranks.mean()) ** 2 for own in groups.values())
        return float(math.sqrt(between / total))

    def pictures(self) -> dict[str, Picture]:
        """What there is to see of them; nothing of few trials, or of those that do not differ."""
        if len(self.scores) < LEAST or not self.moving or len(set(self.scores)) < 2:
            return {}
        best = ", ".join(f"{name}={_short(self.fields[self.best].get(name))}" for name in self.moving)
        more = f"; {counted(self.failed, 'trial')} failed" if self.failed else ""
        score = told(self.scores[self.best], self.by.unit)
        said = f"{counted(len(self.scores), 'trial')}, the best {score} with {best}"
        each = "; ".join(f"{name} {share:.2f}" for name, share in self.importance().items())
        found = {}
        if len(self.moving) > 1:
            found["parallel"] = Picture(
                f"{self.title}: every trial through its fields", f"{said}{more}.", partial(parallel_figure, self)
            )
            found["importance"] = Picture(
                f"{self.title}: which fields tell the order", f"{each}. {HOW}", partial(importance_figure, self)
            )
        if len(self.moving) == 2 and all(map(self.is_numeric, self.moving)):
            found["two"] = Picture(
                f"{self.title}: validation {self.by.words} over {' and '.join(self.moving)}", f"{said}{more}.",
                partial(two_figure, self),
            )  # fmt: skip
        return found


def parallel_figure(tried: Tried) -> Figure:
    """A line a trial through its value of each field and its score, deeper where better; the best is marked."""
    from matplotlib.figure import Figure

    columns = [*tried.moving, None]  # the last is the score
    figure = Figure(figsize=(max(SIZE[0] * 1.25, 1.3 * len(columns)), SIZE[1] * 1.15), layout="constrained")
    axes = figure.subplots()
    places = [_placed(tried, name, axes, x) for x, name in enumerate(columns)]
    for k, depth in enumerate(_depths(tried)):
        axes.plot(range(len(columns)), [column[k] for column in places], color=COLOURS["global"], lw=1.4, alpha=depth)
    heights = [column[tried.best] for column in places]
    axes.plot(range(len(columns)), heights, color=COLOURS["personal"], lw=2.2, marker="o", ms=4, label="the best")
    for x in range(len(columns)):
        axes.axvline(x, color=COLOURS["soft"], lw=0.8, zorder=0)
    quiet(axes)
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.set_ylim(-0.08, 1.08)
    axes.set_xlim(-0.35, len(columns) - 0.65)
    names = [f"{name}{', log' if name in tried.logs else ''}" for name in tried.moving]
    axes.set_xticks(range(len(columns)), [*names, f"validation {tried.by.words}"], parse_math=False)
    return figure


def importance_figure(tried: Tried) -> Figure:
    """A bar a field: how much it alone tells of the order of the trials."""
    from matplotlib.figure import Figure

    shares = tried.importance()
    figure = Figure(figsize=(SIZE[0] * 1.25, 0.9 + 0.36 * len(shares)), layout="constrained")
    axes = figure.subplots()
    places = range(len(shares))
    axes.barh(places, list(shares.values()), 0.6, color=COLOURS["global"], linewidth=0)
    for place, share in zip(places, shares.values(), strict=True):
        axes.text(share + 0.015, place, f"{share:.2f}", va="center", fontsize=9, color=COLOURS["ink"])
    quiet(axes)
    axes.grid(visible=False, axis="y")
    axes.set_yticks(places, list(shares), parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("rank correlation with the validation measure, without its sign")
    return figure


def two_figure(tried: Tried) -> Figure:
    """A dot a trial at its two fields, deeper where better; the best is ringed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0] * 1.25, SIZE[1] * 1.15), layout="constrained")
    axes = figure.subplots()
    x, y = (tried.values(name) for name in tried.moving)
    for at, depth in zip(zip(x, y, strict=True), _depths(tried), strict=True):
        axes.scatter(*at, 60, color=COLOURS["global"], alpha=depth, linewidth=0)
    axes.scatter(x[tried.best], y[tried.best], 130, facecolor="none", edgecolor=COLOURS["personal"], linewidth=2)
    for name, set_scale in zip(tried.moving, (axes.set_xscale, axes.set_yscale), strict=True):
        if name in tried.logs:
            set_scale("log")
    quiet(axes)
    axes.set_xlabel(tried.moving[0])
    axes.set_ylabel(tried.moving[1])
    return figure


def _placed(tried: Tried, name: str | None, axes: Axes, x: int) -> list[float]:
    """The height, from 0 to 1, of each trial at an axis; its ends are written beside it. Better scores are higher."""
    values = list(tried.scores) if name is None else tried.values(name)
    if name is not None and not tried.is_numeric(name):
        kinds = sorted({repr(value) for value in values})
        for k, kind in enumerate(kinds):
            _beside(axes, x, k / max(1, len(kinds) - 1), kind.strip("'"))
        return [kinds.index(repr(value)) / max(1, len(kinds) - 1) for value in values]
    low, high = min(values), max(values)
    if name is None and tried.by.better == "low":
        low, high = high, low
    for end, value in ((0.0, low), (1.0, high)):
        _beside(axes, x, end, told(value, tried.by.unit) if name is None else _short(value))
    scaled = math.log if name in tried.logs else float
    span = scaled(high) - scaled(low)
    return [(scaled(value) - scaled(low)) / span for value in values]


def _beside(axes: Axes, x: int, y: float, text: str) -> None:
    axes.text(x + 0.04, y, text, va="center", fontsize=8, color=COLOURS["soft"], parse_math=False)


def _depths(tried: Tried) -> list[float]:
    """How deep each trial is drawn, from the worst to the best by rank: as opacity, which suits a dark page too."""
    from scipy.stats import rankdata

    ranks = rankdata([tried.by.score(score) for score in tried.scores])
    return [float(PALE + (1 - PALE) * (rank - ranks.min()) / (ranks.max() - ranks.min())) for rank in ranks]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
