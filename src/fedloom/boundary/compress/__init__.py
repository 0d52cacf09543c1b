"""Compression of differences on their way up: `topk:0.01`, `qsgd:4`, and pipelines such as `topk:0.01+qsgd:4+zstd`.

    lowrank:4     every matrix as two factors of rank 4; PowerSGD with a warm start           ef
    topk:0.01     the largest 1 % of the coordinates of the whole vector                      ef
    randk:0.01    a random 1 %, sent as their seed; times n/k without error feedback          ef
    qsgd:4        4 bits a number, unbiased; block=512, norm=l2 or max
    uniform:8     8 bits a number between the least and the largest of a block of 512, unbiased (rounding=nearest: ef)
    sign          one bit a number and the mean size of a block of 512                        ef
    fp16, bf16    two bytes a number
    zstd:3        lossless, over whatever is left

In a pipeline they stand in this order: low rank, then sparse, then few bits, then zstd. Only reply fields that a method
declares `compressible` are touched, and in them vectors and tensors of floating point (buffers included). What would
not become shorter travels as it is; so does everything in evaluation and in setup.

Error feedback (`ef`): a client adds to a difference what was left of the one before, and keeps what is left of the sum:
u = x + e, send C(u), e <- u - C(u) (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847). What was sent and
what is left add up to the true differences. It is on where a stage is marked above, for a biased step without it need
not converge, and off elsewhere; `topk:0.01,ef=false` says otherwise. What is left is in the client's state. A reply
that gets lost is not sent again: the client does not know.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedloom import encoding
from fedloom.boundary.compress.compressor import Compressor, Desk, Shapes, demand, packed, parts, total, unpacked
from fedloom.boundary.compress.lossless import LARGEST, Zstd
from fedloom.boundary.compress.lowrank import LowRank
from fedloom.boundary.compress.quantize import BF16, FP16, QSGD, Sign, Uniform
from fedloom.boundary.compress.sparse import RandK, TopK
from fedloom.boundary.stage import Stage
from fedloom.calls import Fields
from fedloom.errors import CodecError, UsageError
from fedloom.members import Registry
from fedloom.parsing import Term, bound, chain
from fedloom.vector import Layout, Vector

if TYPE_CHECKING:
    from fedloom.calls import Call
    from fedloom.method import Method
    from fedloom.node import Client
    from fedloom.site import Site

_STAGES: dict[str, type[Compressor] | type[Zstd]] = {
    "lowrank": LowRank,
    "topk": TopK,
    "randk": RandK,
    "qsgd": QSGD,
    "uniform": Uniform,
    "sign": Sign,
    "fp16": FP16,
    "bf16": BF16,
    "zstd": Zstd,
}
STAGES = Registry[type[Compressor] | type[Zstd]]("compression", "fedloom.compressors", _STAGES, Compressor)
MEMORY = "_compress"  # in a client's state: by function and field, what is left and what a stage keeps
TIMES, ROOM = 4, 2**16  # a reply may hold that many times the numbers of the model and of its message, and so many more
WIDEST = 32  # bytes that no stage exceeds for a number: of its value, its place, its code and its block's scales
MARK = "~"  # the only key of what stands for a compressed value
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Compress(Stage):
    """Compresses the declared fields of a client's reply, and undoes it where the reply arrives."""

    stages: tuple[Compressor, ...]
    zstd: Zstd | None
    feedback: bool
    declared: tuple[str, ...]  # reply fields that are differences

    @staticmethod
    def of(text: str, method: Method) -> Compress:
        """The pipeline that a text asks for, on what the method declares; UsageError if it declares nothing."""
        stages, zstd = pipeline(text)
        if not method.compressible:
            known = sorted(replied(method))
            sends = f"it sends {', '.join(known)}" if known else "its replies are empty"
            raise UsageError(
                f"compress={text}: {method.name()} declares no field of its replies to be a difference ({sends}); only "
                "differences are compressed, never models: leave compress out, or choose a method that declares some"
            )
        asked = {stage.ef for stage in stages} - {None}
        if len(asked) > 1:
            raise UsageError(f"compress={text}: one stage asks for error feedback and another for none; say it once")
        feedback = asked.pop() if asked else any(stage.biased for stage in stages)
        return Compress(tuple(stages), zstd, bool(feedback), tuple(method.compressible))

    def around(self, client: Client, call: Call, message: Mapping[str, Any], inner: Callable[[], Fields]) -> Fields:
        reply = inner()
        if not any(name in reply for name in self.declared):
            return reply
        if call.verb == "exchange":
            raise UsageError(
                f"compress: {call.function} sends its differences to peers; only what goes up is compressed"
            )
        memory: dict[str, Any] = dict(client.state.get(MEMORY, {}))  # type: ignore[arg-type]
        sent = {
            name: self._sent(value, f"{call.function}.{name}", client, memory) if name in self.declared else value
            for name, value in reply.items()
        }
        if memory or MEMORY in client.state:  # nothing may be left of a sum that travelled as it is
            client.state[MEMORY] = memory
        return sent

    def arrive(self, call: Call, client: int, reply: Fields, site: Site | None = None) -> Fields:
        known = LARGEST if site is None else site.initial.layout.size + _numbers(call.message(client))
        left = [min(LARGEST, TIMES * known + ROOM)]
        try:
            return {name: self._got(value, left) if name in self.declared else value for name, value in reply.items()}
        except CodecError as error:
            raise CodecError(f"reply of client {client} to {call.function}: {error}") from None

    def _sent(self, value: Any, place: str, client: Client, memory: dict[str, Any]) -> Any:
        if isinstance(value, dict):
            return {key: self._sent(inner, f"{place}.{key}", client, memory) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._sent(inner, f"{place}.{i}", client, memory) for i, inner in enumerate(value))
        x = value.flat if isinstance(value, Vector) else value
        if not isinstance(x, Tensor) or x.dtype not in NAMES or not x.numel() or not bool(x.isfinite().all()):
            return value  # whatever is wrong with it is told as without compression
        kept: dict[str, Any] = memory.get(place, {})
        desk = Desk(lambda: client.rng("compress"), list(kept.get("warm", ())), self.feedback)
        whole = _added(value, kept.get("left"))
        form, came = self._through(whole, desk)
        if sum(encoding.sizes({"x": form}).values()) >= sum(encoding.sizes({"x": whole}).values()):
            form, came = whole, None
        memory.pop(place, None)
        now = ({} if came is None else {"left": whole - came}) | ({"warm": desk.warm} if desk.warm else {})
        if now:
            memory[place] = now
        return form

    def _through(self, value: Vector | Tensor, desk: Desk) -> tuple[Any, Any]:
        """What travels in place of a value, and where errors are fed back what the other side will take it for."""
        shapes, x = _laid(value)
        wire: Any = packed(self.stages, _wide(x).reshape(-1), shapes, desk)
        came = _rebuilt(value, unpacked(self.stages, wire, shapes)) if desk.feedback else None
        form = [NAMES[x.dtype], _outline(value), self.zstd.squeeze(wire) if self.zstd else wire]
        return {MARK: form}, came

    def _got(self, value: Any, left: list[int]) -> Any:
        """A value without compression; CodecError for more numbers than its reply has `left`, before they exist."""
        if isinstance(value, dict) and value.keys() == {MARK}:
            name, outline, wire = parts(value[MARK], 3)
            demand(isinstance(name, str) and name in DTYPES, "dtype")
            like = _blank(outline, DTYPES[name], left[0])
            shapes, x = _laid(like)
            left[0] -= x.numel()
            try:
                plain = self.zstd.expand(wire, WIDEST * x.numel() + ROOM) if self.zstd else wire
                return _rebuilt(like, unpacked(self.stages, plain, shapes))
            except (RuntimeError, ValueError, IndexError, TypeError, ArithmeticError) as error:
                raise CodecError(f"a compressed value that contradicts itself: {error}".split("\n")[0]) from None
        if isinstance(value, dict):
            return {key: self._got(inner, left) for key, inner in value.items()}
        return type(value)(self._got(inner, left) for inner in value) if isinstance(value, list | tuple) else value


