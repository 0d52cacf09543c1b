"""Somebody with data, a network and a random stream: the server and the clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from fedloom import encoding, message
from fedloom.asking import Asking
from fedloom.bench import Joint
from fedloom.descent import Descent, Loss, Only, Slope, Wrap, Wrapped
from fedloom.errors import Refused, UsageError, unknown
from fedloom.holder import Holder
from fedloom.optimizers import SGD, Linear, Optimizer
from fedloom.phases import Scheduled
from fedloom.random import drawn_so_far, go_on
from fedloom.site import Site
from fedloom.state import State
from fedloom.task import Batch, Data, by_name
from fedloom.vector import Vector

if TYPE_CHECKING:
    from fedloom.message import Value

Correction = Vector | Callable[[Vector], Vector]
Nets = Mapping[str, Vector]  # several networks, by names of one's own
PLAIN = SGD()
JointCorrection = Nets | Callable[[dict[str, Vector]], Nets]


class Node(Holder):
    """Somebody with data, a network and a random stream: takes gradients and descends."""

    optimizer: Optimizer | None = None  # what makes the steps of its descents, by the run's setting; None: plain SGD

    @overload
    def grad(
        self, w: Vector, batch: Batch, loss: Loss | None = None, only: Only = None, statistics: bool = True
    ) -> Vector: ...

    @overload
    def grad(
        self, w: Nets, batch: Batch, loss: Loss | None = None, only: Only = None, statistics: bool = True
    ) -> dict[str, Vector]: ...

    def grad(
        self, w: Vector | Nets, batch: Batch, loss: Loss | None = None, only: Only = None, statistics: bool = True
    ) -> Vector | dict[str, Vector]:
        """The gradient of the batch's mean loss at `w`, in the layout of `w`, with zeros in the buffer segment.

        The forward pass is in training mode. It moves the running statistics of `w` in place, as in PyTorch, unless `w`
        is `readonly` (it came in a message, or is remembered): `w = w - lr * client.grad(w, batch)` trains BatchNorm.
        With `statistics=False` it moves none, wherever they are kept: for a further look at a batch that has trained.
        `only` is a shell pattern of the parameters to differentiate (`head.*`); the others get zeros.

        Of several networks, `{name: vector}`, the gradients come by name: see `descend`.
        """
        if isinstance(w, Mapping):
            joint, whole = self._joined(w, loss)
            gradient = joint.split(self.grad(whole, batch, loss, only, statistics))
            for name, after in joint.split(whole).items():
                if not w[name].readonly:
                    w[name].flat[after.layout.split :] = after.buffers.flat
            return gradient
        job = Slope(w, batch, self._losing(loss), only, statistics)
        if (gather := self.site.gather) and not self.guard:
            return gather.grad(self, job)
        bench = self._loaded(job.w, train=True)
        chosen = bench.choose(job.only)
        params = [bench.params[p] for p in chosen]
        grads: Any
        if self.guard:
            value, grads = self.guard.gradient(self, bench.net, params, job.loss, job.batch)
        else:
            value = job.loss(bench.net, job.batch)
            grads = torch.autograd.grad(value, params, materialize_grads=True)
        self.meter(1, len(job.batch))
        self.log(loss=value)
        flat = bench.gradient(grads, chosen)
        if job.statistics:
            moved = self._statistics(job.w)
            if not job.w.readonly:
                job.w.flat[bench.layout.split :] = moved
        return Vector(flat, job.w.layout)

    @overload
    def descend(self, w: Vector, lr: float | Linear, *args: Any, **kwargs: Any) -> tuple[Vector, int]: ...

    @overload
    def descend(self, w: Nets, lr: float | Linear, *args: Any, **kwargs: Any) -> tuple[dict[str, Vector], int]: ...

    def descend(
        self,
        w: Vector | Nets,
        lr: float | Linear,
        epochs: int | None = None,
        steps: int | None = None,
        batch: int | None = None,
        loss: Loss | None = None,
        correct: Correction | JointCorrection | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        clip: float | None = None,
        only: Only = None,
        data: Data | None = None,
        optimizer: Optimizer | None = None,
    ) -> tuple[Vector | dict[str, Vector], int]:
        """Stochastic gradient descent from `w`: the new vector, and the number of steps taken.

        A step is `w -= lr * d` with `d = clipped gradient + correct + weight_decay * w`, through a heavy ball
        `m = momentum * m + d` if there is momentum, or what an `optimizer` of `fedloom.optimizers` makes of `d`.
        `lr` may fall within the descent: `Linear(start, end)`. `correct` is a vector added to every gradient (in the
        layout of `w` or of its parameters), or a function from the current `w` to one. `clip` bounds the Euclidean
        length of the gradient of the loss. `only` is a shell pattern of the parameters that move. Batches as in
        `batches`.

        Several networks, `{name: vector}`, descend together on one loss of all of them, which gets them by name too:
        `loss(nets, batch)`, `nets["gate"]`. The new vectors come by name; `correct` is then by name, or a function of
        the vectors by name; in `only` their parameters are `gate.*`.
        """
        joint, term = None, correct
        if isinstance(w, Mapping):
            joint, w = self._joined(w, loss)
            term = joint.correction(correct)
        rule = self._optimizer(optimizer, momentum)
        loss = self._losing(loss)
        job = Descent(w, lr, epochs, steps, batch, loss, term, rule, weight_decay, clip, only, data)  # type: ignore[arg-type]
        if (gather := self.site.gather) and not self.guard:
            reached, taken = gather.descend(self, job)
            return (joint.split(reached) if joint else reached), taken
        bench = self._loaded(job.w, train=True)
        chosen = bench.choose(job.only)
        params, views = [bench.params[p] for p in chosen], [bench.views[p] for p in chosen]
        fixed = [bench.parts(job.correct, chosen)] if isinstance(job.correct, Vector) else []
        here = Vector(bench.flat, bench.layout, readonly=True)
        total = self.count(job.batch, job.epochs, job.steps, job.data) if isinstance(job.lr, Linear) else 0
        moving = [view[None] for view in views] if rule.clients_apart else views
        memory = rule.start(moving)
        losses: list[Tensor] = []
        samples = 0
        for piece in self.batches(job.batch, job.epochs, job.steps, job.data):
            d: Any
            drawn = drawn_so_far() if rule.looks_back else []
            if self.guard:
                value, d = self.guard.gradient(self, bench.net, params, job.loss, piece)
            else:
                value = job.loss(bench.net, piece)
                d = torch.autograd.grad(value, params, materialize_grads=True)
            terms = [bench.parts(job.correct(here), chosen)] if callable(job.correct) else fixed
            d = job.direction(views, job.clipped(d), terms)
            again = partial(self._direction_at, job, piece, drawn) if rule.looks_back and losses else None
            d = [g[None] for g in d] if rule.clients_apart else d
            rule.step(moving, d, job.rate(len(losses), total), memory, again)
            del d  # before the next ones are made: of a large network there is no room for both
            losses.append(value.detach())
            samples += len(piece)
        self.meter(len(losses), samples)
        if losses:
            self.log(loss=torch.stack(losses).mean())
        flat = bench.flat.clone()
        flat[bench.layout.split :] = self._statistics(job.w)
        reached = Vector(flat, job.w.layout)
        return (joint.split(reached) if joint else reached), len(losses)

    def _losing(self, loss: Loss | None) -> Loss:
        """What a gradient is of: the loss that was given, or the task's."""
        return loss or self.task.loss

    def _direction_at(self, job: Descent, piece: Batch, drawn: Any, points: Sequence[Tensor]) -> list[Tensor]:
        """A batch's direction at other points [1, ...], with the draws (dropout) that it had where the descent is now.

        It moves no running statistics, and is counted as a gradient.
        """
        bench = self.site.bench_of(job.w)
        chosen = bench.choose(job.only)
        views, params = [bench.views[p] for p in chosen], [bench.params[p] for p in chosen]
        kept, now = bench.flat.clone(), drawn_so_far()
        go_on(drawn)
        for view, point in zip(views, points, strict=True):
            view.copy_(point[0])
        d = job.clipped(torch.autograd.grad(job.loss(bench.net, piece), params, materialize_grads=True))
        term: Any = (
            job.correct(Vector(bench.flat, bench.layout, readonly=True)) if callable(job.correct) else job.correct
        )
        d = job.direction(views, d, [] if term is None else [bench.parts(term, chosen)])
        bench.flat.copy_(kept)
        go_on(now)
        self.meter(1, len(piece))
        return [g[None] for g in d]

    def _optimizer(self, own: Optimizer | None, momentum: float) -> Optimizer:
        """What makes the steps: what the method asks for, or else the setting `optimizer`."""
        if momentum and own:
            raise UsageError(f"a descent has momentum={momentum} or an optimizer ({own}), not both")
        own = own or (SGD(momentum) if momentum else None)
        if own and self.optimizer and own != self.optimizer:
            raise Refused(f"optimizer={self.optimizer}: this method has an optimizer of its own, {own}")
        return own or self.optimizer or PLAIN

    def _joined(self, nets: Nets, loss: Loss | None) -> tuple[Joint, Vector]:
        """Several networks as one, and their vectors."""
        if loss is None:
            raise UsageError(
                f"the networks {', '.join(nets)} descend on a loss of all of them: give loss=f(nets, batch)"
            )
        joint = self.site.joint(nets)
        return joint, joint.join(nets)


