"""What the methods that distill an old model share."""

import torch
from torch.nn import functional as F

NEVER = -1e9  # the score of a class that cannot win


def among(scores, classes):
    """Scores [B, C] in which only some classes (bool [C]) can win."""
    return scores.masked_fill(~classes.to(scores.device), NEVER)


def answers(net, x, classes, temperature):
    """softmax(f(x) / T) [B, C'] over some classes (bool [C]), without a gradient."""
    with torch.no_grad():
        return (net(x)[:, classes.to(x.device)] / temperature).softmax(1)


def distillation(scores, answers, classes, temperature):
    """The cross-entropy of old answers [B, C'] and softmax(scores / T) over the same classes, the mean over a batch."""
    told = (scores[:, classes.to(scores.device)] / temperature).log_softmax(1)
    return -(answers * told).sum(1).mean()


def divergence(target, scores):
    """KL(softmax(target) || softmax(scores)) of each sample, [B]."""
    return F.kl_div(scores.log_softmax(1), target.softmax(1), reduction="none").sum(1)
