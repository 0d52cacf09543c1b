"""Where replies come in: what is no reply to this call, or has another layout than the others, is turned away.

A reply's form is, place by place, its kind, dtype, shape and layout. It is compared with what most replies of the call
have there, where a form counts twice if the message that was sent has it somewhere, and twice if it was taken before.

Under `mean` every reply must have that form, for the sum has one. Otherwise replies may differ: a reply is turned away
where its kind or dtype is not the usual one (None apart), or where at least two thirds agree on another form, unless
its own message has just that form. The first axis of a tensor (samples, classes) may then have any length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from fedloom.calls import SUMMED, Call
from fedloom.message import Packed, Sparse, finite
from fedloom.vector import Vector


def find_malformed(
    call: Call, replies: Mapping[int, Mapping[str, Any]], whole: bool, before: MutableMapping[str, Any]
) -> dict[int, str]:
    """Why replies (by client) are turned away, of those that are.

    `whole`: a rule needs all fields of everybody. `before` is kept from round to round.
    """
    refused = {client: "NaN or infinite numbers" for client, reply in replies.items() if not finite(dict(reply))}
    seen = {client: form_of(call, reply) for client, reply in replies.items() if client not in refused}
    return refused | find_strange(call, seen, whole, before)


def form_of(call: Call, reply: Mapping[str, Any]) -> dict[str, str]:
    """The form of a reply to a call, place by place."""
    return dict(_forms(reply, call.verb in SUMMED))


def find_strange(
    call: Call, forms: Mapping[int, Mapping[str, str]], whole: bool, before: MutableMapping[str, Any]
) -> dict[int, str]:
    """Of clients whose forms are strange, why; as `find_malformed` of replies whose numbers are finite."""
    refused: dict[int, str] = {}
    mean = call.verb in SUMMED
    asked = dict(_forms(call.shared, mean))
    expected: dict[str, str] = dict(before)
    for place in sorted({place for form in forms.values() for place in form}):
        counts = Counter(form[place] for form in forms.values() if place in form)
        among = counts.total()
        known = before.get(place)
        if known is not None:
            counts[known] += 1
        usual = _usual(counts, set(asked.values()), known)
        sorts: Counter[str] = Counter()
        for form, count in counts.items():
            sorts[_sort(form)] += count
        sort = _usual(sorts, set(map(_sort, asked.values())), None if known is None else _sort(known))
        agreed = mean or 3 * counts[usual] >= 2 * counts.total()
        if agreed:
            expected[place] = usual
        for client, mine in forms.items():
            if place not in mine:
                if whole and mean and 2 * among > len(forms):
                    refused.setdefault(client, f"{place!r} is missing")
            elif (form := mine[place]) != usual:
                told = {*asked.values(), *dict(_forms(call.own.get(client, {}), mean)).values()}
                other = agreed or (_sort(form) != sort and "None" not in (form, sort))
                if mean or (other and form not in told):
                    refused.setdefault(client, f"{place!r} is a {form}, expected {usual}")
    before.update(expected)
    return refused


def _usual(counts: Counter[str], asked: set[str], known: str | None) -> str:
    """What has most votes: one of each reply, twice as many if the message has it, and again if it was taken before."""
    votes = {form: count << (form in asked) + (form == known) for form, count in counts.items()}
    return max(votes, key=lambda form: (votes[form], form in asked, form))


def _sort(form: str) -> str:
    """The kind and dtype in a form, without shapes."""
    return " ".join(form.split()[:2])


def _forms(value: Any, whole: bool, place: str = "") -> Iterator[tuple[str, str]]:
    """(place, form) of everything in a reply; `whole` counts the first axis of tensors."""
    if isinstance(value, Mapping | list | tuple):
        if place:
            yield place, "dict" if isinstance(value, Mapping) else type(value).__name__
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _forms(inner, whole, f"{place}.{key}" if place else str(key))
    elif isinstance(value, Vector):
        yield place, f"vector {value.flat.dtype} of {value.layout.size} numbers, {value.layout.digest}"
    elif isinstance(value, Sparse):
        yield place, f"sparse {value.values.dtype} {[value.size, *value.values.shape[1:]]}"
    elif isinstance(value, Packed):
        yield place, f"packed {value.values.dtype} {_shape(value.values, whole)}"
    elif isinstance(value, Tensor):
        yield place, f"tensor {value.dtype} {_shape(value, whole)}"
    else:
        yield place, "None" if value is None else "number" if isinstance(value, int | float) else type(value).__name__


def _shape(tensor: Tensor, whole: bool) -> list[int | str]:
    return [*tensor.shape] if whole or not tensor.dim() else ["any", *tensor.shape[1:]]
