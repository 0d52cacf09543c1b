"""Arithmetic on stacked rows [K, D], a block of columns at a time: in double precision, in little more memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

COLUMNS = 2**14  # a block of 100 rows is then 13 MB of doubles


def blocks(stack: Tensor) -> Iterator[slice]:
    """The columns, a block at a time."""
    for start in range(0, stack.shape[1], COLUMNS):
        yield slice(start, start + COLUMNS)


def columnwise(stack: Tensor, judged: Callable[[Tensor], Tensor]) -> Tensor:
    """A row [D]: `judged` makes [C] of each block [C, K], whose rows are a coordinate's values in ascending order.

    Of no rows at all it is zero.
    """
    value = stack.new_zeros(stack.shape[1])
    for block in blocks(stack) if len(stack) else ():
        value[block] = judged(ascending(stack[:, block].t().contiguous()))
    return value


def ascending(values: Tensor) -> Tensor:
    """Each row of [C, K] in ascending order, NaN last."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))  # three times as fast as torch's
    return values.sort(dim=-1).values


def middle(ordered: Tensor) -> Tensor:
    """The median [C] of values [C, K] in ascending order; of an even number, the mean of the two in the middle."""
    count = ordered.shape[1]
    return (ordered[:, (count - 1) // 2].double() + ordered[:, count // 2].double()) / 2


def average(stack: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean [D] of the rows with weights [K] that sum to 1 (None: equal ones). A row without weight is not read."""
    if weight is None:
        weight = uniform(stack)
    rows = weight.nonzero().flatten()
    whole = len(rows) == len(stack)
    weight = weight.double()[rows]
    value = stack.new_empty(stack.shape[1])
    for block in blocks(stack):
        value[block] = (weight @ (stack[:, block] if whole else stack[rows, block]).double()).to(value.dtype)
    return value


def uniform(stack: Tensor, rows: Tensor | None = None) -> Tensor:
    """Equal weights, double [K], that sum to 1: of all rows, or of those at `rows` (int64 [m]) and 0 for the others."""
    weight = torch.zeros(len(stack), dtype=torch.float64, device=stack.device)
    weight[slice(None) if rows is None else rows] = 1 / (len(stack) if rows is None else len(rows))
    return weight


def shares(stack: Tensor, weights: Tensor | None) -> Tensor:
    """The claimed weights [K] as doubles that sum to 1; equal ones where nobody claims any."""
    if weights is None or not weights.sum() > 0:
        return uniform(stack)
    return weights.double() / weights.double().sum()


def gram(stack: Tensor) -> Tensor:
    """Inner products of all rows with all rows, double [K, K]."""
    products = torch.zeros(len(stack), len(stack), dtype=torch.float64, device=stack.device)
    for block in blocks(stack):
        piece = stack[:, block].double()
        products.addmm_(piece, piece.t())
    return products


def squared_distances(stack: Tensor) -> Tensor:
    """Squared Euclidean distances of all rows from all rows, double [K, K]; from what is not finite, infinite."""
    # The rows are not centred first: the centre would be the attacker's to choose, and with it everybody's rounding.
    products = gram(stack)
    lengths = products.diagonal()
    distances = (lengths[:, None] + lengths - 2 * products).clamp_(min=0)
    distances = torch.nan_to_num(distances, nan=torch.inf, posinf=torch.inf)
    return distances.fill_diagonal_(0)


def norms(stack: Tensor, centre: Tensor | None = None) -> Tensor:
    """Euclidean lengths of the rows, or of their differences from `centre` [D]: double [K]."""
    return along(stack, centre)[0]


def along(stack: Tensor, centre: Tensor | None = None, direction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lengths of the rows less `centre` [D], and their inner products with `direction` [D]: both double [K]."""
    squares = torch.zeros(len(stack), dtype=torch.float64, device=stack.device)
    products = torch.zeros_like(squares)
    for block in blocks(stack):
        piece = stack[:, block].double()
        if centre is not None:
            piece -= centre[block]
        squares += piece.square().sum(1)
        if direction is not None:
            products += piece @ direction[block].double()
    return squares.sqrt(), products


def first(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` smallest scores (int64 [count]); of equal ones, the first."""
    return scores.argsort(stable=True)[:count]
