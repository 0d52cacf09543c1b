"""Problems whose answers are known, averaging written by hand, and methods that try an engine with workers."""

import contextlib
import copy
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedloom.engines.gather import Gather, Parked
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.node import Client
from fedloom.random import stream
from fedloom.runs.experiment import Experiment
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.site import Bench, Site
from fedloom.task import Batch, Data, Scores, Task
from fedloom.vector import Vector


class Quadratics(Task):
    """Client k has f_k(w) = 0.5 (w - c_k)' H_k (w - c_k), in double precision, from w = 0.

    A sample is a point around c_k and its label the number k. With `noise` the points scatter, with mean c_k; without,
    every batch has the client's full gradient. `sizes` are the numbers of samples.
    """

    classes = 0
    centers = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)
    curvatures = torch.tensor([[[3.0, 1.0], [1.0, 2.0]], [[0.5, 0.0], [0.0, 1.0]]], dtype=torch.float64)

    def __init__(self, sizes: Sequence[int] = (4, 12), noise: float = 0.0) -> None:
        self.population = len(sizes)
        self.sizes = torch.tensor(sizes)
        scatter = noise * torch.randn(sum(sizes), 2, generator=stream(0, "quadratics"), dtype=torch.float64)
        self.spans = [0, *self.sizes.cumsum(0).tolist()]
        for start, stop in zip(self.spans, self.spans[1:], strict=False):
            scatter[start:stop] -= scatter[start:stop].mean(0)
        self.y = torch.arange(self.population).repeat_interleave(self.sizes)
        self.x = self.centers[self.y] + scatter
        self.rows: dict[tuple[int, str], Tensor] = {}  # made once: clients are asked for their data again and again

    def network(self) -> nn.Module:
        return Point()

    def data(self, client: int, split: str) -> Data:
        if (client, split) not in self.rows:
            start, stop = self.spans[client : client + 2]
            self.rows[client, split] = torch.arange(start, stop if split == "train" else start)
        return Data(self.x, self.y, self.rows[client, split])

    def global_test(self) -> Data:
        return Data(self.x, self.y)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        pulls = torch.bmm(self.curvatures[batch.y], outputs.unsqueeze(2)).squeeze(2)
        return (outputs * pulls).sum() * (0.5 / len(outputs))

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        return {"n": len(data), "loss": self.criterion(scores(data.x), data.all()).item(), "accuracy": 0.0}

    def to(self, device: torch.device) -> "Quadratics":
        return self

    def gradient(self, client: int, w: Tensor) -> Tensor:
        """Of f_k at w, a tensor [2]."""
        return self.curvatures[client] @ (w - self.centers[client])

    def balance(self, matrices: Sequence[Tensor]) -> Tensor:
        """The w where sum_k M_k (w - c_k) = 0, a tensor [2]."""
        pulls = sum(m @ c for m, c in zip(matrices, self.centers, strict=False))
        return torch.linalg.solve(sum(matrices), pulls)

    def optimum(self, weights: Sequence[float]) -> Tensor:
        """The minimiser of sum_k weights_k f_k."""
        return self.balance([p * h for p, h in zip(weights, self.curvatures, strict=False)])

    def shrinkage(self, client: int, lr: float, steps: int) -> Tensor:
        """What `steps` steps of descent take off the distance to c_k: I - (I - lr H_k)^steps."""
        one = torch.eye(2, dtype=torch.float64)
        return one - torch.linalg.matrix_power(one - lr * self.curvatures[client], steps)


class Six(Quadratics):
    """Six clients of two curvatures, with centers of their own; few steps go far."""

    centers = 3 * torch.arange(12, dtype=torch.float64).view(6, 2).sin()
    curvatures = torch.tensor([[[2.0, 0.5], [0.5, 1.5]], [[0.8, 0.0], [0.0, 1.2]]], dtype=torch.float64).repeat(3, 1, 1)

    def __init__(self) -> None:
        super().__init__(sizes=(3,) * 6)


def settled_by_those_heard(method: Method, state: str, **fate: object) -> bool:
    """Whether six clients come to the optimum of those that were ever heard, although some replies do not count.

    `state` is what a client remembers once one of its replies has counted.
    """
    task = Six()
    made = ran(method, task, rounds=110, **fate)
    rows = made.record.metrics
    assert sum(row["replies"] for row in rows) < 0.95 * 6 * len(rows), "some do not"
    heard = [float(state in made.engine.states.get(k, {})) for k in range(6)]
    assert sum(heard) >= 3, "and most do"
    return torch.allclose(made.server.model.flat, task.optimum(heard), rtol=0, atol=1e-11)


UNHEARD = (  # worlds in which the server goes on without some of the replies
    {"lost": 0.1},
    {"cohort": 3, "overselect": 1.5},
    {"deadline": 0.036, "speed": "uniform:0.5,1.5"},
)


