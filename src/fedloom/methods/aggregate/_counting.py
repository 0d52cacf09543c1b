"""How many sent each word of a code, when all words arrive as one noisy sum: AMP-DA-Net [arXiv 2509.16577].

A row is y = x' C + noise, with x [n] the numbers of senders, and C [n, d] the code, whose rows have length 1. Layers of
approximate message passing, each with a small network behind it, estimate x; then it is made whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NOISE = 100.0  # sigma^2 before the first layer, as in the official code
TINY = 1e-12
STEP = {
    "output": 0.0,  # r: what of the correction of the output counts, within 0.3 and 2
    "inverse": 0.0,  # i: factor on inverse variances, within 0.5 and 2
    "damping": math.log(0.3 / 0.7),  # d: share of the output before
    "heat": math.log(1.25),  # tau: of the posterior
    "active": math.log(0.2 / 0.8),  # share of the posterior in who is active
    "senders": 0.0,  # step of K
    "popular": 0.0,  # step of pi
    "level": 0.0,  # step of sigma^2
}


class Decoder(nn.Module):
    """The code C, and T layers that read it. `blend`: the share of each layer's network in its estimate, to begin with.

    K senders, words of popularity pi [n] (their shares of what is sent) and noise sigma^2 are estimated on the way.
    """

    def __init__(self, words: int, length: int, layers: int, filters: int, blend: float) -> None:
        super().__init__()
        self.words = nn.Parameter(F.normalize(torch.randn(words, length), dim=1))
        self.turn = nn.Parameter(torch.eye(length))
        for name, value in (STEP | {"blend": math.log(blend / (1 - blend))}).items():
            self.register_parameter(name, nn.Parameter(torch.full((layers,), value)))
        self.networks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(6, filters, 3, padding=1, bias=False),
                nn.ReLU(),
                nn.Conv1d(filters, filters, 3, padding=1, bias=False),
                nn.ReLU(),
                nn.Conv1d(filters, 1, 3, padding=1, bias=False),
                nn.ReLU(),
            )
            for _ in range(layers)
        )

    def code(self) -> Tensor:
        """C [n, d]."""
        return F.normalize(self.words @ self.turn, dim=1)

    def forward(self, y: Tensor, popular: Tensor, senders: float) -> tuple[Tensor, Tensor]:
        """Rows [B, d] to estimates [B, n] and of K []; `popular` [n] and `senders` are where pi and K begin."""
        me: Any = self
        code, pi = self.code(), popular / popular.sum()
        squares = code.square()
        k = y.new_tensor(float(senders))
        most = max(8, int(2 * senders))
        x, v = y.new_zeros(len(y), len(code)), y.new_ones(len(y), len(code))
        z, spread, noise = y.clone(), torch.ones_like(y), y.new_full((len(y), 1), NOISE)
        for t, network in enumerate(self.networks):
            rates = k * pi.clamp(min=TINY)
            prior = (1 - torch.exp(-rates)).clamp(1e-6, 1 - 1e-6)
            if t == 0:
                active = prior
            # what the senders' words should give, and what is left of y
            wide, total = v @ squares, noise + spread
            new = x @ code - between(me.output[t], 0.3, 2.0) * (y - z) / total * wide
            damping = me.damping[t].sigmoid()
            z, spread = damping * z + (1 - damping) * new, damping * spread + (1 - damping) * wide
            inverse = between(me.inverse[t], 0.5, 2.0) / total
            var = 1 / (inverse @ squares.T).clamp(min=TINY)
            seen = x + ((y - z) * inverse) @ code.T * var
            mean, v, at_work = counted(seen, var, active, rates, most, me.heat[t].exp())
            share = me.active[t].sigmoid()
            active = (1 - share) * prior + share * at_work
            about = (seen, var.sqrt(), mean, v.sqrt(), active.expand_as(seen), rates.expand_as(seen))
            blend = me.blend[t].sigmoid()
            x = (1 - blend) * mean + blend * network(torch.stack(about, 1)).squeeze(1)
            k = (k + (2 * me.senders[t].sigmoid() if t else 1.0) * (mean.sum(1).mean() - k)).clamp(0, len(code))
            step, found = me.popular[t].sigmoid(), mean.sum(0)
            pi = (1 - step) * pi + step * found / found.sum().clamp(min=TINY)
            left = (y - z).square() / (1 + spread / noise).square() + noise * spread / (spread + noise)
            step = me.level[t].sigmoid()
            noise = torch.exp((1 - step) * noise.log() + step * left.mean(1, keepdim=True).clamp(min=TINY).log())
        return x, k


def between(raw: Tensor, low: float, high: float) -> Tensor:
    """A number within bounds, in their middle at 0."""
    return (low + high) / 2 + (high - low) / 2 * raw.tanh()


def counted(
    seen: Tensor, var: Tensor, active: Tensor, rates: Tensor, most: int, heat: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance [B, n] of how often each word was sent, 0 to `most`, and which words were sent at all [n].

    They are seen with Gaussian noise. A word is sent with probability `active` [n], as often as a Poisson number says.
    """
    m = torch.arange(most + 1, device=seen.device, dtype=seen.dtype)
    poisson = m * rates.clamp(min=TINY).log()[:, None] - rates[:, None] - torch.lgamma(m + 1)
    prior = torch.cat([torch.log1p(-active)[:, None], active.log()[:, None] + poisson[:, 1:]], 1)
    posterior = ((prior - (seen[..., None] - m).square() / (2 * var[..., None])) / heat).softmax(2)
    mean = posterior @ m
    return mean, (posterior @ m.square() - mean.square()).clamp(min=TINY), posterior[..., 1:].sum(2).mean(0)


def whole(x: Tensor, y: Tensor, code: Tensor, senders: int) -> Tensor:
    """Whole numbers [B, n], as many in each row as there are senders, near estimates x [B, n] of what is in y [B, d].

    The words of the largest estimates are fitted to y anew; each sender then stands where most is missing.
    """
    kept = x.clamp(min=0).topk(min(senders, x.shape[1]), 1).indices
    chosen = code[kept]  # [B, K, d]
    square = chosen @ chosen.mT + 1e-6 * torch.eye(kept.shape[1], device=x.device)
    fitted = torch.linalg.solve(square, chosen @ y[..., None]).squeeze(2).clamp(min=0)
    wanted = torch.zeros_like(x).scatter(1, kept, fitted)
    found = torch.zeros_like(x)
    for _ in range(senders):
        found.scatter_add_(1, (wanted - found).argmax(1, keepdim=True), torch.ones_like(x[:, :1]))
    return found
