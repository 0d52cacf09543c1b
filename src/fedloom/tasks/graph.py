"""Node classification on a graph that is cut into communities: each client has one, and the edges inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedloom.data.graph import Graph, Graphs, communities, halves, planted, read
from fedloom.data.partition import Federation
from fedloom.data.shards import PerClient, Shards, ranks
from fedloom.errors import UsageError
from fedloom.random import stream
from fedloom.task import Data
from fedloom.tasks.classification import Classification

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec

TRAIN, VALIDATION, TEST = range(3)
PLANTED = 60  # nodes of a planted community
NOT_READ = (  # settings that deal rows
    *("partition", "validation", "test_share", "public", "shared_data"),
    *("label", "exclude", "keep", "metadata", "missing"),
)


@dataclass(frozen=True)
class Communities(Classification):
    """Clients hold subgraphs; a sample is a node, and its input the node's number in `graphs`.

    The last of `graphs` is the whole one: on its test nodes, with all edges, the global model is judged, while a
    client sees nothing but its own subgraph. Transductive: nodes of all splits are in the graph while it learns, labels
    of the training nodes alone. Any batch of a client's nodes is computed on its whole subgraph, so that every method
    for labelled samples runs as it is.
    """

    graphs: Graphs

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | {"graph"}

    def build(self, model: str) -> nn.Module:
        from fedloom.nets.gcn import build

        return build(model, self.graphs, self.classes)

    def recipe(self) -> None:
        return None  # the network has the graph in it, which is no one's to hand out

    def global_test(self) -> Data:
        f = self.federation
        nodes = torch.cat(self.graphs.nodes)[f.test.rows].unique()
        return Data(f.x, f.y, self.graphs.starts[-2] + nodes)

    def to(self, device: torch.device) -> Communities:
        if self.federation.x.device == device:
            return self
        return replace(self, federation=self.federation.to(device), graphs=self.graphs.to(device))


def dealt(graph: Graph, parts: Sequence[Tensor], roles: Tensor, model: str, source: str, how: str) -> Communities:
    """The task whose client k has the part k (int64 [n]) of a graph; `roles` [N] tell which split a node is in."""
    graphs = Graphs.of(graph, [*parts, torch.arange(len(graph))])
    nodes = torch.cat(graphs.nodes)
    owner = torch.full((len(nodes),), -1)
    owner[: graphs.starts[-2]] = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p) for p in parts]))
    train, validation, test = (
        Shards.from_owner(owner.where(roles[nodes] == role, -1), len(parts)) for role in (TRAIN, VALIDATION, TEST)
    )
    if not train.sizes.all():
        raise UsageError(
            f"{source}: client {int(train.sizes.argmin())} of {len(parts)} has no node to train on; take fewer clients "
            "or a larger share train="
        )
    federation = Federation(
        source=source,
        kind="graph",
        classes=tuple(map(str, range(int(graph.y.max()) + 1))),
        vocabulary=(),
        partition=how,
        x=torch.arange(len(nodes)),
        y=graph.y[nodes],
        train=train,
        validation=validation,
        test=test,
        public=torch.empty(0, dtype=torch.int64),
        names=PerClient(str, len(parts)),
        notes=PerClient(partial(_note, graphs), len(parts)),
    )
    task = Communities(federation, model, graphs)
    task.network()  # a network that does not fit is told now
    return task


def _note(graphs: Graphs, client: int) -> str:
    nodes = len(graphs.nodes[client])
    return f"{nodes} nodes, {(graphs.adjacency[client]._nnz() - nodes) // 2} edges"


def build(
    spec: Spec,
    source: str = "",
    cut: str = "louvain",
    overlap: int = 1,
    train: float = 0.2,
    test: float = 0.4,
    whole: bool = False,
    scale: bool = True,
) -> Communities:
    """The problem of a run's settings: `graph` reads the .npz that `data` names, `graph:sbm` plants a graph.

    `cut`: louvain or metis, into as many communities as clients. `overlap=5`: a fifth as many, each of which five
    clients know a random half of. Of each community's nodes the shares `train` and `test` are for training and test,
    the others for validation. `whole=true` keeps also what does not hang together with the largest component;
    `scale=false` leaves a file's features at a sum of 1 a node. Defaults as in FED-PUB [arXiv 2206.10206], but for the
    cut, which there is metis, and the scale, which there is false.
    """
    _refuse(spec)
    clients = spec.clients or 10
    if overlap < 1 or clients % overlap:
        raise UsageError(f"problem {spec.problem!r}: {clients} clients are no multiple of overlap={overlap}")
    if min(train, test) <= 0 or train + test > 1:
        raise UsageError(
            f"problem {spec.problem!r}: train={train} and test={test}; expected shares above 0, up to 1 together"
        )
    if source == "sbm":
        graph, _ = planted((PLANTED,) * max(2, clients // overlap), seed=spec.seed)
    elif source:
        raise UsageError(f"problem {spec.problem!r}: expected graph:sbm, or graph with data=FILE.npz")
    else:
        graph = read(spec.data, scale)
    graph = graph if whole else graph.largest_component()
    parts = communities(graph, clients // overlap, cut, spec.seed)
    roles = split(parts, train, test, spec.seed)
    how = f"{cut}, overlap={overlap}"
    return dealt(graph, halves(parts, overlap, spec.seed), roles, spec.model or "gcn", source or spec.data, how)


def _refuse(spec: Spec) -> None:
    """A setting that a graph does not read would be a silent mistake."""
    plain = type(spec)()
    for name in NOT_READ:
        if getattr(spec, name) != getattr(plain, name):
            raise UsageError(
                f"problem {spec.problem!r} does not read {name}={getattr(spec, name)}; a graph is dealt by "
                "problem=graph:cut=louvain,overlap=1,train=0.2,test=0.4"
            )


def split(parts: Sequence[Tensor], train: float, test: float, seed: int) -> Tensor:
    """The role [N] of each node: of every part the shares `train` (of at least one node) and `test`, at random."""
    owner = torch.empty(sum(map(len, parts)), dtype=torch.int64)
    for k, nodes in enumerate(parts):
        owner[nodes] = k
    rank = ranks(owner, len(parts), stream(seed, "data", "graph", "split"))
    size = torch.tensor([len(nodes) for nodes in parts])[owner]
    first = (size * train).round().clamp(min=1)
    roles = torch.full_like(owner, VALIDATION)
    roles[rank < first + (size * test).round()] = TEST
    roles[rank < first] = TRAIN
    return roles


def toy(sizes: Sequence[int] = (30, 20, 25, 35), norm: bool = False) -> Communities:
    """A small one, for the contract of methods: community k has `sizes[k]` nodes to train on, 6 and 12 others."""
    graph, community = planted([n + 18 for n in sizes], classes=3, width=6, noise=0.5)
    parts = [(community == k).nonzero().flatten() for k in range(len(sizes))]
    roles = torch.full((len(graph),), TRAIN)
    for k, nodes in enumerate(parts):
        order = nodes[torch.randperm(len(nodes), generator=stream(0, "toy", "graph", k))]
        roles[order[:6]], roles[order[6:18]] = VALIDATION, TEST
    return dealt(graph, parts, roles, "gcn:8", "toy", "planted")
