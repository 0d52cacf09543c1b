"""Random convolutions: an encoder of images that needs no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedloom.encoders.encoder import Encoder
from fedloom.random import stream


@dataclass(frozen=True)
class Random(Encoder):
    """Random convolutions, rectified, and averaged over each quarter of the image: four features a filter.

    Coates, Ng, Lee: An Analysis of Single-Layer Networks in Unsupervised Feature Learning, AISTATS 2011, whose pooling
    it has; its filters are drawn: Saxe, Koh, Chen, Bhand, Suresh, Ng: On Random Weights and Unsupervised Feature
    Learning, ICML 2011. A filter sums to 0, so that brightness alone says nothing.
    """

    filters: int = 128  # random filters
    size: int = 5  # pixels of a filter's side
    seed: int = 0  # of the filters

    def network(self, shape: tuple[int, ...]) -> nn.Module:
        return Filters(shape[0], self.filters, self.size, stream(self.seed, "encoder", "random"))


class Filters(nn.Module):
    """From images [B, C, H, W] to features [B, 4 * filters]."""

    weight: Tensor
    bias: Tensor

    def __init__(self, colours: int, filters: int, size: int, draw: torch.Generator) -> None:
        super().__init__()
        weight = torch.randn(filters, colours, size, size, generator=draw)
        weight -= weight.mean((1, 2, 3), keepdim=True)
        self.register_buffer("weight", weight / weight.flatten(1).norm(dim=1)[:, None, None, None])
        self.register_buffer("bias", torch.rand(filters, generator=draw) / 4)

    def forward(self, x: Tensor) -> Tensor:
        found = nn.functional.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2)
        found = torch.relu(found - self.bias[:, None, None])
        return nn.functional.adaptive_avg_pool2d(found, 2).flatten(1)
