"""The measures that a run asks for (`measures=auc,f1`): each from what is predicted for data, by scikit-learn.

Of every sample little is kept (the class that is said, its rank, its probability), so that memory grows with the
samples alone. The areas under curves, and functions of one's own, need all probabilities at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.data.masks import IGNORED
from fedloom.errors import UsageError
from fedloom.quality import FAMILIES, LOSS, PLAIN, Quality, asked
from fedloom.task import Data, Task
from fedloom.user_files import FUNCTION, function_at

AT_ONCE = 1000  # samples in one forward pass
PIXELS_AT_ONCE = 2**18  # of images that are judged pixel by pixel
MOST_BYTES = 2**30  # of probabilities that are kept at once

Kept = Mapping[str, np.ndarray]  # what is kept of the samples, by name, each [n, ...]


@dataclass(frozen=True)
class Measure:
    """A measure that a run asks for: what it keeps of the samples, and what it makes of that.

    `of` gives None where the samples do not tell: an area under a curve needs two classes.
    """

    quality: Quality
    keeps: tuple[str, ...]
    of: Callable[[Kept], float | None]


def kept_of_class(p: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What can be kept of probabilities [B, C] and classes [B]."""
    own = p.gather(1, y[:, None])
    before = torch.arange(p.shape[1], device=p.device) < y[:, None]
    return {
        "said": lambda: p.argmax(1),
        "rank": lambda: (p > own).sum(1) + ((p == own) & before).sum(1),  # 0: the class itself is said
        "sure": lambda: p.amax(1),
        "own": lambda: own.squeeze(1),
        "answers": lambda: p,
    }