class Point(nn.Module):
    """A network that is one parameter vector: the output is a sample's offset from it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Identity()
        self.head = Offset()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Offset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w - x


def ran(method: Method, task: Task, rounds: int, **settings: object) -> Experiment:
    """An experiment that has run its rounds: `server`, `engine.states`, `record` and `world` tell what came out."""
    fields = method.to_spec()
    spec = Spec.of({"method": fields, "partition": "given", "rounds": rounds, "eval_every": rounds, **settings})
    made = Experiment(spec, task, method).begin(None)
    made.go()
    return made


def stopped_and_resumed(spec: Spec, task: Task, method: Method, folder: Path, after: int = 1) -> Experiment:
    """An experiment that was stopped after a round and has gone on from its record, in another object."""

    def stop(row: Mapping[str, object]) -> None:
        if row["round"] == after:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        Experiment(spec, task, method).begin(folder).go(stop)
        raise AssertionError(f"there is no round {after} to stop after")
    again = Experiment(spec, task, method).take_up(Run(folder))
    assert 0 < again.done <= after, "it goes on from its last checkpoint"
    again.go()
    return again


@contextlib.contextmanager
def trained_together() -> Iterator[list[int]]:
    """How many clients each descent inside trains as one batch."""
    sizes: list[int] = []
    plain = Gather._descents

    def counted(self: Gather, group: list[Parked], bench: Bench) -> list[tuple[Vector, int]]:
        found = plain(self, group, bench)
        sizes.append(len(group))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gather, "_descents", counted)
        yield sizes


def node(site: Site, client: int, round: int = 1) -> Client:
    """The client as an engine makes it for the first call of a round: it draws the same batches."""
    return Client(site, client, {}, "train", round)


def network(task: Task, w: Vector) -> nn.Module:
    """A network of the task that holds `w`, put together without the library."""
    net = task.network()
    net.load_state_dict({name: w[name].clone() for name in w}, strict=False)
    return net


def descended(net: nn.Module, task: Task, batches: Sequence[Batch], lr: float, only: str = "") -> nn.Module:
    """A copy of a network after a step of torch's own SGD on each batch, of the parameters whose names begin so."""
    net = copy.deepcopy(net).train()
    chosen = [p for name, p in net.named_parameters() if name.startswith(only)]
    optimizer = torch.optim.SGD(chosen, lr=lr)
    for batch in batches:
        optimizer.zero_grad()
        task.loss(net, batch).backward()
        optimizer.step()
    return net


def sharpness_aware(net: nn.Module, task: Task, batches: Sequence[Batch], lr: float, rho: float) -> nn.Module:
    """A copy of a network after a SAM step on each batch, whose running statistics only the first of two passes moves.

    The step is along the gradient where the loss has risen by a step of length `rho` along its own gradient.
    """
    net = copy.deepcopy(net).train()
    for batch in batches:
        first = torch.autograd.grad(task.loss(net, batch), list(net.parameters()))
        length = torch.cat([g.flatten() for g in first]).norm()  # of all parameters together
        raised = copy.deepcopy(net)
        with torch.no_grad():
            for p, g in zip(raised.parameters(), first, strict=True):
                p += rho * g / length
        second = torch.autograd.grad(task.loss(raised, batch), list(raised.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), second, strict=True):
                p -= lr * g
    return net


def averaged_by_hand(
    task: Task,
    rounds: int,
    lr: float,
    epochs: int,
    batch: int,
    kept: str = "nothing",
    arrives: Callable[[int, int], bool] = lambda round, client: True,
) -> list[dict[str, Tensor]]:
    """FedAvg with state dicts and torch.optim.SGD: what each client holds after the last average.

    Names that begin with `kept` stay with their client. `arrives(round, client)` tells whether a reply does.
    """
    site = Site(task, seed=0)
    start = network(task, site.initial)
    nets = [copy.deepcopy(start) for _ in range(task.population)]
    for round in range(1, rounds + 1):
        nets = [
            descended(net, task, list(node(site, k, round).batches(batch, epochs)), lr) for k, net in enumerate(nets)
        ]
        heard = [k for k in range(task.population) if arrives(round, k)]
        total = sum(len(task.data(k, "train")) for k in heard)
        held = [net.state_dict() for net in nets]
        for name, value in start.state_dict().items():
            if value.is_floating_point() and not name.startswith(kept):
                mean = sum(len(task.data(k, "train")) / total * held[k][name] for k in heard)
                for state in held:
                    state[name].copy_(mean)
    return [net.state_dict() for net in nets]


def close(vector: Vector, state: dict[str, Tensor], atol: float = 1e-6) -> bool:
    """Whether a vector agrees with a state dict, entry by entry."""
    return all(torch.allclose(vector[name], state[name], rtol=0, atol=atol) for name in vector)


@dataclass(frozen=True)
class Mortal(FedAvg):
    """A client that kills its worker the first `times` it is asked, leaving a mark in a file."""

    marks: str = ""
    times: int = 1

    @client
    def local(self, client, model):
        marks = Path(self.marks)
        if client.id == 2 and len(list(marks.iterdir())) < self.times:
            (marks / str(time.time_ns())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return FedAvg.local(self, client, model)


@dataclass(frozen=True)
class Streaming(FedAvg):
    """Stops listening to a stream half way, and speaks to others meanwhile."""

    def round(self, server, cohort):
        for heard, reply in enumerate(cohort.stream(self.local, model=server.model)):
            inner = cohort.where([0, 1]).mean(self.local, weight="n", model=server.model + reply.delta)
            server.model = server.model + 0.5 * inner.delta
            if heard == 1:
                break