def pipeline(text: str) -> tuple[list[Compressor], Zstd | None]:
    """The stages of a text, and the lossless one at its end."""
    stages: list[Compressor] = []
    zstd: Zstd | None = None
    for term in chain(text):
        stage = _stage(term)
        if zstd is not None or (isinstance(stage, Compressor) and stages and stages[-1].place >= stage.place):
            raise UsageError(f"compress={text}: {term.text} stands too late; the order is {ORDER}, one of each at most")
        if isinstance(stage, Zstd):
            zstd = stage
        else:
            stages.append(stage)
    kinds = {type(stage) for stage in stages}
    if LowRank in kinds and kinds - {LowRank, FP16, BF16}:
        raise UsageError(f"compress={text}: factors bear fp16 or bf16 and zstd after them; anything coarser is no sum")
    return stages, zstd


ORDER = "lowrank, then topk or randk, then qsgd, uniform, sign, fp16 or bf16, then zstd"


def _stage(term: Term) -> Compressor | Zstd:
    cls = STAGES[term.name]
    own = [field.name for field in fields(cls) if field.name != "ef"]
    if len(term.values) > 1 or (term.values and own and own[0] in term.options):
        raise UsageError(f"compress: {term.text!r} gives more than one value without a name, or one twice")
    if term.values and not own:
        raise UsageError(f"compress: {term.text!r}: {term.name} has nothing to choose")
    return cls(**bound(term, cls, f"compress: {term.name}", last=("ef",)))