class Client(Asking, Node):
    """A node with private data: `id`, `n` (training samples), `info` (what it registered), `state`.

    Examples:
        >>> from fedloom.site import Site
        >>> from fedloom.tasks.toy import Toy
        >>> client = fedloom.Client(Site(Toy(), seed=0), id=2, state={})
        >>> client.n
        25
        >>> w, steps = client.descend(client.initial, lr=0.1, epochs=1, batch=10)
        >>> steps, w.layout == client.initial.layout
        (3, True)
    """

    def __init__(
        self, site: Site, id: int, state: Mapping[str, Value], kind: str = "train", round: int = 0, nth: int = 0
    ) -> None:
        super().__init__(site, ("client", id, kind, round, nth), round)
        self.id = id
        self.state = State(site, state)
        self.given: Data | None = None  # training data in place of its own: an attacker's, a plug-in's, the server's
        self.wraps: tuple[Wrap, ...] = ()  # around every loss, the outermost first
        self.uses = {"data": 0, "loss": 0, "optimizer": 0}  # how often what was put in place of its own was asked for

    @property
    def memory(self) -> State:
        return self.state

    @property
    def own(self) -> Data:
        self.uses["data"] += 1
        return self._training()

    @property
    def n(self) -> int:
        """Number of training samples."""
        return len(self._training())

    def _training(self) -> Data:
        if self.given is not None:
            return self.given
        return self._with_asked(self.site.task_at(self.round).data(self.id, "train"))

    def wrap_loss(self, wrap: Wrap) -> None:
        """From now on every gradient that the client takes is of `wrap(loss, net, batch)` in place of its loss.

        So for a plug-in, see `Plugin.around`: `loss(net, batch)` is the task's, or whatever loss the method gives to
        `grad` and `descend`, with wraps that come later inside it. A bound method of the plug-in is one loss for all
        clients, so that these still train as one batch under `vectorized`; a function made for each client is not.
        """
        self.wraps = (*self.wraps, wrap)

    def _optimizer(self, own: Optimizer | None, momentum: float) -> Optimizer:
        rule = super()._optimizer(own, momentum)
        self.uses["optimizer"] += rule is self.optimizer
        return rule

    def _losing(self, loss: Loss | None) -> Loss:
        whole = super()._losing(loss)
        if self.wraps and not isinstance(whole, Wrapped):  # a job that was put off comes back with the wraps on
            self.uses["loss"] += 1
            for wrap in reversed(self.wraps):
                whole = Wrapped(wrap, whole)
        return whole

    @property
    def info(self) -> Mapping[str, Any]:
        return self.task.info(self.id)

    def evaluate(self, judged: Any, split: str = "test") -> dict[str, float]:
        """The task's measures of what is judged (see `judge`) on the client's own `train`, `validation` or `test` data.

        Only `n` if that is empty.
        """
        if self.guard:
            self.guard.read("client.evaluate")
        if self.site.blind and split == "test":
            return {"n": 0}
        data = self.task.data(self.id, split)
        return self.judge(judged, data) if len(data) else {"n": 0}


