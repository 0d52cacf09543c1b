"""Several labels a sample, each there or not: binary cross-entropy on a federation of labelled data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedloom.quality import AVERAGE_PRECISION, EXACT_MATCH, MACRO_F1
from fedloom.task import Batch, Data, Scores
from fedloom.tasks.classification import JUDGED_AT_ONCE, Classification, loaded

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec

QUALITIES = (MACRO_F1, EXACT_MATCH, AVERAGE_PRECISION)


@dataclass(frozen=True)
class Multilabel(Classification):
    """Binary cross-entropy, the mean over L labels, with a network of an output a label; y is float32 [N, L], 0 or 1.

    A label is taken to be there where its output is above 0.
    """

    target = answer = "labels"
    qualities = QUALITIES

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, in the order of the outputs."""
        return self.federation.labels

    def outputs(self) -> Mapping[str, Any]:
        return {"kind": "labels", "labels": list(self.labels)}

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, batch.y)

    def answers(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return outputs.double().sigmoid(), (y > 0.5).long()

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        return measures(scores, data)

    def describe(self) -> dict[str, Any]:
        if not len(self.global_test()):
            return super().describe()
        f = self.federation
        shares = f.y[f.train.rows[: f.train.offsets[f.population]]].mean(0)
        always = measures(lambda x: shares.logit().expand(len(x), -1), self.global_test())
        baseline = {"of": "Always predicting the training shares"} | {q.name: always[q.name] for q in QUALITIES}
        return super().describe() | {"labels": dict(zip(f.labels, shares.tolist(), strict=True)), "baseline": baseline}


def measures(scores: Scores, data: Data) -> dict[str, float]:
    """How outputs [B, L] fit the labels of data, over its `n` samples.

    F1 and average precision are means over labels. A label that no sample has is left out of the average precision, and
    of F1 if it is never predicted either; what no label is left for counts as 1, nothing being wrong.
    """
    outputs = torch.cat([scores(batch.x) for batch in data.pieces(JUDGED_AT_ONCE)])
    y = data.y
    said, there = outputs > 0, y > 0.5
    right, either = (said & there).sum(0).double(), said.sum(0) + there.sum(0)
    f1 = (2 * right / either.double())[either > 0]
    precisions = average_precisions(outputs, there)[there.any(0)]
    return {
        "n": len(data),
        "loss": F.binary_cross_entropy_with_logits(outputs.double(), y.double()).item(),
        "macro_f1": f1.mean().item() if len(f1) else 1.0,
        "exact_match": (said == there).all(1).double().mean().item(),
        "average_precision": precisions.mean().item() if len(precisions) else 1.0,
    }


def average_precisions(outputs: Tensor, there: Tensor) -> Tensor:
    """For each label, the sum over thresholds of precision times the gain in recall, float64 [L]; ties are one step."""
    found = []
    for score, truth in zip(outputs.T, there.T, strict=True):
        order = score.argsort(descending=True, stable=True)
        hits = truth[order].double().cumsum(0)
        last = torch.cat([score[order].diff() != 0, truth.new_ones(1, dtype=torch.bool)])  # of each tie
        hits, ranks = hits[last], torch.arange(1, len(order) + 1, device=order.device)[last]
        gained = torch.cat([hits[:1], hits.diff()])
        found.append((gained * hits / ranks).sum() / truth.sum().clamp(min=1))
    return torch.stack(found)


def build(spec: Spec) -> Multilabel:
    """The task of a run's data settings, whose label is several columns of 0 and 1: `label=a,b,c`."""
    return loaded(Multilabel, spec)
