"""KAFAL."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch.nn import functional as F

from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Linear, Positive
from fedloom.task import Data

AT_ONCE = 1000  # samples of a pool in one forward pass


@dataclass(frozen=True)
class KAFAL(Method):
    """Which samples should clients have labelled within a budget, and how to learn from the skewed labels they get?

    Cao, Shi, Yu, Wang, Tao: Knowledge-Aware Federated Active Learning with Non-IID Data, ICCV 2023, arXiv 2211.13579
    (official code ycao5602/KAFAL).

        c_k: label counts of client k;  a cycle is R rounds, of which everybody takes part in the last
        client k:  local SGD on labelled (x, y) and, from a cycle's second round on, unlabelled u (KCFU):
                     CE(w_k(x) + log c_k, y)  +  mean_i s_i / C  KL(w(v_i) || w_k(v_i));    v = b u + (1 - b) pi(u)
                     s = b omega_g + (1 - b) omega_pi(g),  g: what w says of u,  omega_c ~ 1 / c_k,  b ~ Beta(2, 2)
                   send w_k - w;        server:  w <- w + mean of it, weighted by labels
        between:   client k asks for the labels of a share of its samples: those of its pool where w_k and w, both with
                   log c_k added to their scores, differ most:  (KL(p_k || p) + KL(p || p_k)) / 2   (KSAS)
                   the next cycle begins with a fresh w

    Departures:
    1. g is what the teacher says of the mixed samples, and the partner's is that of the partner's mixed sample, as in
       the official code. That draws one partner for the whole batch; here every sample has its own (a permutation).
    2. Classes that a client has no label of are left out of the scores; in the official code their log 0 leaves this
       to how torch multiplies 0 by infinity.
    3. The teacher is in evaluation mode. Plain SGD, without the official code's momentum and weight decay.
    4. A fresh w is the run's initial one, not a new draw. Ties of scores are broken at random. Labels are asked for as
       a cycle begins that trains on them, so that the last cycle is not followed by a purchase; who could not be
       reached then asks for more the next time.

    Identities: sampling=random and update=plain is FedAvg on the labels there are, bitwise until the first are asked
    for; equal counts leave the plain cross-entropy and the plain divergence; equal models differ nowhere.
    """

    lr: LearningRate = 0.1  # learning rate, as in the official code
    epochs: Positive[int] = 1  # local epochs; the official code takes 40
    batch: int = 10  # labelled, and unlabelled, samples in a step; the official code takes 128
    cycle: Positive[int] = 6  # R: rounds in a cycle; the official code takes 50
    share: Annotated[float, Linear(0.0, 1.0)] = 0.05  # of a client's samples labelled a cycle, as in the official code
    sampling: Literal["ksas", "entropy", "random"] = "ksas"  # what is asked for; entropy: of w
    update: Literal["kcfu", "plain"] = "kcfu"  # plain: cross-entropy on the labelled samples alone
    restart: bool = True  # whether a cycle begins with a fresh model, as in the official code

    compressible = ("delta",)
    private = ("delta",)
    refuses = {
        "dp=sample": "unlabelled samples are in its loss beside those of the batch",
        "optimizer": "it takes single steps, between which an optimizer would forget",
    }
    needs = ("oracle",)

    def setup(self, server, clients):
        server.cycle, server.taught = 1, False  # the cycle that the model is of, and whether a round has taught it
        if self.update == "kcfu" and not server.task.global_test().inputs.is_floating_point():
            raise UsageError("kafal mixes inputs, which must be numbers, and these are not; take method.update=plain")

    def select(self, server, clients):
        return clients if server.round % self.cycle == 0 else None

    def round(self, server, cohort):
        now = 1 + (server.round - 1) // self.cycle
        if now > server.cycle:
            cohort.everybody.tell(self.sample, model=server.model, cycles=now - 1)
            server.cycle = now
            if self.restart:
                server.model, server.taught = server.initial, False
        up = cohort.mean(self.local, weight="n", model=server.model, teaches=server.taught)
        server.model, server.taught = server.model + up.delta, True

    @client
    def local(self, client, model, teaches):
        pool, counts, draw = client.pool, self.counts(client), client.rng("mixing")
        steps = client.count(self.batch, self.epochs) if teaches and self.update == "kcfu" and len(pool) else 0
        more = client.batches(self.batch, steps=steps, data=pool) if steps else iter(())
        w = model
        for batch in client.batches(self.batch, self.epochs):
            loss, u = None, next(more, None)
            if self.update == "kcfu":
                hints = None if u is None else self.hints(client, model, u.x, counts, draw)
                loss = partial(compensated, task=client.task, prior=counts.log(), hints=hints)
            w, _ = client.descend(w, lr=self.lr, steps=1, loss=loss, data=Data.of(batch))
        client.state["model"] = w
        return {"delta": w - model, "n": client.n}

    def hints(self, client, model, u, counts, draw):
        """Mixed samples [B, ...], what the global model says of them [B, C], and how much each counts [B]."""
        # The middle one of three uniform numbers has the distribution Beta(2, 2).
        b = torch.rand(3, len(u), generator=draw).median(0).values.to(u, non_blocking=True)
        partner = torch.randperm(len(u), generator=draw).to(u.device, non_blocking=True)
        wide = b.view(-1, *[1] * (u.dim() - 1))
        v = wide * u + (1 - wide) * u[partner]
        with torch.no_grad():
            said = client.scores(model, v).softmax(1)
        omega = torch.where(counts > 0, 1 / counts, 0.0)
        weight = (omega / omega.sum())[said.argmax(1)]
        return v, said, b * weight + (1 - b) * weight[partner]

    @client
    def sample(self, client, model, cycles):
        pool, counts = client.pool, self.counts(client)
        whole = client.n + len(pool)
        few = min(cycles * math.ceil(self.share * whole) - client.asked, client.labels_left)
        order = torch.randperm(len(pool), generator=client.rng("sampling")).to(pool.inputs.device)
        if self.sampling != "random" and few > 0:
            asked = (self.scores(client, model, piece.x, counts) for piece in pool.pieces(AT_ONCE))
            order = order[torch.cat(list(asked))[order].argsort(descending=True, stable=True)]
        client.ask(order[: max(0, few)])

    def scores(self, client, model, x, counts):
        """How much is to be learned from the labels of samples, [B]."""
        with torch.no_grad():
            if self.sampling == "entropy":
                said = client.scores(model, x).log_softmax(1)
                return -(said.exp() * said).sum(1)
            own = client.state.get("model", model)
            return discrepancy(client.scores(own, x), client.scores(model, x), counts)

    def counts(self, client):
        """How many labels of every class the client has, [C]."""
        return torch.bincount(client.data.y, minlength=client.task.classes).to(client.initial.flat)


def compensated(net, batch, task, prior, hints):
    """The loss of scores with the log-prior [C] added, and the pull toward what the global model says of mixtures."""
    value = task.criterion(net(batch.x) + prior, batch)
    if hints is None:
        return value
    v, said, weight = hints
    return value + (weight * F.kl_div(net(v).log_softmax(1), said, reduction="none").mean(1)).mean()


def discrepancy(one, other, counts):
    """The symmetric divergence [B] of two models' scores [B, C], specialised to the classes that have counts [C]."""
    here = counts > 0
    p, q = ((scores[:, here] + counts[here].log()).log_softmax(1) for scores in (one, other))
    return ((p.exp() - q.exp()) * (p - q)).sum(1) / 2
