"""HeteRo-Select."""

from dataclasses import dataclass
from math import log
from typing import Annotated

import torch

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class HeteroSelect(Method):
    """Choosing by loss climbs fast and then falls: does a score with fairness, absence and diversity keep what it won?

    Masud, Jahin, Hasan: Stabilizing Federated Learning under Extreme Heterogeneity with HeteRo-Select, 2025,
    arXiv 2508.06692.

        everybody:  F_k(w) on a few batches;   send it
        server:     V = minmax(F);   D = clip(1 - cos(u_k, mean u), 0, 1);   Fair = clip(1 - c_k / mean c, -1, 1)
                    St = minmax(ln(1 + t - l_k));      S = minmax(V + 0.3 D + 0.2 Fair + 0.2 St)
                    m clients without replacement, with chances softmax(S / tau_t),  tau_t = tau (1 - t / 2T)
        chosen:     FedProx steps with clipped gradients;   send w_k - w
        server:     w <- w + mean by samples;    mean u <- 0.9 mean u + 0.1 mean_k (w_k - w), the first as it is

    Departures:
    1. The formulas are those of the authors' later code, the weights of the average those of the first version.
    2. The cosine is taken when u_k arrives, so the server keeps one number of it.
    3. Who does not answer with a loss is not chosen. A method does not know T: it is a field.
    4. St has no factor in front of the logarithm: min-max takes any away.
    5. Learning rates that grow with the score, server momentum and compression of updates are left out.

    Identities: all weights 0: a uniform draw, with mu=0 FedAvg; only V and tau near 0: those with the highest loss.
    """

    lr: LearningRate = 0.05  # eta: as in the paper
    epochs: Positive[int] = 1  # local epochs; the paper takes 50 steps
    batch: int = 10  # local batch size
    mu: Annotated[float, Log(1e-3, 1.0)] = 0.1  # mu: FedProx's pull, as in the paper
    clip: float = 2.0  # largest length of a gradient, as in the authors' code
    chosen: int = 10  # m: clients in a round, as in the paper (10 of 100)
    looks: int = 8  # batches that F_k is of, as in the authors' code
    by_loss: float = 1.0  # weight of V, as in the authors' code (so are the next four)
    by_diversity: float = 0.3  # of D
    by_fairness: float = 0.2  # of Fair
    by_absence: float = 0.2  # of St
    tau: Annotated[float, Log(0.1, 10.0)] = 1.0  # tau_0
    horizon: int = 100  # T: rounds until the temperature is half of it

    compressible = ("delta",)
    refuses = {"cohort": "it chooses by itself; set chosen", "participation": "it chooses by itself"}

    def setup(self, server, clients):
        server.times = [0] * server.population  # c
        server.last = [0] * server.population  # l
        server.apart = [0.5] * server.population  # D; one half where nothing is known
        server.mean = server.model.params.zeros_like()  # of the updates

    def select(self, server, clients):
        heard = clients.call(self.look, model=server.model)
        if len(heard) <= self.chosen:
            return clients.where([reply.client for reply in heard])
        score = torch.tensor(self.scores(server, heard), dtype=torch.float64)
        tau = max(1e-6, self.tau * (1 - 0.5 * min(1.0, server.round / self.horizon)))
        # The largest of log chance + Gumbel noise are a draw without replacement by these chances.
        noise = torch.rand(len(score), generator=server.rng("choice"), dtype=torch.float64)
        order = (score / tau - (-noise.clamp(1e-300, 1 - 1e-16).log()).log()).argsort(descending=True)
        return clients.where([heard[place].client for place in order[: self.chosen].tolist()])

    def scores(self, server, heard):
        """S of every client that told its loss, in [0, 1]."""
        ids = [reply.client for reply in heard]
        usual = sum(server.times[k] for k in ids) / len(ids) or 1.0
        loss = spread([reply.loss for reply in heard], 1.0)
        absence = spread([log(1 + server.round - server.last[k]) for k in ids], 1.0)
        fair = [min(1.0, max(-1.0, 1 - server.times[k] / usual)) for k in ids]
        return spread(
            [
                self.by_loss * v + self.by_diversity * server.apart[k] + self.by_fairness * f + self.by_absence * s
                for k, v, f, s in zip(ids, loss, fair, absence, strict=True)
            ],
            1.0,
        )

    def round(self, server, cohort):
        replies = cohort.call(self.local, model=server.model)
        up = replies.mean("delta", weight="n")
        plain = sum((reply.delta.params for reply in replies[1:]), replies[0].delta.params) / len(replies)
        times, last, apart = list(server.times), list(server.last), list(server.apart)
        for reply in replies:
            k, u = reply.client, reply.delta.params
            times[k], last[k] = times[k] + 1, server.round
            if server.mean.norm() > 0 and u.norm() > 0:
                apart[k] = min(1.0, max(0.0, 1 - float(u @ server.mean / (u.norm() * server.mean.norm()))))
        server.times, server.last, server.apart = times, last, apart
        server.mean = 0.9 * server.mean + 0.1 * plain if server.mean.norm() > 0 else plain
        server.model = server.model + up.delta

    @client
    def look(self, client, model):
        with torch.no_grad():
            losses = [
                client.task.criterion(client.scores(model, batch.x), batch)
                for batch, _ in zip(client.batches(self.batch), range(self.looks), strict=False)
            ]
        return {"loss": sum(torch.stack(losses).tolist()) / len(losses)}

    @client
    def local(self, client, model):
        pull = (lambda w: self.mu * (w - model).params) if self.mu else None
        clip = self.clip or None
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch, correct=pull, clip=clip)
        return {"delta": w - model, "n": client.n}


def spread(values, flat):
    """Values from 0 to 1; `flat` where all are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else flat for value in values]
