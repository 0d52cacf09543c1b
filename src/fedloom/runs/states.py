"""What clients remember: in memory up to a budget, beyond it in a file."""

from __future__ import annotations

import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedloom import encoding, message
from fedloom.calls import ASKED
from fedloom.errors import RunError
from fedloom.runs.writing import disk

if TYPE_CHECKING:
    from fedloom.message import Value

BUDGET = 2**30  # bytes


class States(MutableMapping[int, dict[str, "Value"]]):
    """What clients remember, by client id. Whatever was used least recently beyond `budget` bytes lies in a file.

    A state counts as many bytes as `encoded` gives; one that comes back from the file has the same bits, on `device`.
    The file lies in `folder` (default: that of temporary files) and has no name: it is gone with this object, or with
    the process, whatever ends it. A state is not to be changed in place: set a new one.
    """

    def __init__(self, folder: Path | None = None, device: str | torch.device = "cpu", budget: int = BUDGET) -> None:
        self.folder = folder or Path(tempfile.gettempdir())
        self.device = torch.device(device)
        self.budget = budget
        self.sizes: dict[int, int] = {}  # bytes of every state, wherever it is
        self.memory: OrderedDict[int, dict[str, Value]] = OrderedDict()  # least recently used first
        self.used = 0  # bytes in memory
        self.spill: _Spill | None = None
        self.before: States | None = None  # what was overwritten inside `undone_by`, or new ({})

    @contextmanager
    def undone_by(self, failure: type[Exception]) -> Iterator[None]:
        """What is set inside is taken back if it ends in that failure; but for labels that were asked for, and paid."""
        self.before = before = States(self.folder, self.device, self.budget)
        try:
            yield
        except failure:
            self.before = None
            for client in before:
                paid = {name: kept for name, kept in self.get(client, {}).items() if name == ASKED}
                if state := before[client] | paid:
                    self[client] = state
                else:
                    del self[client]
            raise
        finally:
            self.before = None

    def __getitem__(self, client: int) -> dict[str, Value]:
        if client in self.memory:
            self.memory.move_to_end(client)
            return self.memory[client]
        size = self.sizes[client]
        assert self.spill is not None
        held: Any = encoding.decode(self.spill.read(client), limit=size, expanded=2**63, parts=size)["state"]
        state: dict[str, Value] = message.moved(held, self.device)
        self._keep(client, state)
        return state

    def __setitem__(self, client: int, state: dict[str, Value]) -> None:
        size = sum(encoding.sizes({"state": state}).values())
        if self.before is not None and client not in self.before:
            self.before[client] = self.get(client, {})
        self._drop(client)
        self.sizes[client] = size
        self._keep(client, state)

    def __delitem__(self, client: int) -> None:
        if client not in self.sizes:
            raise KeyError(client)
        self._drop(client)
        del self.sizes[client]

    def __contains__(self, client: object) -> bool:
        return client in self.sizes

    def __iter__(self) -> Iterator[int]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def encoded(self, client: int) -> bytes:
        """A state as the message {"state": state}; it stays where it is."""
        if client in self.memory:
            return encoding.encode({"state": self.memory[client]})
        if self.spill is None or client not in self.spill:
            raise KeyError(client)
        return self.spill.read(client)

    def state(self) -> dict[str, Any]:
        """Whose states the frames are."""
        return {"clients": sorted(self)}

    def frames(self) -> Iterator[bytes]:
        """Every state as a message, by client."""
        return map(self.encoded, sorted(self))

    def restore(self, state: Mapping[str, Any], frames: Iterator[dict[str, Any]]) -> None:
        """Takes up the states that `frames` gave."""
        for client in state["clients"]:
            self[client] = message.moved(next(frames)["state"], self.device)

    def _keep(self, client: int, state: dict[str, Value]) -> None:
        """Takes a state into memory, and what is too much out of it. One that was only read is in the file already."""
        self.memory[client] = state
        self.used += self.sizes[client]
        while self.used > self.budget:
            oldest = next(iter(self.memory))
            if self.spill is None:
                self.spill = _Spill(self.folder)
            if oldest not in self.spill:
                self.spill.write(oldest, self.encoded(oldest))
            self.used -= self.sizes[oldest]
            del self.memory[oldest]

    def _drop(self, client: int) -> None:
        if self.memory.pop(client, None) is not None:
            self.used -= self.sizes[client]
        if self.spill is not None and client in self.spill:
            self.spill.free(client)
            # States of one size fill each other's holes; where sizes change, more than half a file may become holes.
            if self.spill.waste > max(self.spill.end - self.spill.waste, self.budget):
                self.spill = self.spill.compacted()


class _Spill:
    """Bytes by client in a file without a name. A hole is filled by the next bytes of its length.

    The file has no buffer: nothing waits in it to be written once more by a forked worker, or after the disk was full.
    The system moves 2 GiB at a time at most, hence the loops.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[int, tuple[int, int]] = {}  # client -> (offset, length)
        self.holes: dict[int, list[int]] = {}  # length -> offsets
        self.end = 0  # bytes of the file
        self.waste = 0  # bytes of its holes
        with disk(folder):
            self.file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115
        weakref.finalize(self, self.file.close)

    def __contains__(self, client: int) -> bool:
        return client in self.places

    def read(self, client: int) -> bytes:
        offset, left = self.places[client]
        self.file.seek(offset)
        pieces = []
        while left:
            pieces.append(self.file.read(left))
            if not pieces[-1]:
                raise RunError(f"the state of client {client} is gone from the disk of {self.folder}; resume the run")
            left -= len(pieces[-1])
        return b"".join(pieces)

    def write(self, client: int, data: bytes) -> None:
        holes = self.holes.get(len(data))
        offset = holes[-1] if holes else self.end
        with disk(self.folder):
            self.file.seek(offset)
            left = memoryview(data)
            while left:
                left = left[self.file.write(left) :]
        if holes:
            holes.pop()
            self.waste -= len(data)
        else:
            self.end += len(data)
        self.places[client] = (offset, len(data))

    def free(self, client: int) -> None:
        offset, length = self.places.pop(client)
        self.holes.setdefault(length, []).append(offset)
        self.waste += length

    def compacted(self) -> _Spill:
        """The same without holes, in a new file."""
        fresh = _Spill(self.folder)
        for client in sorted(self.places, key=self.places.__getitem__):
            fresh.write(client, self.read(client))
        return fresh