def kept_of_labels(p: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What can be kept of the probabilities [B, L] of labels; one is said to be there above a half."""
    return {"said": lambda: (p > 0.5).long(), "answers": lambda: p}


def kept_of_amount(amounts: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What can be kept of amounts [B]."""
    return {"said": lambda: amounts, "answers": lambda: amounts}


def kept_of_masks(p: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What can be kept of probabilities [B, C, H, W] and masks [B, H, W]; of pixels, which are many, how many pairs.

    These are [1, C, C], of what is true and what is said; pixels without a class count nowhere.
    """
    counts, classes = y != IGNORED, p.shape[1]

    def pairs() -> Tensor:
        both = (y.long() * classes + p.argmax(1))[counts]
        return torch.bincount(both, minlength=classes * classes).view(1, classes, classes)

    return {"pairs": pairs, "answers": lambda: p}


KINDS = {"class": kept_of_class, "labels": kept_of_labels, "amount": kept_of_amount, "mask": kept_of_masks}
AMONG = {  # the measures of each kind of answer
    "class": ("accuracy", *FAMILIES),
    "labels": ("f1", "precision", "recall", "auc"),
    "amount": ("rmse", "mae", "r2"),
    "mask": ("f1", "precision", "recall", "balanced_accuracy"),
}


def measure(text: str, task: Task) -> Measure:
    """The measure that a text asks for, on a task. Raises UsageError where it does not fit the task's answers."""
    quality, answer = asked(text), task.answer
    if not answer:
        raise UsageError(
            f"measures={text}: a {type(task).__name__} is judged by measures of its own; leave it out, or say what its "
            "outputs mean: Task.answer and Task.answers"
        )
    if FUNCTION.fullmatch(text):
        return Measure(quality, ("answers",), partial(_own, text, function_at(text)))
    name, _, option = text.partition(":")
    if name not in AMONG[answer]:
        why = ", whose pixels are counted and their probabilities not kept" if answer == "mask" else ""
        raise UsageError(
            f"measures={text} is no measure of a problem whose target is {_said(answer)}{why}; "
            f"it has {', '.join(AMONG[answer])}, and FILE.py:function"
        )
    if name in PLAIN:
        return Measure(quality, ("said",), partial(_plain, name))
    if name == "auc":
        return Measure(quality, ("answers",), partial(_auc, option or "macro"))
    if name == "top_k":
        k = int(option or 5)
        if k >= task.classes:
            raise UsageError(
                f"measures={text}: of {task.classes} classes the first {k} are always right; take top_k:1 to "
                f"top_k:{task.classes - 1}"
            )
        return Measure(quality, ("rank",), partial(_top_k, k))
    if name == "log_loss":
        return Measure(quality, ("own",), _log_loss)
    if name == "ece":
        return Measure(quality, ("sure", "said"), partial(_calibration_error, int(option or 15)))
    return Measure(quality, ("pairs" if answer == "mask" else "said",), partial(_by_counts, name, option or "macro"))


def beside(texts: Sequence[str], task: Task) -> tuple[Measure, ...]:
    """The measures that texts ask for, but for those that the task gives itself; raises UsageError for one twice."""
    found: dict[str, Measure] = {}
    for text in texts:
        name = asked(text).name
        if name in found or (name in {one.name for one in task.qualities} and texts.count(text) > 1):
            raise UsageError(f"measures has {name} twice; keep one")
        if asked(text) not in task.qualities:
            found[name] = measure(text, task)
    if any("answers" in one.keeps for one in found.values()):
        test = task.global_test()
        classes = task.classes or len(task.outputs().get("classes", ()))
        samples = len(test) * (test.labels[:1].numel() if task.answer == "mask" else 1)
        if 8 * samples * max(1, classes) > MOST_BYTES:
            what = "pixels" if task.answer == "mask" else "samples"
            raise UsageError(
                f"areas under curves, and measures of your own, need the probabilities of all {samples} {what} of the "
                f"global test in {classes} classes at once, more than {MOST_BYTES >> 20} MiB; leave "
                f"{', '.join(name for name, one in found.items() if 'answers' in one.keeps)} out"
            )
    return tuple(found.values())


def chosen_by(text: str, task: Task, asked_for: Sequence[Quality]) -> Quality:
    """The measure by which validation chooses, of those of a task, its loss and those that are asked for."""
    having = {one.name: one for one in (*task.qualities, LOSS, *asked_for)}
    name = text if text in having else text.replace(":", "_")
    if name not in having:
        raise UsageError(
            f"choose_by={text}: this run is judged by {', '.join(having)}; take one of them, or ask for it by measures="
        )
    if having[name].pooled == "alone":
        raise UsageError(
            f"choose_by={text}: what clients validate by it makes no value of all together; take "
            f"{', '.join(one for one in having if having[one].pooled != 'alone')}"
        )
    return having[name]


def measured(measures: Iterable[Measure], task: Task, scores: Callable[[Tensor], Tensor], data: Data) -> dict[str, Any]:
    """The measures of a function from inputs to outputs on data, by name, without those that these data do not tell."""
    measures = list(measures)
    if not measures or not len(data):
        return {}
    kept = collected(dict.fromkeys(name for one in measures for name in one.keeps), task, scores, data)
    if not all(np.isfinite(one).all() for one in kept.values()):
        return {one.quality.name: math.nan for one in measures}  # it diverged, which is not to be left out
    found = {one.quality.name: one.of(kept) for one in measures}
    return {name: value for name, value in found.items() if value is not None}


def collected(names: Iterable[str], task: Task, scores: Callable[[Tensor], Tensor], data: Data) -> Kept:
    """What is kept of the samples under these names, and what is true of them under `truth`, in their order."""
    names, parts = list(names), []
    at_once = max(1, PIXELS_AT_ONCE // data.labels[0].numel()) if task.answer == "mask" else AT_ONCE
    for batch in data.pieces(at_once):
        answers, truth = task.answers(scores(batch.x), batch.y)
        having = KINDS[task.answer](answers, truth) | {"truth": lambda truth=truth: truth}
        parts.append([having[name]().cpu().numpy() for name in ("truth", *names)])
    return dict(zip(("truth", *names), map(np.concatenate, zip(*parts, strict=True)), strict=True))


def _said(answer: str) -> str:
    return {"class": "one class", "labels": "several labels", "amount": "an amount", "mask": "a mask"}[answer]


def _plain(name: str, kept: Kept) -> float | None:
    from sklearn import metrics

    if name == "r2" and np.ptp(kept["truth"]) == 0:
        return None
    by_name = {"rmse": "root_mean_squared_error", "mae": "mean_absolute_error", "r2": "r2_score"}
    return float(getattr(metrics, by_name.get(name, "accuracy_score"))(kept["truth"], kept["said"]))


def _by_counts(name: str, average: str, kept: Kept) -> float | None:
    """F1, precision, recall and balanced accuracy: of the classes that are there or said; nothing said is 0.

    None of masks without a pixel that counts.
    """
    from sklearn import metrics

    both: tuple[np.ndarray, ...]
    weights = None
    if "said" in kept:
        both = kept["truth"], kept["said"]
    else:
        counts = kept["pairs"].sum(0)
        both, weights = np.nonzero(counts), counts[counts > 0]
        if not weights.size:
            return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a client lacks classes that are said, which is no news
        if name == "balanced_accuracy":
            return float(metrics.balanced_accuracy_score(*both, sample_weight=weights))
        of: Any = getattr(metrics, f"{name}_score")
        return float(of(*both, average=average, zero_division=0, sample_weight=weights))


def _auc(average: str, kept: Kept) -> float | None:
    """The area under the receiver's curve, one class against the rest, over the classes that these samples tell.

    Those that all of them are of, or none, tell nothing; where none is left there is no area.
    """
    from sklearn.metrics import roc_auc_score

    truth, p = kept["truth"], kept["answers"]
    there = truth if truth.ndim == 2 else truth[:, None] == np.arange(p.shape[1])
    count = there.sum(0)
    telling = (count > 0) & (count < len(there))
    if not telling.any():
        return None
    there, p = there[:, telling], p[:, telling]
    if average == "micro":
        return float(roc_auc_score(there.ravel(), p.ravel()))
    areas = [roc_auc_score(one, its) for one, its in zip(there.T, p.T, strict=True)]
    return float(np.average(areas, weights=count[telling] if average == "weighted" else None))


def _top_k(k: int, kept: Kept) -> float:
    return float((kept["rank"] < k).mean())


def _log_loss(kept: Kept) -> float:
    """Minus the mean logarithm of the probability of what is true; none counts as less than rounding lets it be."""
    return float(-np.log(np.maximum(kept["own"], np.finfo(np.float64).eps)).mean())


def _calibration_error(bins: int, kept: Kept) -> float:
    """How far confidence is from being right: in bins of confidence of equal width, the mean over samples.

    Guo et al. 2017, On Calibration of Modern Neural Networks [arXiv 1706.04599], equation 3.
    """
    sure, right = kept["sure"], kept["said"] == kept["truth"]
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)  # a bin holds its upper edge
    gaps = np.bincount(place, right.astype(float) - sure, minlength=bins)
    return float(np.abs(gaps).sum() / len(sure))


def _own(text: str, function: Callable[..., Any], kept: Kept) -> float | None:
    """What a function of one's own makes of what is true and of the answers; None and NaN are no value."""
    value = function(kept["truth"].copy(), kept["answers"].copy())
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError):
        raise UsageError(
            f"the measure {text} returned {str(value)[:80]}; expected a number, or None where the samples tell nothing"
        ) from None
    return None if number is None or np.isnan(number) else number
