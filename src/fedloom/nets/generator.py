"""Generators: from noise and labels to features, or to inputs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeatureGenerator(nn.Module):
    """Features [B, width] from noise [B, noise] and labels [B]: one hidden layer, as FedGen's [arXiv 2105.10056]."""

    def __init__(self, classes: int, noise: int, hidden: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.body = nn.Sequential(nn.Linear(noise + classes, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.head = nn.Linear(hidden, width)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(torch.cat([noise, F.one_hot(labels, self.classes).to(noise)], 1)))
        return out


class InputGenerator(nn.Module):
    """Inputs [B, *shape] from noise [B, noise], of mean 0 and deviation 1 as normalised data are.

    Images of at least 8 x 8 pixels come through two up-sampling convolutions, as in data-free distillation
    [arXiv 1912.11006]; anything else through one hidden layer.
    """

    def __init__(self, noise: int, shape: tuple[int, ...], channels: int = 64) -> None:
        super().__init__()
        self.shape = tuple(shape)
        if len(shape) == 3 and min(shape[1:]) >= 8:
            colours, high, wide = shape
            low = (-(-high // 4), -(-wide // 4))
            self.body = nn.Sequential(
                nn.Linear(noise, channels * low[0] * low[1]),
                nn.Unflatten(1, (channels, *low)),
                nn.BatchNorm2d(channels),
                *_up(channels, channels),
                *_up(channels, channels // 2),
            )
            self.head = nn.Sequential(nn.Conv2d(channels // 2, colours, 3, padding=1), Crop(high, wide))
            self.norm: nn.Module = nn.BatchNorm2d(colours, affine=False)
        else:
            size = int(torch.Size(shape).numel())
            self.body = nn.Sequential(nn.Linear(noise, channels), nn.BatchNorm1d(channels), nn.ReLU())
            self.head = nn.Sequential(nn.Linear(channels, size), nn.Unflatten(1, self.shape))
            self.norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(size, affine=False), nn.Unflatten(1, self.shape))

    def forward(self, noise: Tensor) -> Tensor:
        out: Tensor = self.norm(self.head(self.body(noise)))
        return out


class Crop(nn.Module):
    """The upper left corner of images."""

    def __init__(self, high: int, wide: int) -> None:
        super().__init__()
        self.high, self.wide = high, wide

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.high, : self.wide]


def _up(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return (
        nn.Upsample(scale_factor=2),
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.2),
    )
