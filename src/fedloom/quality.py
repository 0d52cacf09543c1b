"""How good a model is: the measures that problems have beside their loss, what they count, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.errors import UsageError, unknown
from fedloom.user_files import FUNCTION


@dataclass(frozen=True)
class Quality:
    """A measure that `Task.judge` gives under `name`; the first of a task's is the main one, which chooses rounds.

    `unit`: share (of 1, said in percent), index (a plain number), or amount (in the unit of the target). `pooled` is
    how the measures of several clients make one: their mean over samples, the root of the mean of their squares, by
    the "tallies" that stand beside them, or not at all ("alone").

    Examples:
        >>> from fedloom.quality import RMSE
        >>> RMSE.better, RMSE.best([71.5, 54.2, 60.0]), RMSE.pool([(1, 3.0), (1, 4.0)]) == 12.5**0.5
        ('low', 54.2, True)
    """

    name: str
    words: str
    unit: str = "share"
    better: str = "high"
    pooled: str = "mean"

    def score(self, value: float) -> float:
        """A number that is larger where the value is better; of no finite value, the least."""
        if not math.isfinite(value):
            return -math.inf
        return -value if self.better == "low" else value

    def best(self, values: Iterable[float]) -> float:
        """The best of some values."""
        return max(values, key=self.score)

    def worst(self, values: Iterable[float]) -> float:
        """The worst of some values."""
        return min(values, key=self.score)

    def pool(self, found: Sequence[tuple[float, float]]) -> float:
        """What values make together, of (samples, value) pairs."""
        power = 2 if self.pooled == "root" else 1
        mean = sum(value**power * n for n, value in found) / sum(n for n, _ in found)
        return float(mean ** (1 / power))


ACCURACY = Quality("accuracy", "accuracy")
RMSE = Quality("rmse", "RMSE", "amount", "low", "root")
MAE = Quality("mae", "MAE", "amount", "low")
R2 = Quality("r2", "R²", "index", "high", "alone")
MACRO_F1 = Quality("macro_f1", "macro F1", "share", "high")
AVERAGE_PRECISION = Quality("average_precision", "mean average precision", "share", "high", "alone")
EXACT_MATCH = Quality("exact_match", "exact match", "share", "high")
MEAN_IOU = Quality("mean_iou", "mean IoU", pooled="tallies")
DICE = Quality("dice", "mean Dice", pooled="tallies")
PIXEL_ACCURACY = Quality("pixel_accuracy", "pixel accuracy", pooled="tallies")
KL = Quality("kl", "KL divergence", "index", "low")
SHD = Quality("shd", "structural Hamming distance", "index", "low")
SKELETON_F1 = Quality("skeleton_f1", "F1 of edges", "share", "high")
DIRECTION_F1 = Quality("direction_f1", "F1 of directions", "share", "high")
SCORE = Quality("score", "score", "index", "high")
ERROR = Quality("error", "error", "index", "low")

# Those that a record may have; a task in Python whose measure is none of them calls it score or error.
OF_LABELS = (ACCURACY, RMSE, MAE, R2, MACRO_F1, AVERAGE_PRECISION, EXACT_MATCH, KL, MEAN_IOU, DICE, PIXEL_ACCURACY)
KNOWN = {one.name: one for one in (*OF_LABELS, SHD, SKELETON_F1, DIRECTION_F1, SCORE, ERROR)}
MEAN = Quality("", "")  # of a measure that nobody declares, only how those of clients make one
LOSS = Quality("loss", "loss", "index", "low")  # every problem has it

AVERAGES = ("macro", "weighted", "micro")  # over classes; the first is the default

TALLY = "#"  # begins the name of what is counted beside measures and recorded nowhere


def tallies(hits: Sequence[float], true: Sequence[float], said: Sequence[float]) -> dict[str, float]:
    """Of each class how often it is said rightly, is true, and is said, under names of what is counted."""
    counted = {"hits": hits, "true": true, "said": said}
    return {f"{TALLY}{word} {c}": float(n) for word, numbers in counted.items() for c, n in enumerate(numbers)}


def overlap(name: str, found: Mapping[str, float]) -> float:
    """What `tallies` make of MEAN_IOU, DICE or PIXEL_ACCURACY.

    The first two are means over the classes that are true or said anywhere: of hits / (true + said - hits), and of
    2 hits / (true + said). The last is all hits over all that is true. Where nothing counts it is 1, nothing being
    wrong.
    """
    words = ("hits", "true", "said")
    rows = zip(*([n for key, n in found.items() if key.startswith(f"{TALLY}{word} ")] for word in words), strict=True)
    there = [(hits, true, said) for hits, true, said in rows if true + said]
    if name == PIXEL_ACCURACY.name:
        every = sum(true for _, true, _ in there)
        return sum(hits for hits, _, _ in there) / every if every else 1.0
    dice = name == DICE.name
    each = [2 * hits / (true + said) if dice else hits / (true + said - hits) for hits, true, said in there]
    return sum(each) / len(each) if each else 1.0


@dataclass(frozen=True)
class Family:
    """Measures that a run may ask for by one word: an option behind a colon is an average, or a whole number."""

    words: str
    unit: str = "share"
    better: str = "high"
    option: str | int | None = None  # its default; None: there is none

    def quality(self, name: str, option: str) -> Quality | None:
        """The measure with an option (none: the default); None for an option that it does not have."""
        if isinstance(self.option, int):
            right, value = not option or (option.isdecimal() and int(option) > 0), option or str(self.option)
        else:
            right, value = not option or (self.option is not None and option in AVERAGES), option or self.option or ""
        called, words = (f"{name}_{option}", f"{self.words}, {option}") if option else (name, self.words)
        words = self.words.format(value) if "{}" in self.words else words
        return Quality(called, words, self.unit, self.better) if right else None


FAMILIES = {
    "f1": Family("{} F1", option=AVERAGES[0]),
    "precision": Family("{} precision", option=AVERAGES[0]),
    "recall": Family("{} recall", option=AVERAGES[0]),
    "auc": Family("AUC", "index", option=AVERAGES[0]),
    "balanced_accuracy": Family("balanced accuracy"),
    "top_k": Family("top-{} accuracy", option=5),
    "log_loss": Family("log loss", "index", "low"),
    "ece": Family("expected calibration error", "share", "low", 15),
}
PLAIN = {one.name: one for one in (ACCURACY, RMSE, MAE, R2)}  # that may be asked for too, where a problem lacks them


def asked(text: str) -> Quality:
    """The measure that a run asks for by a text: `auc`, `f1:weighted`, `top_k:3`, `FILE.py:function`, `...:low`.

    A function of one's own is called by its name; `:low` behind it says that less is better. Raises UsageError.
    """
    if own := FUNCTION.fullmatch(text):
        name = own["name"]
        if name in {*KNOWN, *FAMILIES, "loss", "n"} or of_family(name):
            raise UsageError(f"measures: {text} calls a function {name}, as a measure of the library is; rename it")
        return Quality(name, name, "index", own["better"] or "high")
    name, _, option = text.partition(":")
    if not option and name in KNOWN:
        return KNOWN[name]
    if name not in FAMILIES:
        known = [*FAMILIES, *PLAIN]
        raise UsageError(f"{unknown('measure', text, known)}; one of your own is FILE.py:function")
    found = FAMILIES[name].quality(name, option)
    if found is None:
        default = FAMILIES[name].option
        takes = "no option" if default is None else f"one of {', '.join(AVERAGES)}"
        takes = f"a whole number from 1, as in {name}:{default}" if isinstance(default, int) else takes
        raise UsageError(f"measures: {text} has the option {option!r}; {name} takes {takes}")
    return found


def family_of(text: str) -> Family | None:
    """The family of measures that a text is of, by its word; None for what a problem brings, or a user."""
    return FAMILIES.get(text.partition(":")[0])


def of_family(name: str) -> Quality | None:
    """The measure of a family that columns of a record call by this name, as in `f1_weighted`."""
    for word, family in FAMILIES.items():
        if name == word or name.startswith(f"{word}_"):
            return family.quality(word, name[len(word) + 1 :])
    return None


def named(name: str, row: Mapping[str, Any] | None = None) -> Quality:
    """The measure that columns of a record call so; one of a user's own is better when high unless the row says so."""
    known = LOSS if name == LOSS.name else KNOWN.get(name) or of_family(name)
    lower = str((row or {}).get("lower_is_better", "")).split(",")
    return known or Quality(name, name, "index", "low" if name in lower else "high")


