"""What makes a client's rows unlike the others': rotated, noisy or pale features, wrong labels, and the normalisation.

Client k of K gets the share k / (K - 1) of the strongest shift: client 0 none, the last one all of it.
"""

import math

import torch
from torch.nn import functional

from fedloom.data.shards import ranks

AT_ONCE = 2**22  # numbers that are worked on at once, so that nothing but x itself is large


def strength(client: torch.Tensor, clients: int) -> torch.Tensor:
    """k / (K - 1) of each entry of `client`, float32 `[n]`; nobody (-1) and an only client have 0."""
    return client.clamp(min=0) / max(1, clients - 1)


def shift(
    x: torch.Tensor,
    owner: torch.Tensor,
    clients: int,
    name: str,
    value: float,
    unit: torch.Tensor,
    generator: torch.Generator,
) -> None:
    """Applies `rotation`, `noise` or `contrast` to the rows of x `[N, ...]` in place, as strongly as the owner has it.

    `unit` is what a noise of 1 means: broadcastable to a row. Pixels are not clipped to [0, 1].
    """
    amount = strength(owner, clients).view(-1, *[1] * (x.dim() - 1))
    rows = _rows_at_once(x)
    for part, share in zip(x.split(rows), amount.split(rows), strict=True):
        if name == "noise":
            part += value * share * unit * torch.randn(part.shape, generator=generator)
        elif name == "contrast":
            part += (part.mean(dim=(1, 2, 3), keepdim=True) - part) * share * (1 - value)
        elif (turned := (share > 0).flatten()).any():
            part[turned] = rotated(part[turned], value * share[turned].flatten())


def rotated(images: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """Images `[n, C, H, W]`, each turned counter-clockwise about its centre: bilinear, black where nothing was."""
    height, width = images.shape[2:]
    radians = degrees * (math.pi / 180)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    across, down = torch.stack([cos, -sin * height / width, zero], 1), torch.stack([sin * width / height, cos, zero], 1)
    grid = functional.affine_grid(torch.stack([across, down], 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def flip_labels(
    y: torch.Tensor, owner: torch.Tensor, clients: int, classes: int, value: float, generator: torch.Generator
) -> None:
    """Changes the share k / (K - 1) * value of client k's labels, in place, each to another class drawn at random."""
    rank = ranks(owner, clients, generator)
    sizes = torch.bincount(owner[owner >= 0], minlength=clients)
    wrong = (sizes * strength(torch.arange(clients), clients).double() * value).round().long()
    rows = ((rank >= 0) & (rank < wrong[owner])).nonzero().squeeze(1)
    y[rows] = (y[rows] + torch.randint(1, classes, (len(rows),), generator=generator)) % classes


def moments(x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the rows, per channel `[C, 1, 1]` or column `[D]`; a constant's deviation is 1."""
    axes = [0, *range(2, x.dim())]
    count = len(rows) * math.prod(x.shape[2:])
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for some in rows.split(_rows_at_once(x)):
        total += x[some].sum(axes, dtype=torch.float64)
    mean = (total / count).view(-1, *[1] * (x.dim() - 2))
    for some in rows.split(_rows_at_once(x)):
        squares += (x[some] - mean.float()).square_().sum(axes, dtype=torch.float64)
    deviation = (squares / count).sqrt().view_as(mean)
    deviation[deviation <= 1e-7 * mean.abs()] = 1  # below what float32 tells apart
    return mean.float(), deviation.float()


def _rows_at_once(x: torch.Tensor) -> int:
    return max(1, AT_ONCE // math.prod(x.shape[1:]))


def note(name: str, value: float, client: int, clients: int) -> str:
    """What a modifier did to a client, in words; nothing for nothing."""
    share = client / max(1, clients - 1)
    if share == 0:
        return ""
    return {
        "rotation": f"rotation {value * share:.3g} degrees",
        "noise": f"noise {value * share:.3g}",
        "contrast": f"contrast {1 - share * (1 - value):.3g}",
        "flip": f"{100 * value * share:.3g} % of the labels changed",
    }[name]
