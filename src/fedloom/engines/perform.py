"""What happens at a client when it is asked, in whatever process; and what the server takes its reply for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fedloom import encoding, message
from fedloom.calls import ONCE, RESERVED, SILENT, Call, ClientError, Fields, Outcome
from fedloom.errors import CodecError, Refused, UsageError
from fedloom.mean import Sum, split_weight
from fedloom.message import finite
from fedloom.method import client_function, paced
from fedloom.node import Client
from fedloom.plugin import Plugin, Weights, held_at, plugins_around
from fedloom.random import seeded
from fedloom.site import Site

if TYPE_CHECKING:
    from fedloom.calls import Layer
    from fedloom.message import Value
    from fedloom.method import Method


def decode_reply(site: Site, call: Call, outcome: Outcome) -> dict[str, Value]:
    """A reply as the server takes it, once the layers it went through have undone what they did for the way."""
    reply = outcome.reply
    for layer in reversed(site.layers):
        if call.kind in layer.kinds:
            reply = layer.arrive(call, outcome.client, reply, site)
    return reply


def part_of_mean(
    site: Site, call: Call, outcome: Outcome, weight: str | None, weights: Weights = None
) -> tuple[Mapping[str, Any], float]:
    """What is averaged of a reply, and its weight: the number in its field `weight`, or the server's `weights`."""
    fields, number = split_weight(f"mean of {call.function}", outcome.client, decode_reply(site, call, outcome), weight)
    return fields, number if weights is None else weights[outcome.client]


def weigh_reply(site: Site, call: Call, outcome: Outcome, weight: str | None, weights: Weights = None) -> Sum:
    """A reply times its weight, for a sum that takes it in at once."""
    return Sum.of(*part_of_mean(site, call, outcome, weight, weights), lent=True)


def perform(
    method: Method, site: Site, state: Mapping[str, Value], call: Call, client_id: int, msg: Mapping[str, Value]
) -> Outcome:
    """Runs one client function here and now."""
    layers = [layer for layer in site.layers if call.kind in layer.kinds]
    client, msg, fresh = _received(site, state, call, client_id, msg, layers)
    act = function_at(paced(method, call.pace), client, call, msg)
    try:
        with seeded(*_seed(client)):
            if layers:
                act = partial(replied, site, call, act)
                for layer in layers:
                    act = partial(layer.around, client, call, msg, act)
                reply = act()
            else:
                reply = _as_reply(site, call, act())
        sizes = {} if call.verb in SILENT and not reply else check_reply(reply)
        if fresh and call.kind != "evaluate" and call.verb not in ("exchange", *SILENT):
            kept: Any = client.state.get(ONCE, {})
            client.state[ONCE] = {**kept, **fresh}
    except Exception as error:
        raise ClientError(
            f"client {client_id}, round {call.round}, {method.name()}.{call.function}: "
            f"{_why(error)} [sent: {_shapes(msg)}]"
        ) from error
    logs = {name: sum(_floats(logged)) / len(logged) for name, logged in client.logs.items()}
    remembers = client.state.values_ if client.state.changed else None
    return Outcome(client_id, reply, sizes, logs, client.steps, remembers, labels=client.labels)


def predicted(
    method: Method, site: Site, state: Mapping[str, Value], call: Call, client_id: int, msg: Mapping[str, Value]
) -> tuple[Client, Any]:
    """What the client would use, of the message with which it is judged; of several models the main one.

    It draws the same random numbers as when it is judged. What a plug-in sends beside, to judge with, is not asked for.
    """
    layers = [layer for layer in site.layers if call.kind in layer.kinds]
    client, heard, _ = _received(site, state, call, client_id, msg, layers)
    inner = next(one for one in paced(method, call.pace).nested if type(one).predict is not Plugin.predict)
    names = [*inspect.signature(inner.predict).parameters][1:]
    with seeded(*_seed(client)):
        judged = inner.predict(client, **{name: heard[name] for name in names})
    return client, next(iter(judged.values())) if isinstance(judged, Mapping) else judged


def _seed(client: Client) -> tuple[Any, ...]:
    """What the stream is keyed by that a client function draws from."""
    return client.site.seed, *client.key, "torch"


def _received(
    site: Site,
    state: Mapping[str, Value],
    call: Call,
    client_id: int,
    msg: Mapping[str, Value],
    layers: Sequence[Layer],
) -> tuple[Client, dict[str, Value], dict[str, Value]]:
    """A client with its state, a message as it comes out of some layers, and what of it is new to the client."""
    client = Client(site, client_id, message.deliver(state), call.kind, call.round, call.nth)
    heard = dict(site.to_device(dict(msg)))
    for layer in reversed(layers):
        heard = dict(layer.receive(client, call, heard))
    return client, heard, _recalled(heard, client.state)


