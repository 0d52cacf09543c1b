"""A reply's numbers as one row, and a reply made of such a row: what attackers compute with.

Only floating-point numbers of tensors count, of a vector only its parameters, and the places of a ranking: counts of
samples, masks and running statistics stay what they are. A field that came under the same name and in the same form, or
that the method declares in `updates`, is a model come back: its part of the row is the difference from where the client
began. Of a product of factors one counts, for two that are flipped are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fedloom.message import Packed, Sparse
from fedloom.vector import Vector

if TYPE_CHECKING:
    from fedloom.method import Method

Place = tuple[str | int, ...]
STATE = "state."  # begins the origin of an update that lies in the client's state


@dataclass(frozen=True)
class Updates:
    """What a method declares of its replies, see `Method`."""

    origins: tuple[tuple[str, str], ...] = ()  # field -> where what it is the update of was found
    factors: tuple[str, ...] = ()
    rankings: tuple[str, ...] = ()
    peers: bool = False  # whether clients send each other what they remember
    differences: tuple[tuple[str, str], ...] = ()  # field -> the message's field that it is a difference from

    @property
    def kept(self) -> list[str]:
        """The fields whose updates begin from what lies in a client's state, where nobody on the way sees it."""
        found = [name for name, origin in self.origins if origin.startswith(STATE)]
        return found or ["model"] * self.peers

    @staticmethod
    def of(method: Method) -> Updates:
        """Those of a method, and of the methods that it wraps."""
        found = method.nested
        return Updates(
            tuple(pair for one in found for pair in one.updates.items()),
            tuple(pattern for one in found for pattern in one.factors),
            tuple(name for one in found for name in one.rankings),
            any(call.verb == "exchange" for call in method.plan),
            (("delta", "model"), *(pair for one in found for pair in one.differences.items())),
        )

    def begun(self, message: Mapping[str, Any]) -> dict[str, tuple[Literal["model", "difference"], Any]]:
        """A message to all clients: for each field of a reply, whether it is a model or a difference, and from what."""
        known = self.sent(message).values
        begun = {name: message[origin] for name, origin in self.differences if origin in message}
        return {name: ("model", value) for name, value in known.items()} | {
            name: ("difference", value) for name, value in begun.items() if name not in known
        }

    def sent(
        self,
        message: Mapping[str, Any],
        state: Mapping[str, Any] | None = None,
        initial: Vector | None = None,
        peer: bool = False,
    ) -> Sent:
        """A message to a client, as what the client's updates begin from.

        `state` is the client's, and `initial` the model that stands for what its state does not have yet. What goes to
        a `peer` begins from what the client itself remembers by that name; nobody has sent it.
        """
        known = dict(message)
        if peer:
            begun = {"model": initial} | {name: v for name, v in (state or {}).items() if isinstance(v, Vector)}
            moved = {name for name, _ in self.differences}
            known = {name: v for name, v in begun.items() if v is not None and name not in moved} | known
        for name, origin in self.origins:
            if origin.startswith(STATE):
                value = (state or {}).get(origin.removeprefix(STATE), message.get(name, initial))
            else:
                value = message.get(origin)
            if value is not None:
                known[name] = value
        return Sent(known, self.factors, self.rankings)


@dataclass(frozen=True)
class Sent:
    """What a client was sent, and so what a reply of its is an update of."""

    values: Mapping[str, Any]
    factors: tuple[str, ...] = ()
    rankings: tuple[str, ...] = ()

    def outline(self, reply: Mapping[str, Any]) -> tuple[Any, ...]:
        """Where the numbers of a reply stand and how many: replies of one outline have comparable rows."""
        return tuple((place, type(leaf), len(_numbers(leaf))) for place, leaf in self._leaves(reply))

    def row(self, reply: Mapping[str, Any]) -> Tensor:
        """The numbers of a reply, [D]."""
        parts = [_numbers(leaf) - _reference(self.values, place, leaf) for place, leaf in self._leaves(reply)]
        return torch.cat(parts) if parts else torch.zeros(0)

    def filled(self, reply: Mapping[str, Any], numbers: Tensor) -> dict[str, Any]:
        """The reply with another row [D] in it."""
        left = numbers

        def put(value: Any, place: Place) -> Any:
            nonlocal left
            if isinstance(value, dict):
                return {key: put(inner, (*place, key)) for key, inner in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(put(inner, (*place, key)) for key, inner in enumerate(value))
            if not self._counts(value, place):
                return value
            size = len(_numbers(value))
            mine, left = left[:size], left[size:]
            return _rebuilt(value, mine + _reference(self.values, place, value))

        return {name: put(value, (name,)) for name, value in reply.items()}

    def _leaves(self, value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from self._leaves(inner, (*place, key))
        elif isinstance(value, list | tuple):
            for key, inner in enumerate(value):
                yield from self._leaves(inner, (*place, key))
        elif self._counts(value, place):
            yield place, value

    def _counts(self, value: Any, place: Place) -> bool:
        if isinstance(value, Packed):
            return place[0] in self.rankings
        if not isinstance(value, Vector | Sparse | Tensor):
            return False
        if any(fnmatchcase(".".join(map(str, place)), pattern) for pattern in self.factors):
            return False
        return not isinstance(value, Tensor) or (value.is_floating_point() and value.itemsize > 1)  # float8: no sums


def _numbers(leaf: Any) -> Tensor:
    if isinstance(leaf, Vector):
        return leaf.flat[: leaf.layout.split]
    if isinstance(leaf, Packed):  # an order of things: where each of them stands, from the middle
        places = leaf.values.long().argsort()
        return places.float() - (len(places) - 1) / 2
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
    if isinstance(leaf, Packed):
        return Packed(numbers.argsort(stable=True).to(leaf.values.dtype), leaf.bits)
    if isinstance(leaf, Sparse):
        dense = numbers.to(leaf.values.dtype).view(leaf.size, *leaf.values.shape[1:])
        return Sparse(leaf.index, dense[leaf.index], leaf.size)
    return numbers.to(leaf.dtype).view(leaf.shape)