PLACES = ("personal_test_", "global_test_", "newcomer_test_", "worst_client_", "validation_")


def in_column(column: str) -> str:
    """The name of the measure that a column of a record is of; that of a column of another kind is itself."""
    return next((column.removeprefix(where) for where in PLACES if column.startswith(where)), column)


def judged_by(rows: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Iterator[Quality]:
    """The measures that the validation data of a record were judged by, the main one of its problem first."""
    for row in [rows] if isinstance(rows, Mapping) else rows:
        for column in row:
            if column.startswith("validation_") and "@" not in column:
                yield named(column.removeprefix("validation_"), row)


def main_of(rows: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Quality:
    """The main measure of the problem of a record."""
    return next(judged_by(rows), ACCURACY)


def chooser_of(rows: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Quality:
    """The measure by which validation chooses a round of a record: the main one, unless the run asked for another."""
    rows = [rows] if isinstance(rows, Mapping) else rows
    return next((named(row["chosen_by"], row) for row in rows if "chosen_by" in row), main_of(rows))


def evaluated(row: Mapping[str, Any]) -> bool:
    """Whether a row of a record is of a round that was evaluated."""
    return any(name.startswith("global_test_") for name in row)


def known(name: str, qualities: Sequence[Quality]) -> Sequence[Quality]:
    """A task's qualities; raises UsageError unless each is one that a record may have."""
    if not qualities:
        raise UsageError(f"{name}.qualities is empty; it needs the measure that chooses rounds, as in (ACCURACY,)")
    for one in qualities:
        if KNOWN.get(one.name) != one:
            raise unknown(f"measure of {name}", one.name, KNOWN)
    return qualities


class AsJudged:
    """The measures of a problem that declares none: accuracy, or what else its `judge` gives of a fresh network."""

    def __get__(self, task: Any, owner: type) -> tuple[Quality, ...]:
        if task is None or owner.__module__.startswith("fedloom."):
            return (ACCURACY,)
        found: tuple[Quality, ...] = _judged(task)
        task.__dict__["qualities"] = found  # looked for once
        return found


def _judged(task: Any) -> tuple[Quality, ...]:
    import torch

    from fedloom.random import seeded

    try:
        splits = (task.data(client, split) for client in range(task.population) for split in ("test", "train"))
        data = next(one for one in splits if len(one))
        with torch.no_grad(), seeded(0, "model", "judged"):
            names = task.judge(task.network().eval(), data)
    except Exception:  # noqa: BLE001  what is wrong with it is told where the run meets it
        return (ACCURACY,)
    if "accuracy" in names or any("@" in name for name in names):  # of which no name may be, as is told there
        return (ACCURACY,)
    if found := tuple(KNOWN[name] for name in names if name in KNOWN):
        return found
    raise UsageError(
        f"{type(task).__name__}.judge gives {', '.join(names) or 'nothing'}, and no measure by which rounds are chosen "
        f"and methods compared: give one beside the loss, called one of {', '.join(sorted(KNOWN))} (score: higher is "
        "better; error: lower is better)"
    )