def _recalled(msg: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Value]:
    """Puts what the client keeps into a message that names it; gives what is named and came in full."""
    names = msg.pop(ONCE, {})
    fresh: dict[str, Value] = {field: [name, msg[field]] for field, name in names.items() if field in msg}
    for field in names.keys() - fresh.keys():
        msg[field] = state[ONCE][field][1]
    return fresh


def function_at(method: Method, client: Client, call: Call, msg: Mapping[str, Any]) -> Callable[[], Any]:
    """The client function that a call names, with its message, and in a round the plug-ins around it."""
    heard = {name: value for name, value in msg.items() if not name.startswith("_")}  # those are not for the method
    act: Callable[[], Any] = partial(client_function(method, call.function), client, **heard)
    plugins = [*plugins_around(method, call.function, "around")] if call.kind == "train" else []
    if plugins:
        act = partial(replied, client.site, call, act)
    for depth, plugin in reversed(plugins):
        act = partial(_around, plugin, client, call, held_at(depth, msg), act)
    return act


def replied(site: Site, call: Call, act: Callable[[], Any]) -> Fields:
    """What a client function returns when it is called, as a reply."""
    return _as_reply(site, call, act())


def _around(plugin: Plugin, client: Client, call: Call, held: Mapping[str, Any], inner: Callable[[], Fields]) -> Fields:
    """What a plug-in makes of a client function; raises Refused where that goes by what the plug-in changed."""
    own, wraps = client.given, client.wraps

    def observed() -> Fields:
        changed = {"data"} if client.given is not own else set()
        if changed and client.guard:
            client.guard.read(f"the data that {plugin.name()} puts in place of the client's own")
        if client.wraps != wraps:
            changed.add("loss")
        before, steps = dict(client.uses), client.steps
        reply = inner()
        for what in changed:
            used = client.uses[what] > before[what]
            client.site.note_change(plugin, what, used)
            if not used and client.steps > steps:
                raise Refused(without_effect(plugin.name(), what))
        return reply

    client.site.note_change(plugin, "", True)
    return _as_reply(client.site, call, plugin.around(client, observed, **held))


def without_effect(plugin: str, what: str) -> str:
    """Why a plug-in's change at a client is refused: nothing would come of it."""
    return (
        f"{plugin} changes the {what} that clients train with, and the method inside takes gradients without asking "
        "for it; take a method that trains by client.descend, client.grad and client.batches"
    )


def _as_reply(site: Site, call: Call, reply: Any) -> Fields:
    """What a client function returned, as a reply."""
    if not isinstance(reply, dict | None):
        raise TypeError(f"a client function returns a dict of fields or None, not a {type(reply).__name__}")
    if reply and call.verb in SILENT:
        raise UsageError(
            f"it returns {', '.join(map(str, reply))}, and nothing comes back by cohort.{call.verb}; return nothing, "
            "or ask for the reply by cohort.call or cohort.mean"
        )
    return site.to_device(reply or {})


def _why(error: Exception) -> str:
    """What went wrong in a client, in words."""
    if "more than 1 value per channel" in str(error):
        return (
            "BatchNorm cannot train on one row, and the client's rows leave one over for the last batch; take another "
            "batch size (batch=...), or a network without BatchNorm"
        )
    return str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"


def _floats(logged: Sequence[float | torch.Tensor]) -> list[float]:
    """The numbers that a client logged, read from its device all at once."""
    tensors = [number for number in logged if isinstance(number, torch.Tensor)]
    alike = len({(tensor.device, tensor.dtype, tensor.shape) for tensor in tensors}) == 1
    if 1 < len(tensors) == len(logged) and alike and tensors[0].numel() == 1:
        numbers: list[float] = torch.stack(tensors).double().flatten().tolist()
        return numbers
    return [float(number) for number in logged]


def check_reply(reply: dict[str, Value]) -> dict[str, int]:
    """The sizes of a reply that may leave its client."""
    sizes = encoding.sizes(reply)
    for field, value in reply.items():
        if field in RESERVED:
            raise CodecError(f"a reply has no field called {field!r}; choose another name")
        if not finite(value):
            raise ValueError(
                f"the field {field!r} of the reply has NaN or infinite numbers; a lower lr or clipping usually helps"
            )
    return sizes


def _shapes(msg: Mapping[str, Any]) -> str:
    def shape(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if hasattr(value, "layout"):
            return f"Vector[{value.layout.size}]"
        return type(value).__name__

    return ", ".join(f"{name}: {shape(value)}" for name, value in msg.items()) or "nothing"
