"""Losses that a run asks for in place of its problem's own (`loss=focal:2`): of outputs and targets, one a sample."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from fedloom.data.masks import IGNORED
from fedloom.errors import UsageError, unknown
from fedloom.parsing import Term
from fedloom.user_files import FUNCTION, function_at

# Outputs [B, ...] and targets [B, ...] to losses [B]; those of pixels may be [B, H, W].
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
SMALL = 1e-12  # so that a power below one has a slope where nothing is wrong any more


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Of scores [B, C] and classes [B]."""
    return F.cross_entropy(outputs, y, reduction="none")


def focal(outputs: Tensor, y: Tensor, gamma: float) -> Tensor:
    """Cross-entropy times (1 - p)^gamma, p the probability of the class (Lin et al., arXiv 1708.02002)."""
    log = outputs.log_softmax(1).gather(1, y[:, None]).squeeze(1)
    return -((-log.expm1()).clamp(min=SMALL) ** gamma) * log


def label_smoothing(outputs: Tensor, y: Tensor, share: float) -> Tensor:
    """Cross-entropy with a `share` of each target spread over all classes (Szegedy et al., arXiv 1512.00567)."""
    return F.cross_entropy(outputs, y, reduction="none", label_smoothing=share)


def binary(outputs: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy of scores [B, L] and labels [B, L], the mean over labels."""
    return F.binary_cross_entropy_with_logits(outputs, y, reduction="none").mean(1)


def focal_labels(outputs: Tensor, y: Tensor, gamma: float) -> Tensor:
    """The same times (1 - p)^gamma, p the probability of what is true of a label."""
    log = F.logsigmoid(torch.where(y > 0.5, outputs, -outputs))
    return (-((-log.expm1()).clamp(min=SMALL) ** gamma) * log).mean(1)


def squared(outputs: Tensor, y: Tensor) -> Tensor:
    """Squared errors of outputs [B, 1] and amounts [B]."""
    return (outputs.squeeze(1) - y).square()


def absolute(outputs: Tensor, y: Tensor) -> Tensor:
    """Absolute errors."""
    return (outputs.squeeze(1) - y).abs()


def huber(outputs: Tensor, y: Tensor, delta: float) -> Tensor:
    """Half the squared error up to `delta`, beyond it linear (Huber, 1964)."""
    return F.huber_loss(outputs.squeeze(1), y, reduction="none", delta=delta)


def pixel_cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Of each pixel [B, H, W], of scores [B, C, H, W] and classes [B, H, W]; anything where these are `IGNORED`."""
    return -_own(outputs.log_softmax(1), y)


def focal_pixels(outputs: Tensor, y: Tensor, gamma: float) -> Tensor:
    """The focal loss of each pixel."""
    loss = pixel_cross_entropy(outputs, y)
    return (-(-loss).expm1()).clamp(min=SMALL) ** gamma * loss


def smoothed_pixels(outputs: Tensor, y: Tensor, share: float) -> Tensor:
    """Cross-entropy of each pixel with a `share` of its target spread over all classes."""
    log = outputs.log_softmax(1)
    return -((1 - share) * _own(log, y) + share * log.mean(1))


def soft_dice(outputs: Tensor, y: Tensor) -> Tensor:
    """1 minus the soft Dice of the classes that a mask has, their mean, of each image [B]; 0 where it has none.

    Milletari et al. 2016, V-Net [arXiv 1606.04797], with sums in place of those of squares.
    """
    there = y[:, None] == torch.arange(outputs.shape[1], device=y.device)[:, None, None]
    p = outputs.softmax(1) * (y != IGNORED)[:, None]
    hits, every = ((p * there).flatten(2).sum(2), (p + there).flatten(2).sum(2))
    has = there.flatten(2).any(2)
    return ((1 - 2 * hits / every.clamp(min=SMALL)) * has).sum(1) / has.sum(1).clamp(min=1)


def of_images(values: Tensor, y: Tensor) -> Tensor:
    """The mean of values [B, H, W] over the pixels of each image [B] that have a class; 0 where none has."""
    counts = y != IGNORED
    return torch.where(counts, values, 0.0).flatten(1).sum(1) / counts.flatten(1).sum(1).clamp(min=1)


def _own(log: Tensor, y: Tensor) -> Tensor:
    """What [B, C, H, W] has for the class of each pixel; something for those that have none."""
    return log.gather(1, torch.where(y != IGNORED, y, 0)[:, None]).squeeze(1)


# By what outputs are an answer to (`Task.answer`): the losses by name, and of those with a number what it is, and where
# it must lie. The first is that which a problem has anyhow.
NAMED: dict[str, dict[str, tuple[Callable[..., Tensor], tuple[float, float, float] | None]]] = {
    "class": {
        "cross_entropy": (cross_entropy, None),
        "focal": (focal, (2.0, 0.0, 100.0)),
        "label_smoothing": (label_smoothing, (0.1, 0.0, 1.0)),
    },
    "labels": {"binary": (binary, None), "focal": (focal_labels, (2.0, 0.0, 100.0))},
    "mask": {
        "cross_entropy": (pixel_cross_entropy, None),
        "focal": (focal_pixels, (2.0, 0.0, 100.0)),
        "label_smoothing": (smoothed_pixels, (0.1, 0.0, 1.0)),
        "dice": (soft_dice, None),
    },
    "amount": {"squared": (squared, None), "absolute": (absolute, None), "huber": (huber, (1.0, 1e-6, 1e6))},
}


def loss_of(text: str, answer: str) -> Loss:
    """The loss of this name for a kind of answer, or a function of one's own (`FILE.py:function`).

    Raises UsageError for one that there is not, and for a number that it cannot take.
    """
    if FUNCTION.fullmatch(text):
        return function_at(text)
    term, known = Term(text), NAMED[answer]
    if term.name not in known:
        raise UsageError(f"{unknown('loss', term.name, known)}; one of your own is FILE.py:function")
    found, number = known[term.name]
    if term.options or len(term.values) > (number is not None):
        raise UsageError(f"loss={text}: expected {term.name}{':NUMBER' if number else ' alone'}")
    if number is None:
        return found
    default, low, high = number
    value = term.values[0] if term.values else default
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"loss={text}: {value!r} is no number from {low:g} to {high:g}")
    return partial(found, **{found.__code__.co_varnames[2]: float(value)})
