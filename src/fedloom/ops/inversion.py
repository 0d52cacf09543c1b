"""Inputs from a network alone: those that a generator finds for it, and how near they are to what it remembers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Remembered:
    """How far a batch is from the running statistics of a network's batch normalizations [arXiv 1912.08795].

    It listens to every forward pass of `net`, which is in evaluation mode. A batch counts as a share 1 - `smooth` of
    the statistics of all batches that were `taken` before it, which count for the rest.
    """

    def __init__(self, net: nn.Module, smooth: float = 0.0) -> None:
        self.smooth = smooth
        self.now: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.before: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for module in net.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.register_forward_pre_hook(self._heard)

    def _heard(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        over = [axis for axis in range(inputs[0].dim()) if axis != 1]
        self.now[module] = inputs[0].mean(over), inputs[0].var(over, unbiased=False)

    def distance(self) -> Tensor | float:
        """Of the last batch: the sum over layers of |mean - running mean| + |variance - running variance|.

        A tensor []; 0.0 where the network has no batch normalization.
        """
        return sum(
            (
                torch.linalg.vector_norm(running - found)
                for module in self.now
                for running, found in zip(_running(module), self._smoothed(module), strict=True)
            ),
            0.0,
        )

    def take(self) -> None:
        """The last batch is one of those that later ones are smoothed with."""
        self.before = {
            module: (mean.detach(), variance.detach())
            for module in self.now
            for mean, variance in [self._smoothed(module)]
        }

    def _smoothed(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        if module not in self.before:
            return self.now[module]
        mean, variance = (
            self.smooth * old + (1 - self.smooth) * new
            for old, new in zip(self.before[module], self.now[module], strict=True)
        )
        return mean, variance


def sought(
    make: nn.Module,
    meta: torch.optim.Optimizer,
    z: Tensor,
    loss: Callable[[Tensor], Tensor],
    steps: int,
    lr: float,
    noise_lr: float,
) -> tuple[Tensor, list[float]]:
    """The inputs `make(z)` of the least `loss` that a copy of `make` comes by, and the loss at each of its steps.

    The copy and z take Adam steps with the rates `lr` and `noise_lr`; then `meta`, the optimizer of `make`, takes one
    along the sum of the copy's gradients, as first-order MAML does [arXiv 1803.02999; so in arXiv 2112.15278].
    """
    fast, z = copy.deepcopy(make), z.clone().requires_grad_()
    rates: list[dict[str, Any]] = [{"params": fast.parameters()}, {"params": [z], "lr": noise_lr}]
    adam = torch.optim.Adam(rates, lr, betas=(0.5, 0.999))
    whole = [torch.zeros_like(p) for p in make.parameters()]
    best, losses = z, list[float]()
    for _ in range(steps):
        x: Tensor = fast(z)
        value = loss(x)
        if not losses or value.item() < min(losses):
            best = x.detach()
        losses.append(value.item())
        adam.zero_grad()
        value.backward()
        for total, p in zip(whole, fast.parameters(), strict=True):
            assert p.grad is not None
            total += p.grad
        adam.step()
    for p, total in zip(make.parameters(), whole, strict=True):
        p.grad = total
    meta.step()
    return best, losses


def _running(module: nn.Module) -> tuple[Tensor, Tensor]:
    mean, variance = module.running_mean, module.running_var
    assert isinstance(mean, Tensor) and isinstance(variance, Tensor)
    return mean, variance
