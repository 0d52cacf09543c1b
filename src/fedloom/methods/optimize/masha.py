"""MASHA."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from fedloom.cohort import Each
from fedloom.errors import UsageError
from fedloom.message import Sparse
from fedloom.method import Method, client
from fedloom.ranges import Log
from fedloom.vector import Vector


@dataclass(frozen=True)
class MASHA(Method):
    """Can saddle points be found exactly with messages that are compressed both ways?

    Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov: Distributed Methods with Compressed Communication for Solving
    Variational Inequalities, with Theoretical Guarantees, NeurIPS 2022, arXiv 2110.03313 (MASHA1, MASHA2).

        everybody: zbar = tau z + (1 - tau) w;  z_half = zbar - gamma F(w)
        client m:  MASHA1: send q_m = RandK(F_m(z_half) - F_m(w))
                   MASHA2: u = gamma (F_m(z_half) - F_m(w)) + e_m;  send c_m = TopK(u);  e_m <- u - c_m
        server:    MASHA1: s = RandK(mean q_m);  MASHA2: u = e + mean c_m;  s = TopK(u);  e <- u - s
        everybody: z <- z_half - gamma s  (MASHA2: z_half - s);  with probability 1 - tau:
                   w <- z;  send F_m(w) - F_m(old w) in full;  get F(w) in full

    Departures:
    1. No prox term; w takes the new z, as in the loopless template (some statements of the algorithm copy the old one).
    2. Increments come from the cohort, as in the paper's partial participation; F_m(w) is asked of everybody. A client
       that is not heard goes on from its last w, in F(w) and in its increments, until it is asked and heard again.
    3. Who was not there for a broadcast gets z, w and F(w) in full when next asked.
    4. RandK's coordinates are sent with their values, and charged; a shared seed could replace them.
    5. The paper's step sizes follow from Lipschitz constants; here gamma is a field.

    Identities: keep=1 and refresh=1 is the extragradient method; at the solution what is compressed is zero.
    """

    gamma: Annotated[float, Log(0.01, 1.0)] = 0.1  # gamma: step size; about 0.5 sqrt(1 - tau) / (L sqrt(q)) in practice
    keep: float = 0.25  # K / d: share of the coordinates that are sent
    refresh: float = 0.0  # 1 - tau: probability of a full exchange; 0 stands for K / d, as in the paper
    variant: Literal["masha1", "masha2"] = "masha1"  # unbiased compression, or a contractive one with error feedback

    needs = ("saddle",)
    refuses = {"attack=free_rider": "who did not work has no point to move"}

    def __post_init__(self):
        Method.__post_init__(self)
        if not 0 < self.keep <= 1 or self.refresh > 1:
            raise UsageError(f"masha.keep is {self.keep}, masha.refresh {self.refresh}; shares above 0 and up to 1")

    def setup(self, server, clients):
        server.w, server.error = server.model, server.model.zeros_like()
        server.full = clients.mean(self.begin, w=server.w).full  # F(w)
        server.insync = []  # clients that know z, w and F(w)
        server.behind = []  # clients whose F_m in F(w) is that at an earlier w

    def round(self, server, cohort):
        know = {"z": server.model, "w": server.w, "full": server.full}
        replies = cohort.call(self.half, know=Each({k: None if k in server.insync else know for k in cohort}))
        if not replies:
            return
        mean = sum(up.part.dense() for up in replies) / len(replies)
        part, server.error = self.squeezed(mean, server.error, server)
        server.model = self.moved(part, **know)
        anew = bool(torch.rand((), generator=server.rng("refresh")) < self.probability)
        heard = cohort.where([up.client for up in replies]).call(self.move, part=part, anew=anew)
        server.insync = [up.client for up in heard]
        if anew:
            server.w, server.behind = server.model, list(range(server.population))
        if owing := cohort.clients_by_id(server.behind) if anew else cohort.where(server.behind):
            self.renew(server, owing)

    def renew(self, server, owing):
        """F(w) with the operators at w of those that owe theirs."""
        w = Each({k: None if k in server.insync else server.w for k in owing})
        if replies := owing.call(self.refer, w=w):
            server.full = server.full + len(replies) / server.population * replies.mean().shift
            server.behind = sorted({*server.behind} - {up.client for up in replies})
            heard = owing.clients_by_id(server.insync).call(self.learn, full=server.full)
            server.insync = [up.client for up in heard]

    @client
    def begin(self, client, w):
        client.state["own"] = operator(client, w)
        return {"full": client.state["own"].clone()}

    @client
    def half(self, client, know):
        client.state.update(know or {})
        z, w, full, own = (client.state[name] for name in ("z", "w", "full", "own"))
        increment = operator(client, self.midpoint(z, w, full)) - own
        scaled = increment if self.variant == "masha1" else self.gamma * increment
        part, left = self.squeezed(scaled.flat, client.state.get("error", z.zeros_like()), client)
        client.state["error"] = left
        return {"part": part}

    @client
    def move(self, client, part, anew):
        z = self.moved(part, *(client.state[name] for name in ("z", "w", "full")))
        client.state.update(z=z, w=z if anew else client.state["w"])

    @client
    def refer(self, client, w):
        own = operator(client, client.state["w"] if w is None else w)
        shift, client.state["own"] = own - client.state["own"], own
        return {"shift": shift}

    @client
    def learn(self, client, full):
        client.state["full"] = full

    @property
    def probability(self):
        """1 - tau."""
        return self.refresh or self.keep

    def midpoint(self, z, w, full):
        """z_half."""
        return (1 - self.probability) * z + self.probability * w - self.gamma * full

    def moved(self, part, z, w, full):
        """The new z."""
        half = self.midpoint(z, w, full)
        return half - (self.gamma if self.variant == "masha1" else 1.0) * Vector(part.dense(), z.layout)

    def squeezed(self, flat, error, node):
        """A compressed tensor [d], and what error feedback keeps of it: nothing in MASHA1."""
        count = max(1, round(self.keep * len(flat)))
        if self.variant == "masha1":
            index = torch.randperm(len(flat), generator=node.rng("coordinates"))[:count].to(flat.device)
            return Sparse.of(flat * (len(flat) / count), index), error
        whole = flat + error.flat
        part = Sparse.of(whole, whole.abs().topk(count).indices)
        return part, Vector(whole - part.dense(), error.layout)


def operator(client, z):
    """F_m(z) = (grad_x f_m, -grad_y f_m) on all the client's samples."""
    g = client.grad(z, client.data.all(), statistics=False)
    return g.merge(-1.0 * g.select(client.task.maximised))
