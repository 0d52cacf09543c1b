"""A U-Net for masks: images [C, H, W] of any size become scores [classes, H, W].

After Ronneberger et al. 2015 (arXiv 1505.04597): what goes down by pooling comes up again, and at each level what went
down beside it is joined to it. Otherwise than there the convolutions are padded, so that sides stay, GroupNorm stands
behind each (it has no buffers to average), and what comes up is repeated, and cut where a side was odd.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedloom.nets.net import Net, widths

LEVELS = 3  # of pooling: the maps double at each
GROUPS = 4


def unet(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> Net:
    """Of so many maps at the first level, by default 16; the head is a 1x1 convolution."""
    (width,) = widths("unet:WIDTH", options, default=(16,), most=1)
    return Net(Body(shape[0], width), nn.Conv2d(width, classes, 1))


class Body(nn.Module):
    """Down and up again: images [B, C, H, W] to maps [B, width, H, W]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        maps = [width * 2**level for level in range(LEVELS + 1)]
        self.down = nn.ModuleList(_block(before, now) for before, now in zip([channels, *maps], maps, strict=False))
        self.up = nn.ModuleList(_block(low + high, low) for low, high in pairwise(maps))

    def forward(self, x: Tensor) -> Tensor:
        beside = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if level else x)
            beside.append(x)
        for block, there in zip(reversed(self.up), reversed(beside[:-1]), strict=True):
            high, wide = there.shape[-2:]
            x = block(torch.cat([there, F.interpolate(x, scale_factor=2.0)[..., :high, :wide]], dim=1))
        return x


def _block(before: int, now: int) -> nn.Sequential:
    """Two 3x3 convolutions."""
    norms = [nn.GroupNorm(math.gcd(GROUPS, now), now) for _ in range(2)]
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(before, now, 3, padding=1, bias=False),
            norm1=norms[0],
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(now, now, 3, padding=1, bias=False),
            norm2=norms[1],
            relu2=nn.ReLU(),
        )
    )
