"""What the methods that distill an old model share."""

import torch
from torch.nn import functional as F

NEVER = -1e9  # the score of a class that cannot win


def among(scores, classes):
    """Scores [B, C] in which only some classes (bool [C]) can win."""
    return scores.masked_fill(~classes.to(scores.device, non_blocking=True), NEVER)


def of(scores, classes):
    """The scores [B, C'] of some classes (bool [C], on the processor) by number: a device would wait for a mask."""
    return scores[:, classes.nonzero().flatten().to(scores.device, non_blocking=True)]


def answers(net, x, classes, temperature):
    """softmax(f(x) / T) [B, C'] over some classes (bool [C]), without a gradient."""
    with torch.no_grad():
        return (of(net(x), classes) / temperature).softmax(1)


def distillation(scores, answers, classes, temperature):
    """The cross-entropy of old answers [B, C'] and softmax(scores / T) over the same classes, the mean over a batch."""
    told = (of(scores, classes) / temperature).log_softmax(1)
    return -(answers * told).sum(1).mean()


def divergence(target, scores):
    """KL(softmax(target) || softmax(scores)) of each sample, [B]."""
    return F.kl_div(scores.log_softmax(1), target.softmax(1), reduction="none").sum(1)
