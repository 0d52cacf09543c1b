"""A client whose samples lack labels, which an oracle tells for a price."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedloom.calls import ASKED
from fedloom.errors import UsageError
from fedloom.task import Data

if TYPE_CHECKING:
    from fedloom.descent import Guard
    from fedloom.site import Site
    from fedloom.state import State


class Asking:
    """What a client does to have its samples labelled: it looks at its `pool`, and asks for labels while it may.

    Labels that it has asked for are paid, and counted in the record as `labels`; it keeps them whatever becomes of its
    reply. A method that asks declares `needs = ("oracle",)`.
    """

    id: int
    site: Site
    state: State
    guard: Guard | None
    key: tuple[int | str, ...]
    round: int
    labels = 0  # asked for in this call

    @property
    def pool(self) -> Data:
        """Those of its samples whose labels it has not asked for; all labels are -1."""
        if self.guard:
            self.guard.read("client.pool")
        return self._hidden().without_labels()

    @property
    def asked(self) -> int:
        """How many labels it has asked for so far."""
        rows = self._asked()
        return 0 if rows is None else len(rows)

    @property
    def labels_left(self) -> int:
        """How many labels it may still ask for: those of its pool, or what is left of its part of the budget."""
        left = self.site.task_at(self.round).allowance(self.id) - self.asked
        return max(0, min(left, len(self._hidden())))

    def ask(self, places: Tensor) -> Tensor:
        """The labels [b] of samples of the `pool`, by their places in it: int64 [b], none of them twice.

        From now on these samples are no more in `pool`, but the last ones in `client.data`, with their labels.

        Raises:
            UsageError: there are fewer `labels_left`; a place that there is not, or one twice; in an evaluation, which
                leaves no trace.
        """
        if self.guard:
            self.guard.read("client.ask")
        hidden = self._hidden()
        self._check(places, len(hidden))
        rows = hidden.taken(None)[places.to(hidden.inputs.device)]
        if not len(rows):
            return hidden.labels[rows]
        before = self._asked()
        self.state[ASKED] = rows if before is None else torch.cat([before, rows])
        self.labels += len(rows)
        return hidden.labels[rows]

    def _check(self, places: Any, there: int) -> None:
        """Raises UsageError for places that labels cannot be asked for."""
        if self.key[2] == "evaluate":
            raise UsageError("client.ask in an evaluation, which leaves no trace; ask in a round")
        if not isinstance(places, Tensor) or places.dim() != 1 or places.dtype != torch.int64:
            got = f"{places.dtype} {list(places.shape)}" if isinstance(places, Tensor) else type(places).__name__
            raise UsageError(f"client.ask got {got}; expected places in client.pool, as int64 [b]")
        if len(places.unique()) < len(places):
            raise UsageError("client.ask got a place in the pool twice; a label is asked for, and paid, once")
        first, last = (int(places.min()), int(places.max())) if len(places) else (0, -1)
        if first < 0 or last >= there:
            raise UsageError(f"client.ask got places from {first} to {last}; the pool has {there}")
        if len(places) > self.labels_left:
            raise UsageError(
                f"client {self.id} asks for {len(places)} labels, and may ask for {self.labels_left} more; ask for at "
                "most client.labels_left"
            )

    def _asked(self) -> Tensor | None:
        """The rows of the storage whose labels it has asked for."""
        rows: Any = self.state.values_.get(ASKED)
        return rows

    def _hidden(self) -> Data:
        """Its pool, with the labels that nobody but its oracle knows."""
        if "oracle" not in self.site.needs:
            raise UsageError('labels are asked for by methods that declare needs = ("oracle",)')
        task = self.site.task_at(self.round)
        pool, own = task.pool(self.id), task.data(self.id, "train")
        assert pool is not None, "a run whose task has none is refused"
        if pool.inputs is not own.inputs or pool.labels is not own.labels:
            raise UsageError(f"{type(task).__name__}.pool lies in another storage than data(client, 'train')")
        rows = self._asked()
        return pool if rows is None else replace(pool, rows=(every := pool.taken(None))[~torch.isin(every, rows)])

    def _with_asked(self, data: Data) -> Data:
        """Its training data, and behind them the samples whose labels it has asked for."""
        rows = self._asked()
        return data if rows is None else replace(data, rows=torch.cat([data.taken(None), rows]))
