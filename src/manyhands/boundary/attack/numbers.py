"""A reply's numbers as one row, and a reply made of such a row: what attackers compute with.

Only floating-point numbers of tensors count, and of a vector only its parameters: counts of samples, masks and running
statistics stay what they are. A field that was sent under the same name and in the same form is a model come back: its
part of the row is the difference from what was sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from manyhands.message import Sparse
from manyhands.vector import Vector

Place = tuple[str | int, ...]


def outline(reply: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where the numbers of a reply stand and how many: replies of one outline have comparable rows."""
    return tuple((place, type(leaf), len(_numbers(leaf))) for place, leaf in _leaves(reply))


def row(reply: Mapping[str, Any], sent: Mapping[str, Any]) -> Tensor:
    """The numbers of a reply to the message `sent`, [D]."""
    parts = [_numbers(leaf) - _reference(sent, place, leaf) for place, leaf in _leaves(reply)]
    return torch.cat(parts) if parts else torch.zeros(0)


def filled(reply: Mapping[str, Any], numbers: Tensor, sent: Mapping[str, Any]) -> dict[str, Any]:
    """The reply with another row [D] in it."""
    left = numbers

    def put(value: Any, place: Place) -> Any:
        nonlocal left
        if isinstance(value, dict):
            return {key: put(inner, (*place, key)) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(put(inner, (*place, key)) for key, inner in enumerate(value))
        if not _counts(value):
            return value
        size = len(_numbers(value))
        mine, left = left[:size], left[size:]
        return _rebuilt(value, mine + _reference(sent, place, value))

    return {name: put(value, (name,)) for name, value in reply.items()}


def _leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*place, key))
    elif isinstance(value, list | tuple):
        for key, inner in enumerate(value):
            yield from _leaves(inner, (*place, key))
    elif _counts(value):
        yield place, value


def _counts(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.itemsize > 1  # float8 knows no arithmetic
    return isinstance(value, Vector | Sparse)


def _numbers(leaf: Any) -> Tensor:
    if isinstance(leaf, Vector):
        return leaf.flat[: leaf.layout.split]
    tensor: Tensor = leaf.dense() if isinstance(leaf, Sparse) else leaf
    return tensor.flatten()


def _reference(sent: Mapping[str, Any], place: Place, leaf: Any) -> Tensor | float:
    there: Any = sent
    for key in place:
        try:
            there = there[key]
        except (KeyError, IndexError, TypeError):
            return 0.0
    if isinstance(leaf, Vector):
        return _numbers(there) if isinstance(there, Vector) and there.layout == leaf.layout else 0.0
    if isinstance(leaf, Tensor) and isinstance(there, Tensor) and there.shape == leaf.shape:
        return there.flatten().to(leaf.dtype)
    return 0.0


def _rebuilt(leaf: Any, numbers: Tensor) -> Any:
    if isinstance(leaf, Vector):
        return Vector(torch.cat([numbers.to(leaf.flat.dtype), leaf.flat[leaf.layout.split :]]), leaf.layout)
    if isinstance(leaf, Sparse):
        dense = numbers.to(leaf.values.dtype).view(leaf.size, *leaf.values.shape[1:])
        return Sparse(leaf.index, dense[leaf.index], leaf.size)
    return numbers.to(leaf.dtype).view(leaf.shape)
