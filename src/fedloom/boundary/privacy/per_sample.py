"""The gradient of every sample of a batch, by Opacus."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedloom.boundary.privacy.base import Unprotected
from fedloom.task import Batch

if TYPE_CHECKING:
    from fedloom.descent import Loss


def per_sample(
    net: nn.Module, params: Sequence[Tensor], loss: Loss, batch: Batch, whole: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The mean loss of a batch, and the gradient of every sample's loss, [B, ...] a parameter.

    `whole`: raises Unprotected where these do not make up the batch's gradient, parts of which would be lost.
    """
    from opacus.grad_sample import GradSampleModule

    with warnings.catch_warnings(), in_order(net):
        warnings.simplefilter("ignore")  # Opacus warns of hooks that it needs itself
        if batch.x.dim() == 4:
            batch = replace(batch, x=batch.x.clone(memory_format=torch.contiguous_format))
        hooked = GradSampleModule(net, loss_reduction="mean")
        try:
            value = loss(net, batch)
            value.backward()
            each = [getattr(p, "grad_sample", None) for p in params]  # none where the loss does not use a parameter
            found = [p.new_zeros(len(batch), *p.shape) if g is None else g for p, g in zip(params, each, strict=True)]
            if whole:
                made_up([p.new_zeros(p.shape) if p.grad is None else p.grad for p in params], found)
            return value.detach(), [g.detach() for g in found]
        finally:
            for p in net.parameters():
                p.grad = None
            hooked.to_standard_module()


@contextmanager
def in_order(net: nn.Module) -> Iterator[None]:
    """Kernels lie in the order of their axes, as Opacus takes what goes through convolutions to do; in vectors channels
    lie last. (Of one channel both are contiguous, and a copy alone forgets that it lies last.)"""
    held = [(p, p.data) for p in net.parameters() if p.dim() == 4]
    for p, data in held:
        p.data = data.clone(memory_format=torch.contiguous_format)
    try:
        yield
    finally:
        for p, data in held:
            p.data = data


def made_up(gradient: Sequence[Tensor], each: Sequence[Tensor]) -> None:
    """Raises Unprotected unless a batch's gradient is the mean of those of its samples, [B, ...] a parameter."""
    with torch.no_grad():
        off = torch.stack([(g - samples.mean(0)).square().sum() for g, samples in zip(gradient, each, strict=True)])
        size = torch.stack([samples.flatten(1).square().sum(1) for samples in each]).sum(dim=0).sqrt().mean()
        if off.sum().sqrt() > size * math.sqrt(torch.finfo(size.dtype).eps) + 1e-6:  # not where one is no number
            raise Unprotected(
                "dp at the level of samples takes gradients where samples pass through layers, and this loss uses "
                "parameters beside them (a penalty on their size, say); hand that to descend as `correct` or "
                "`weight_decay`"
            )
