"""Two views of a sample for learning without its label: a weak one that keeps it, a strong one that disturbs it."""

from __future__ import annotations

import torch
from torch import Tensor

from fedloom.errors import UsageError


def weak(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, C, H, W] moved by up to an eighth of their size; numbers [B, D] with a little noise."""
    if x.dim() == 4:
        return shift(x, 8, generator)
    return add_noise(x, 0.1, generator)


def strong(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved by up to a quarter, with other contrast, noise and a square cut out; numbers with noise and gaps."""
    if x.dim() == 4:
        factor = 0.5 + torch.rand(len(x), 1, 1, 1, generator=generator).to(x, non_blocking=True)
        return cut_out(add_noise(shift(x, 4, generator) * factor, 0.2, generator), generator)
    return add_noise(x, 0.4, generator) * (torch.rand(x.shape, generator=generator) > 0.2).to(x, non_blocking=True)


def shift(x: Tensor, part: int, generator: torch.Generator) -> Tensor:
    """Each image [C, H, W] moved by up to H / part and W / part pixels, its edge repeated."""
    high, wide = x.shape[2:]
    rows = _source_places(len(x), high, high // part, generator).to(x.device, non_blocking=True)
    columns = _source_places(len(x), wide, wide // part, generator).to(x.device, non_blocking=True)
    return x[torch.arange(len(x), device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(
        -1, 1
    )


def _source_places(count: int, size: int, most: int, generator: torch.Generator) -> Tensor:
    """For each of `count` images the places [count, size] from which its rows (or columns) come."""
    by = torch.randint(-most, most + 1, (count, 1), generator=generator)
    return (torch.arange(size) + by).clamp(0, size - 1)


def add_noise(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """With Gaussian noise of the deviation `sigma`."""
    if not x.is_floating_point():
        raise UsageError("views of text are not known here; learn from partly labelled images or tables")
    return x + sigma * torch.randn(x.shape, generator=generator).to(x, non_blocking=True)


def cut_out(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image with a square of a third of its height at the mean grey."""
    size = max(1, x.shape[2] // 3)
    masks = []
    for extent in x.shape[2:]:
        start = torch.randint(0, max(1, extent - size + 1), (len(x), 1), generator=generator)
        place = torch.arange(extent)
        masks.append(((place >= start) & (place < start + size)).to(x.device, non_blocking=True))
    hole = masks[0][:, None, :, None] & masks[1][:, None, None, :]
    return x.masked_fill(hole, 0.0)
