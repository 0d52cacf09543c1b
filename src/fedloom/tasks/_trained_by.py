"""A problem that is trained by another loss than its own; it is judged as before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from fedloom.data.masks import IGNORED
from fedloom.errors import UsageError
from fedloom.letters import with_article
from fedloom.losses import NAMED, Loss, loss_of, of_images
from fedloom.task import Batch, Task
from fedloom.tasks._over import Over
from fedloom.user_files import FUNCTION

BALANCED = "balanced"


@dataclass(frozen=True, eq=False)
class TrainedBy(Over):
    """A problem whose criterion is the mean over samples of a loss by name, times the weight of its class.

    Where targets are masks, the loss of a sample is the mean over its pixels, each times the weight of its class.

    `weights` [C] are those of classes; None: all 1.
    """

    by: str
    weights: Tensor | None = None

    loss, head_loss = Task.loss, Task.head_loss  # by this criterion

    @cached_property
    def of(self) -> Loss:
        """The loss of each sample."""
        return loss_of(self.by, self.answer)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        if self.answer == "mask":
            return self._of_masks(outputs, batch.y.long()).mean()
        values = self.of(outputs, batch.y)
        return (values if self.weights is None else values * self.weights[batch.y]).mean()

    def _of_masks(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The losses of images [B], in which each pixel has the weight of its class."""
        values = self.of(outputs, y)
        if self.weights is not None:
            values = values * self.weights[torch.where(y != IGNORED, y, 0)]
        return of_images(values, y) if values.dim() == y.dim() else values

    def to(self, device: torch.device) -> Self:
        return replace(super().to(device), weights=None if self.weights is None else self.weights.to(device))

    def describe(self) -> dict[str, Any]:
        told = super().describe()
        return told if self.weights is None else told | {"class_weights": self.weights.tolist()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "of"}  # found again by its name


def trained_by(task: Task, loss: str | None, class_weights: str | None) -> Task:
    """A problem with the loss and the weights of classes that a run asks for; itself where it asks for none.

    Raises UsageError for what does not fit the problem, or a loss that gives no losses for it.
    """
    if loss is None and class_weights is None:
        return task
    asked = f"loss={loss}" if loss else f"class_weights={class_weights}"
    if not task.answer:
        raise UsageError(f"{asked}: a {type(task).__name__} has a loss of its own; leave it out")
    bottom = task
    while isinstance(bottom, Over) and type(bottom).loss is Over.loss:
        bottom = bottom.inner
    several = "several" in task.offers
    if several or type(bottom).loss is not Task.loss or type(bottom).at is not Task.at or task.demands:
        raise UsageError(
            f"{asked}: {with_article(type(bottom).__name__)} trains by a loss of its own, which goes by more than "
            "outputs and targets; leave it out"
        )
    if class_weights is not None and task.answer not in ("class", "mask"):
        raise UsageError(f"class_weights={class_weights}: this problem has no classes; leave it out")
    if class_weights is not None and loss == "dice":
        raise UsageError(
            f"class_weights={class_weights}: loss=dice compares regions, in which every class counts alike already, "
            "and has no losses of pixels to weigh; leave it out, or take loss=focal"
        )
    weights = None if class_weights is None else _weights(task, class_weights)
    made = TrainedBy(task, loss or next(iter(NAMED[task.answer])), weights)
    made.of  # noqa: B018 - a name that is none is told now
    if loss and FUNCTION.fullmatch(loss):
        _try(made, loss)
    return made


def _weights(task: Task, text: str) -> Tensor:
    """The weight of each class, float32 [C]."""
    classes = task.classes or len(task.outputs()["classes"])
    if text == BALANCED:
        return balanced([task.data(client, "train").y for client in range(task.population)], classes)
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"class_weights={text}: expected balanced, or a number for each class: 1,2.5,1") from None
    if len(found) != classes or not all(0 <= one < float("inf") for one in found):
        raise UsageError(
            f"class_weights={text}: {len(found)} numbers, of which none may be negative, for {classes} classes"
        )
    return torch.tensor(found)


def balanced(labels: Sequence[Tensor], classes: int) -> Tensor:
    """Weights [C] by which every class that there is counts as much as any other, and a sample 1 on average.

    Where labels are masks, samples are their pixels.
    """
    counts = torch.stack([torch.bincount(y[(y >= 0) & (y < classes)], minlength=classes) for y in labels]).sum(0)
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp(min=1))
    return torch.where(present, weights, 1.0).float()


def _try(task: TrainedBy, text: str) -> None:
    """Raises UsageError where a function of one's own gives no losses on the problem's first rows."""
    data = next((d for k in range(task.population) if len(d := task.data(k, "train"))), None)
    if data is None:
        return
    rows = data.taken(None)[:2]
    batch = data.at(rows)
    net = task.network().eval()
    with torch.no_grad():
        outputs = net(batch.x)
    outputs.requires_grad_()
    y = batch.y.long() if task.answer == "mask" else batch.y
    given = f"loss={text} of outputs {list(outputs.shape)} and targets {y.dtype} {list(y.shape)}"
    try:
        values = task.of(outputs, y)
    except Exception as error:
        raise UsageError(f"{given} fails ({type(error).__name__}: {error})") from error
    alone = isinstance(values, Tensor) and values.dim() == 0 and task.weights is None
    pixels = [] if task.answer != "mask" else [y.shape]
    fitting = pixels if pixels and task.weights is not None else [y.shape[:1], *pixels]
    if not isinstance(values, Tensor) or not (alone or values.shape in fitting) or not values.requires_grad:
        got = f"a tensor {list(values.shape)}" if isinstance(values, Tensor) else with_article(type(values).__name__)
        mean = "" if task.weights is not None else ", or their mean"
        raise UsageError(
            f"{given} gives {got}; expected a loss for each {'pixel' if pixels else 'row'}, {list(fitting[-1])}{mean}, "
            "that has a gradient"
        )
