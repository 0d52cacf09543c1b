"""Somebody with data and a random stream, who draws batches, counts gradients and keeps a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, repeat

import torch
from torch import Tensor, nn

from fedloom.descent import Guard
from fedloom.errors import UsageError
from fedloom.evaluator import Evaluator
from fedloom.random import stream
from fedloom.site import Site
from fedloom.task import Batch, Data
from fedloom.vector import Vector


class Holder(Evaluator):
    """Somebody with data, a network and a random stream.

    `key` names the node's streams: (party, kind of call, round, number of the call in the round).
    """

    def __init__(self, site: Site, key: tuple[int | str, ...], round: int) -> None:
        super().__init__(site, round)
        self.key = key
        self.draws: dict[str, int] = {}
        self.steps = 0  # gradients taken: the compute meter
        self.samples = 0  # samples that went through them
        self.logs: dict[str, list[float | Tensor]] = {}
        self.guard: Guard | None = None  # who draws batches and takes gradients in its stead, under DP-SGD

    @property
    def own(self) -> Data:
        """The node's training data, for the node itself."""
        raise NotImplementedError

    @property
    def data(self) -> Data:
        """The node's own training data. Refused where privacy accounts for gradients alone."""
        if self.guard:
            self.guard.read("client.data")
        return self.own

    @property
    def shared_data(self) -> Data:
        """Public data without labels (all are -1), the same at the server and at every client.

        Everybody is sent them once, before the first round, which the ledger has. A method that uses them declares
        `needs = ("shared_data",)`.
        """
        if "shared_data" not in self.site.needs:
            raise UsageError('shared_data is there for methods that declare needs = ("shared_data",)')
        data = self.task.shared_data()
        assert data is not None, "a run whose task has none is refused"
        return data

    def rng(self, purpose: str) -> torch.Generator:
        """The next stream for `purpose`: each call gives a fresh one, the same in every repetition of the run."""
        nth = self.draws.get(purpose, 0)
        self.draws[purpose] = nth + 1
        return stream(self.site.seed, *self.key, purpose, nth)

    def log(self, **numbers: float | Tensor) -> None:
        """Numbers for the record (their mean over the round); no algorithm ever sees them."""
        for name, number in numbers.items():
            self.logs.setdefault(name, []).append(number.detach() if isinstance(number, Tensor) else number)

    def batches(
        self,
        batch: int | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        data: Data | None = None,
    ) -> Iterator[Batch]:
        """Batches of `batch` samples for a number of epochs or of steps, reshuffled every epoch; default one epoch.

        The last batch of an epoch may be smaller. `batch` None or 0 means all samples at once, in their own order.
        """
        if self.guard:
            yield from self.guard.batches(self, batch, epochs, steps, data)
            return
        data = self.own if data is None else data
        size = batch or len(data)
        everything = None
        for order, count in self._epochs(batch, epochs, steps, data):
            if order is None:
                everything = everything or data.all()
                yield from repeat(everything, count)
            else:
                yield from islice(data.pieces(size, order), count)

    def rows(self, batch: int | None, epochs: int | None, steps: int | None, data: Data) -> Iterator[Tensor]:
        """The batches of `batches` as rows (int64 [B]) of the storage of `data`."""
        for order, count in self._epochs(batch, epochs, steps, data):
            taken = data.taken(order)
            yield from repeat(taken, count) if order is None else taken.split(batch or len(data))[:count]

    def count(
        self, batch: int | None = None, epochs: int | None = None, steps: int | None = None, data: Data | None = None
    ) -> int:
        """How many batches `batches` draws with the same arguments."""
        return self._counts(batch, epochs, steps, self.own if data is None else data)[1]

    @staticmethod
    def _counts(batch: int | None, epochs: int | None, steps: int | None, data: Data) -> tuple[int, int]:
        """How many batches an epoch has, and how many are wanted."""
        an_epoch = -(-len(data) // batch) if batch else 1
        return an_epoch, steps if steps is not None else an_epoch * (1 if epochs is None else epochs)

    def _epochs(
        self, batch: int | None, epochs: int | None, steps: int | None, data: Data
    ) -> Iterator[tuple[Tensor | None, int]]:
        """The order of each epoch's samples (int64 [n]) and how many of its batches are wanted.

        None stands for all samples as they lie, again and again, where they are one batch.
        """
        if not len(data):
            raise UsageError("batches of a node without data; give `data=`, or let this node sit out")
        if epochs is not None and steps is not None:
            raise UsageError(f"give epochs or steps, not both (epochs={epochs}, steps={steps})")
        an_epoch, left = self._counts(batch, epochs, steps, data)
        generator = self.rng("batches")
        if an_epoch == 1:
            yield None, left
            return
        while left > 0:
            order = torch.randperm(len(data), generator=generator)
            yield order.to(data.inputs.device, non_blocking=True), min(left, an_epoch)
            left -= an_epoch

    def meter(self, steps: int, samples: int) -> None:
        """Counts gradients taken, and the samples that went through them."""
        self.steps += steps
        self.samples += samples

    def input_grad(self, w: Vector, x: Tensor, loss: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """The gradient of `loss(net, x)`, a tensor [], by the inputs x [B, ...]: a tensor of the shape of x.

        The network is in evaluation mode, and neither it nor its running statistics move. It counts as one gradient of
        B samples.
        """
        bench = self._loaded(w)
        bench.choose(())
        x = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(bench.net, x), x)
        self.meter(1, len(x))
        return gradient
