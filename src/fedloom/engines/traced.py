"""A function of tensors as the list of operations that it came to.

`torch.func` decides anew at every call what to batch and what to differentiate; for small networks that takes longer
than the numbers. A pure function that is called again and again with the same shapes need not be asked again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

AFTER = 25  # calls: about as many as a trace takes the time of
AT_MOST = 16  # traces
UNFIT = (RuntimeError, NotImplementedError, TypeError, ValueError, UserWarning)  # what torch raises at what it cannot


class Traced:
    """`function`, which takes tensors and sequences of tensors, and is pure: same numbers in, same numbers out.

    A trace has exactly the operations of the function for its shapes and strides, hence gives bitwise the same; the
    first time that is checked.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls: Counter[Any] = Counter()
        self.traces: dict[Any, Callable[..., Any] | None] = {}  # None: has no trace

    def __call__(self, *args: Tensor | Sequence[Tensor]) -> Any:
        form = tuple(map(_form, args))
        trace = self.traces.get(form)
        if trace is not None:
            return trace(*args)
        out = self.function(*args)
        self.calls[form] += 1
        if self.calls[form] >= AFTER and form not in self.traces and len(self.traces) < AT_MOST:
            self.traces[form] = self._trace(args, out)
        return out

    def _trace(self, args: Sequence[Any], out: Any) -> Callable[..., Any] | None:
        try:
            module = make_fx(self.function)(*args)
            module.graph.eliminate_dead_code()
            module.recompile()
            forward: Callable[..., Any] = module.forward
            return forward if _same(forward(*args), out) else None
        except UNFIT:
            return None


def _form(value: Tensor | Sequence[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_form, value))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(map(_same, a, b))
