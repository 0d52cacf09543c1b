"""A noisy channel under messages, as numbers that are sent by their amplitude have one: `channel`.

    awgn:10                 white Gaussian noise on every link, both ways, 10 dB below what is sent
    awgn:10,up              on what clients send; down: on what they receive
    awgn:std=0.01           of a deviation of its own, whatever is sent
    air:10                  replies that `mean` sums are added in the air: noise once on the sum, 10 dB below it
    air:10+awgn:20,down

Noise is added to floating tensors, to the parameters of vectors and to the values of a `Sparse`; `snr` refers to the
mean square of each such tensor. Whole numbers, masks, bits, indices, seeds and text are sent as bits, and with them
single numbers and running statistics: of those there arrives what was sent. In the air there are no types: every tensor
of a sum is an amplitude there, also one of whole numbers, and only single numbers and weights travel beside it.

Every link has noise of its own, in every call anew; between peers a link is one edge. It acts in training rounds alone,
and comes from the run's seed, so that all engines and resumed runs have the same. Bytes and times are the payload's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fedloom.boundary.stage import Stage
from fedloom.calls import SILENT, SUMMED, Fields, Layer
from fedloom.cohort import INBOX
from fedloom.errors import UsageError, unknown
from fedloom.message import Sparse
from fedloom.parsing import bound, chain
from fedloom.random import stream
from fedloom.vector import Vector

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.calls import Call
    from fedloom.mean import Sum
    from fedloom.method import Method, Planned
    from fedloom.node import Client
    from fedloom.runs.spec import Spec
    from fedloom.site import Site
    from fedloom.task import Task

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Awgn:
    """White Gaussian noise, by its own deviation or by the signal over it."""

    snr: float | None = None  # decibels
    way: Literal["both", "up", "down"] = "both"
    std: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if (self.snr is None) == (self.std is None):
            raise UsageError(
                f"channel: snr={self.snr}, std={self.std}; expected the signal over the noise in dB (awgn:snr=10) or "
                "the deviation of the noise (awgn:std=0.01), one of the two"
            )
        if self.std is not None and self.std <= 0:
            raise UsageError(f"channel: std={self.std:g}; it is a number over 0")

    def __str__(self) -> str:
        return f"{self.snr:g} dB below the signal" if self.std is None else f"of deviation {self.std:g}"

    def on(self, x: Tensor, seed: int, key: Key) -> Tensor:
        """Numbers x [...] with noise of the stream `key`."""
        if not x.numel():
            return x
        drawn = torch.randn(x.shape, generator=stream(seed, "world", "channel", *key), dtype=torch.float64)
        level: Tensor | float = self.std or 0.0
        if self.snr is not None:
            level = x.double().square().mean().sqrt() * 10 ** (-self.snr / 20)
        return x + (level * drawn.to(x.device, non_blocking=True)).to(x.dtype)


@dataclass(frozen=True)
class Channel(Stage):
    """The noise on the ways of a method's messages. In the `air`, that on the way up is on sums."""

    method: str
    up: Awgn | None
    down: Awgn | None
    air: bool

    setting = "channel"

    @staticmethod
    def of(spec: Spec, method: Method) -> Channel:
        """What a run's setting asks for; raises UsageError for what is wrong in it, or does not go with others."""
        ways: dict[str, Awgn] = {}
        air = False
        for term in chain(spec.channel or ""):
            if term.name not in ("awgn", "air"):
                raise unknown("channel", term.name, ("awgn", "air"))
            above = term.name == "air"
            air = air or above
            values = bound(term, Awgn, f"channel: {term.name}", besides=("way",) if above else ())
            noise = Awgn(**values | ({"way": "up"} if above else {}))
            for way in ("up", "down") if noise.way == "both" else (noise.way,):
                if way in ways:
                    raise UsageError(f"channel={spec.channel} says twice what noise is on the way {way}; say it once")
                ways[way] = noise
        made = Channel(method.name(), ways.get("up"), ways.get("down"), air)
        for part, setting, why in CLASHES:
            if getattr(made, part) and (value := getattr(spec, setting)):
                raise UsageError(f"channel={spec.channel} and {setting}={value}: {why}")
        if made.up and not (air and made.up.std) and str(spec.dp).startswith("client"):
            raise UsageError(
                f"channel={spec.channel} and dp={spec.dp}: noise that comes with a reply, or that grows with it, "
                "is no part of what is bounded; take air:std=..., or noise on the way down"
            )
        return made

    def at_clients(self) -> Sequence[Layer]:
        return [self] if self.down or not self.air else []

    def on(self, task: Task) -> Channel:
        return self

    def after_rehearsal(self, books: Books, whole: bool) -> Channel:
        for way, what in (("up", "send"), ("down", "are sent")) if whole else ():
            if getattr(self, way) and not books.site.changes.get((id(self), way)):
                raise UsageError(
                    f"channel: noise is on floating tensors, and the clients of {self.method} {what} none in its "
                    f"rounds; give the noise another way than {way}, leave it out, or take another method"
                )
        return self

    def check_call(self, call: Call | Planned) -> None:
        if self.air and call.kind == "train" and call.verb not in (*SUMMED, *SILENT):
            raise UsageError(
                "channel=air: only what a method sums by mean is added in the air, and this one asks for each reply of "
                f"{call.function} by {call.verb}; take awgn, or a method that sums, such as fedavg"
            )

    def receive(self, client: Client, call: Call, message: Mapping[str, Any]) -> Mapping[str, Any]:
        here = {}
        for name, value in message.items():
            if call.verb != "exchange" or name != INBOX:
                here[name] = self.through("down", value, client.site, call, client.id, name)
            else:  # each edge has noise of its own
                where = (client.site, call, client.id)
                here[name] = {sender: self.through("up", its, *where, sender) for sender, its in value.items()}
        return here

    def arrive(self, call: Call, client: int, reply: Fields, site: Site | None = None) -> Fields:
        if self.air or call.verb == "exchange" or site is None:
            return reply
        return {field: self.through("up", value, site, call, client, field) for field, value in reply.items()}

    def through(self, way: str, value: Any, site: Site, call: Call, client: int, *path: str | int) -> Any:
        """What arrives of a value."""
        noise: Awgn | None = getattr(self, way)
        if noise is None:
            return value
        key = (way, call.kind, call.round, call.nth, client)

        def numbers(x: Tensor, *path: str | int) -> Tensor:
            site.note_change(self, way, x.numel() > 0)
            return noise.on(x, site.seed, (*key, *path))

        return amplitudes(value, numbers, *path)

    def total(self, books: Books, call: Call, total: Sum | None) -> Sum | None:
        if not self.air or not self.up or total is None:
            return total
        uses = 0
        for path, leaf in total.leaves.items():
            if not isinstance(leaf.total, Tensor):
                continue
            sent: Any = slice(leaf.form.layout.split if leaf.form.layout else None)
            if leaf.form.kind == "sparse" and isinstance(leaf.weight, Tensor):
                sent = leaf.weight > 0
            x = leaf.total[sent]
            leaf.total[sent] = self.up.on(x, books.site.seed, ("air", call.kind, *call.key, *path))
            uses += x.numel()
        books.site.note_change(self, "up", uses > 0)
        books.notes["channel/uses"] = books.notes.get("channel/uses", 0) + uses
        return total

    def manifest(self, books: Books) -> dict[str, Any]:
        told = []
        if self.up:
            where = "the sum of what clients send, which is added in the air," if self.air else "what each client sends"
            told.append(f"Noise {self.up} is on {where} in rounds.")
        if self.down:
            told.append(f"Noise {self.down} is on what each client receives in rounds.")
        return {"channel": told}


CLASHES = (
    ("up", "compress", "compressed differences are bits, and no amplitudes that noise could be added to"),
    ("up", "secure", "under masks every number is one of a finite field, of which noise leaves nothing"),
    ("down", "cache", "what a client holds came with noise of its own, and the server does not know it"),
    ("air", "aggregate", "a robust rule must see every reply, and only their sum arrives"),
    ("air", "faults", "in the air no reply can be turned away, for only the sum arrives"),
)


def amplitudes(value: Any, numbers: Callable[..., Tensor], *path: str | int) -> Any:
    """A value with its floating tensors as `numbers(x, *path)` makes them, at their places in it; the rest as it is."""
    if isinstance(value, Mapping):
        return {key: amplitudes(inner, numbers, *path, key) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(amplitudes(inner, numbers, *path, place) for place, inner in enumerate(value))
    if isinstance(value, Vector):
        split = value.layout.split
        flat = torch.cat([numbers(value.flat[:split], *path), value.flat[split:]])
        return Vector(flat, value.layout, value.readonly)
    if isinstance(value, Sparse):
        return Sparse(value.index, numbers(value.values, *path), value.size)
    if isinstance(value, Tensor) and value.is_floating_point() and value.itemsize > 1:
        return numbers(value, *path)
    return value