class Server(Node, Scheduled):
    """The server's node: `model`, `round`, `population`, public data, and the values that the method declares on it.

    Setting an attribute in `setup` declares a server value: a message value, kept in checkpoints, whose vectors are
    `readonly`. From then on only what is declared can be set: `None` declares what has no value yet.

    Examples:
        >>> from fedloom.site import Site
        >>> from fedloom.tasks.toy import Toy
        >>> server = fedloom.Server(Site(Toy(), seed=0), population=4)
        >>> server.control = server.model.zeros_like()
        >>> list(server.values)
        ['model', 'control']
    """

    values: dict[str, Any]

    def __init__(self, site: Site, population: int) -> None:
        super().__init__(site, ("server", 0), 0)
        self.population = population
        self.declaring = True
        self.values = {}  # the last attribute of the node itself: what is set from here on is a server value
        self.model = Vector(site.initial.flat.clone(), site.initial.layout)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or "values" not in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            if hasattr(type(self), name):
                raise UsageError(f"server.{name} is the node's own; give the server value another name")
            if name not in self.values and not self.declaring:
                raise UsageError(
                    f"{unknown('server value', name, self.values)}; a new one is declared in setup(self, server, "
                    f"clients): server.{name} = ..., or None until it has a value"
                )
            encoding.check({name: value}, "server")
            self.values[name] = message.deliver(self.site.to_device(value))

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("values", {})
        if name in values:
            return values[name]
        if name.startswith("__"):
            raise AttributeError(name)
        raise unknown("server value", name, values)

    @property
    def memory(self) -> dict[str, Any]:
        return self.values

    def begin(self, kind: str, round: int) -> None:
        """Names the streams of the coming step."""
        self.key, self.round, self.task = ("server", kind, round), round, self.site.task_at(round)
        self.draws, self.logs, self.steps, self.samples = {}, {}, 0, 0
        self.declaring = kind == "setup"

    def state(self) -> dict[str, Any]:
        """What stands in the head of a checkpoint: nothing, for its values are a frame."""
        return {}

    def frames(self) -> Iterator[bytes]:
        """Its values, as one message."""
        yield encoding.encode(self.values)

    def restore(self, state: Mapping[str, Any], frames: Iterator[dict[str, Any]]) -> None:
        """Takes up the values that `frames` gave."""
        values = next(frames)
        self.values.clear()
        self.values.update((name, message.moved(value, self.site.device)) for name, value in values.items())

    @property
    def own(self) -> Data:
        public = self.task.public()
        if public is None:
            raise UsageError("this task has no public data at the server; give `data=`, or choose a task that has some")
        return public

    def evaluate(self, judged: Any) -> dict[str, float]:
        """The task's measures of what is judged (see `judge`) on the global test; on further ones as `accuracy@TEST`.

        Of several models and several tests there are `accuracy@MODEL`, `accuracy@TEST` and `accuracy@MODEL@TEST`.
        """
        found = self.judge(judged, self.task.global_test())
        tests, where = self.task.global_tests(), f"{type(self.task).__name__}.global_tests"
        for name, data in (by_name(tests, where) if tests else tests).items():
            if isinstance(judged, Mapping) and name in judged:
                raise UsageError(f"{where} and what is judged both have the name {name!r}; rename one of them")
            if not len(data):
                raise UsageError(f"{where} has no samples under {name!r}; leave it out")
            also = self.judge(judged, data)
            found |= {f"{measure}@{name}": value for measure, value in also.items() if measure != "n"}
        return found
