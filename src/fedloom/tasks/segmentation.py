"""A class for each pixel of an image (segmentation): cross-entropy over pixels, judged by the overlap of regions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from fedloom.data.masks import IGNORED
from fedloom.data.partition import Federation
from fedloom.errors import UsageError
from fedloom.losses import of_images, pixel_cross_entropy
from fedloom.quality import DICE, MEAN_IOU, PIXEL_ACCURACY, overlap, tallies
from fedloom.scoring import PIXELS_AT_ONCE
from fedloom.task import Batch, Data, Scores
from fedloom.tasks.classification import Classification, loaded

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec

QUALITIES = (MEAN_IOU, DICE, PIXEL_ACCURACY)


@dataclass(frozen=True)
class Segmentation(Classification):
    """Cross-entropy of the class of each pixel, with a network that gives scores [B, C, H, W] for images of that size.

    y is uint8 [N, H, W], numbers of classes; pixels that are `IGNORED` have none, and count nowhere.
    """

    target = "mask"
    answer = "mask"
    qualities = QUALITIES

    @classmethod
    def of(cls, federation: Federation, model: str) -> Self:
        f = federation
        if f.kind != "image":
            raise UsageError(f"{f.source} has {f.kind} inputs; problem=segmentation learns masks of images")
        if (images := tuple(f.x.shape[2:])) != (masks := tuple(f.y.shape[1:])):
            (h, w), (v, u) = images, masks
            raise UsageError(
                f"{f.source} has images of {w}x{h} and masks of {u}x{v} pixels; give both the same size, as by "
                f"resize={w}x{h}"
            )
        return cls(f, model)

    @classmethod
    def default(cls, federation: Federation) -> str:
        return "unet"

    def _recipe(self, model: str) -> dict[str, Any]:
        return super()._recipe(model) | {"dense": True}

    def outputs(self) -> Mapping[str, Any]:
        return {"kind": "mask", "classes": list(self.federation.labels)}

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return pixel_losses(outputs, batch.y).mean()

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        return measures(scores, data, self.width)

    def describe(self) -> dict[str, Any]:
        if not len(self.global_test()):
            return super().describe()
        f = self.federation
        trained = f.y[f.train.rows[: f.train.offsets[f.population]]]
        counts = torch.bincount(trained.flatten(), minlength=IGNORED + 1)[: self.width]
        most = int(counts.argmax())
        said = torch.zeros(1, self.width, 1, 1).to(f.x)
        said[:, most] = 1
        always = measures(lambda x: said.expand(len(x), -1, *x.shape[2:]), self.global_test(), self.width)
        baseline = {"of": f"The class {f.labels[most]} in every pixel"} | {q.name: always[q.name] for q in QUALITIES}
        shares = (counts / counts.sum().clamp(min=1)).tolist()
        return super().describe() | {"pixels": dict(zip(f.labels, shares, strict=True)), "baseline": baseline}


def pixel_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """The loss of each image [B]: the mean cross-entropy over its pixels that count; 0 where none does.

    Outputs are scores [B, C, H, W], y numbers of classes or `IGNORED`, [B, H, W].
    """
    y = y.long()
    return of_images(pixel_cross_entropy(outputs, y), y)


def measures(scores: Scores, data: Data, classes: int) -> dict[str, float]:
    """How scores [B, C, H, W] fit the masks of data, over its `n` images.

    The loss is a mean over images; the others are of all pixels together (`quality.overlap`), whose tallies stand
    beside them: those of several clients make one by these.
    """
    loss, pairs = 0.0, torch.zeros(classes * classes, dtype=torch.int64)
    for x, y in data.pieces(max(1, PIXELS_AT_ONCE // max(1, data.labels[:1].numel()))):
        outputs = scores(x)
        loss += pixel_losses(outputs.double(), y).sum().item()
        counts = y != IGNORED
        pairs += torch.bincount((y.long() * classes + outputs.argmax(1))[counts], minlength=len(pairs)).cpu()
    matrix = pairs.view(classes, classes)
    found = tallies(matrix.diagonal().tolist(), matrix.sum(1).tolist(), matrix.sum(0).tolist())
    return {"n": len(data), "loss": loss / len(data)} | {q.name: overlap(q.name, found) for q in QUALITIES} | found


def build(spec: Spec) -> Segmentation:
    """The task of a run's data settings, whose label is a mask: a folder of images and masks, or arrays."""
    return loaded(Segmentation, spec)