def replied(method: Method) -> set[str]:
    """Names of the fields that the text of a method's client functions returns, as far as it says."""
    found: set[str] = set()
    for name, function in type(method).client_functions().items():
        if name in ("predict", "evaluate"):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        returned = (node.value for node in ast.walk(tree) if isinstance(node, ast.Return))
        dicts = (value for value in returned if isinstance(value, ast.Dict))
        found |= {key.value for d in dicts for key in d.keys if isinstance(key, ast.Constant)}  # type: ignore[misc]
    return found


def _laid(value: Vector | Tensor) -> tuple[Shapes, Tensor]:
    """The shapes of the entries that lie one after another in a value, and its numbers."""
    if isinstance(value, Vector):
        return tuple(map(_stored, value.layout.shapes)), value.flat
    return (tuple(value.shape),), value


def _stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[2], shape[3], shape[1]) if len(shape) == 4 else shape


def _wide(x: Tensor) -> Tensor:
    """Numbers to calculate with: at least single precision."""
    return x.float() if x.itemsize < 4 else x


def _added(value: Any, left: Any) -> Any:
    """A value with what was left of the one before; of another layout or shape, that is forgotten."""
    if type(left) is not type(value) or _outline(left) != _outline(value):
        return value
    return value + left


def _rebuilt(like: Vector | Tensor, numbers: Tensor) -> Vector | Tensor:
    flat = numbers.to((like.flat if isinstance(like, Vector) else like).dtype)
    return Vector(flat, like.layout) if isinstance(like, Vector) else flat.reshape(like.shape)


def _outline(value: Vector | Tensor) -> list[Any]:
    """What the other side must know of a value beside its numbers."""
    if isinstance(value, Tensor):
        return list(value.shape)
    layout = value.layout
    return [list(layout.names), [list(shape) for shape in layout.shapes], layout.parameters]


def _numbers(value: Any) -> int:
    """How many numbers a message has."""
    if isinstance(value, Mapping):
        return sum(map(_numbers, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_numbers, value))
    return value.layout.size if isinstance(value, Vector) else value.numel() if isinstance(value, Tensor) else 1


def _blank(outline: Any, dtype: torch.dtype, most: int) -> Vector | Tensor:
    """A value of this outline that holds no memory."""
    demand(isinstance(outline, list), "outline")
    if all(type(extent) is int for extent in outline):
        demand(all(extent >= 0 for extent in outline) and 0 < total((tuple(outline),)) <= most, "shape")
        return torch.empty((), dtype=dtype).expand(outline)
    names, shapes, parameters = parts(outline, 3)
    demand(isinstance(names, list) and all(isinstance(name, str) for name in names), "names")
    demand(isinstance(shapes, list) and len(shapes) == len(names) == len(set(names)), "shapes")
    demand(all(isinstance(s, list) and all(type(n) is int and n >= 0 for n in s) for s in shapes), "shapes")
    demand(type(parameters) is int and 0 <= parameters <= len(names), "parameters")
    layout = _layout(tuple(names), tuple(map(tuple, shapes)), parameters)
    demand(0 < layout.size <= most, "shapes")
    return Vector(torch.empty((), dtype=dtype).expand(layout.size), layout)


@lru_cache(maxsize=64)
def _layout(names: tuple[str, ...], shapes: Shapes, parameters: int) -> Layout:
    return Layout(names, shapes, parameters)


__all__ = ["STAGES", "Compress", "Compressor", "pipeline", "replied"]
