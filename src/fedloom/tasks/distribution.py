"""A distribution over classes a sample, such as the votes of several people: cross-entropy with soft labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedloom.quality import ACCURACY, KL
from fedloom.task import Batch, Data, Scores
from fedloom.tasks.classification import JUDGED_AT_ONCE, Classification, loaded

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec

QUALITIES = (KL, ACCURACY)


@dataclass(frozen=True)
class Distribution(Classification):
    """Cross-entropy with a distribution over C classes a sample; y is float32 [N, C], its rows sum to one."""

    target = "shares"
    answer = ""  # judged by measures of its own
    qualities = QUALITIES

    def outputs(self) -> Mapping[str, Any]:
        return {"kind": "shares", "classes": list(self.federation.labels)}

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.y)

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        return measures(scores, data)

    def describe(self) -> dict[str, Any]:
        if not len(self.global_test()):
            return super().describe()
        f = self.federation
        shares = f.y[f.train.rows[: f.train.offsets[f.population]]].mean(0)
        always = measures(lambda x: shares.clamp(min=1e-12).log().expand(len(x), -1), self.global_test())
        baseline = {"of": "Always predicting the mean of the training targets"} | {
            q.name: always[q.name] for q in QUALITIES
        }
        return super().describe() | {"shares": dict(zip(f.labels, shares.tolist(), strict=True)), "baseline": baseline}


def measures(scores: Scores, data: Data) -> dict[str, float]:
    """How outputs [B, C] fit distributions, as means over `n` samples.

    The loss is the cross-entropy. `kl` is what of it is above the entropy of the targets, which no model can take away.
    `accuracy` is how often the largest output is at a class with the largest share.
    """
    outputs = torch.cat([scores(batch.x) for batch in data.pieces(JUDGED_AT_ONCE)]).double()
    y = data.y.double()
    loss = -(y * outputs.log_softmax(1)).sum(1)
    said = y.gather(1, outputs.argmax(1, keepdim=True)).squeeze(1)
    return {
        "n": len(data),
        "loss": loss.mean().item(),
        "kl": (loss + torch.special.xlogy(y, y).sum(1)).mean().item(),
        "accuracy": (said == y.amax(1)).double().mean().item(),
    }


def build(spec: Spec) -> Distribution:
    """The task of a run's data settings, whose label is several columns of shares: `label=cat,dog,other`."""
    return loaded(Distribution, spec)
