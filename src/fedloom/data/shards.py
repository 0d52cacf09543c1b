"""What belongs to which client, with no object a client: a million of them cost two flat tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class Shards:
    """The rows of K clients: `rows` int64 `[n]`, by client and ascending within one; `offsets` int64 `[K + 1]`."""

    def __init__(self, rows: torch.Tensor, offsets: torch.Tensor) -> None:
        self.rows = rows
        self.offsets = offsets

    @classmethod
    def from_owner(cls, owner: torch.Tensor, clients: int) -> "Shards":
        """From the client of each row, int64 `[N]`; -1 is nobody."""
        sizes = torch.bincount(owner[owner >= 0], minlength=clients)
        rows = owner.argsort(stable=True)[len(owner) - int(sizes.sum()) :]
        return cls(rows, torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]))

    def __len__(self) -> int:
        """K, the number of clients."""
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> torch.Tensor:
        """The client's rows, ascending: a view."""
        if not 0 <= client < len(self):
            raise IndexError(f"client {client} of {len(self)}")
        return self.rows[self.offsets[client] : self.offsets[client + 1]]

    @property
    def sizes(self) -> torch.Tensor:
        """The number of rows of each client, int64 `[K]`."""
        return self.offsets.diff()

    @property
    def owners(self) -> torch.Tensor:
        """The client of each entry of `rows`, int64 `[n]`."""
        return torch.arange(len(self)).repeat_interleave(self.sizes).to(self.rows.device)

    def to(self, device: torch.device) -> "Shards":
        """The same with its rows on a device; the offsets, which are read one by one, stay on the CPU."""
        return Shards(self.rows.to(device), self.offsets)


@dataclass(frozen=True)
class PerClient(Sequence[str]):
    """A string for each of K clients, made when it is asked for."""

    make: Callable[[int], str]
    clients: int

    def __len__(self) -> int:
        """K."""
        return self.clients

    def __getitem__(self, client: Any) -> Any:
        """The string of one client, or a tuple of those of a slice."""
        if isinstance(client, slice):
            return tuple(self.make(k) for k in range(*client.indices(self.clients)))
        if not -self.clients <= client < self.clients:
            raise IndexError(f"client {client} of {self.clients}")
        return self.make(client % self.clients)


def ranks(owner: torch.Tensor, clients: int, generator: torch.Generator) -> torch.Tensor:
    """A random rank 0, 1, ... of each row among the rows of its client, int64 `[N]`; -1 for nobody's rows."""
    shuffled = torch.randperm(len(owner), generator=generator)
    shards = Shards.from_owner(owner[shuffled], clients)
    rank = torch.full_like(owner, -1)
    rank[shuffled[shards.rows]] = torch.arange(len(shards.rows)) - shards.offsets[:-1].repeat_interleave(shards.sizes)
    return rank
