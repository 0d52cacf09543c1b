"""FedImpro."""

from dataclasses import dataclass
from typing import Annotated

import torch

from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive
from fedloom.task import Batch, Data


@dataclass(frozen=True)
class FedImpro(Method):
    """Do clients agree if the upper layers of all of them also train on one shared distribution of hidden features?

    Tang, Zhang, Shi, Tian, Liu, Han, Chu: FedImpro: Measuring and Improving Client Update in Federated Learning,
    ICLR 2024, arXiv 2402.07011 (official code wizard1203/FedImpro).

        server:    send w and H = (mu_c, sigma_c) of every class c;  w <- mean of w_i,  H <- mean of H_i
        client i:  H_i <- H;  for every batch (x, y):   h <- low(x)
                     draw as many features h' ~ N(mu_c, sigma_c^2) as there are samples, of all classes c alike
                     w_i <- w_i - eta grad [ CE(high(h), y) + s CE(high(h'), c) ]
                     H_i <- beta H_i + (1 - beta) (mean, deviation) of h, by class, for the classes in y
                   send w_i and H_i, the latter with noise

    Departures:
    1. Features are drawn from the H that all clients received, as in the paper's figure 1 and theory; the official code
       draws from the client's own estimate, which moves during its training.
    2. H is averaged with the weights of the model; the official code lets all clients of a cohort count alike. Its
       1 - beta, min(1, width of h / samples of a class in the whole data set), is a number here.
    3. s stays 1 once it is; in the official code it goes on growing. Round 1, whose H is arbitrary, has s = 0 in both.
    4. BatchNorm above the cut normalizes real and drawn features each by themselves, and its running statistics are
       those of real ones; in the official code they share a batch.
    5. What travels of H are differences from the one received.

    Identities: weight=0 is FedAvg, bitwise; a message has 2 C d numbers beside the model, whatever the data.
    """

    lr: LearningRate = 0.05  # eta: learning rate; the paper takes 0.1
    epochs: Positive[int] = 1  # E: local epochs; the paper takes 1 and 5
    batch: int = 10  # batch size; the paper takes 128
    cut: str = ""  # behind which part of the network features are drawn; none: in the middle, as in the paper
    weight: Annotated[float, Log(0.1, 1.0)] = 1.0  # of drawn features in the end, as in the official code
    ramp: Positive[int] = 10  # T_s: rounds until then; the paper takes 500 of 1000
    beta: float = 0.9  # beta: share of H_i that stays in a step
    sigma: float = 0.1  # sigma_max: bound on deviations, as in the official code
    noise: float = 0.001  # deviation of the noise on H_i, as in the official code

    compressible = ("delta", "means", "stds")
    private = ("delta", "means", "stds")
    by_class = True
    refuses = {
        "optimizer": "a step at a time, it would forget what such an optimizer remembers",
        "dp=sample": "clients tell means of what samples become inside the network, which no gradient's noise protects",
    }

    def setup(self, server, clients):
        if not server.cuts:
            raise UsageError(
                "fedimpro needs a network that can be cut, and this problem has none; take another problem, or fedavg"
            )
        shape = (server.task.classes, *server.states_shape(self.place(server)))
        like = server.model.flat
        server.means = torch.rand(shape, generator=server.rng("features")).to(like)
        server.stds = like.new_full(shape, self.sigma)

    def round(self, server, cohort):
        share = self.weight * min(1.0, (server.round - 1) / self.ramp)
        features = {"means": server.means, "stds": server.stds}
        up = cohort.mean(self.local, weight="n", model=server.model, **features, share=share)
        server.model = server.model + up.delta
        server.means = server.means + up.means
        server.stds = (server.stds + up.stds).clamp(0, self.sigma)

    @client
    def local(self, client, model, means, stds, share):
        at, draw = self.place(client), client.rng("features")
        w, mu, sigma = model, means, stds
        loss = client.task.loss_above(at)
        for batch in client.batches(self.batch, self.epochs):
            h = client.states(w, batch.x, at, train=True).detach()
            pull = None
            if share:
                shared = drawn(means, stds, len(batch), draw)
                pull = share * client.grad(w, shared, loss, statistics=False)
            w, _ = client.descend(w, lr=self.lr, steps=1, data=Data(*batch), correct=pull)
            mu, sigma = self.estimate(mu, sigma, h, batch.y)
        mu, sigma = (part + self.noise * torch.randn(part.shape, generator=draw).to(part) for part in (mu, sigma))
        return {"delta": w - model, "means": mu - means, "stds": sigma - stds, "n": client.n}

    def estimate(self, means, stds, h, y):
        """H_i after a step with states h of classes y; a class that has one sample there has no deviation."""
        here = (y == torch.arange(len(means), device=y.device)[:, None]).to(h)  # whose is whose, [C, B]
        count, z, mu, sigma = here.sum(1, keepdim=True), h.flatten(1), means.flatten(1), stds.flatten(1)
        mean = here @ z / count.clamp(min=1)
        std = (here @ (z - mean[y]).square() / (count - 1).clamp(min=1)).sqrt()
        mu = torch.where(count > 0, self.beta * mu + (1 - self.beta) * mean, mu)
        sigma = torch.where(count > 1, self.beta * sigma + (1 - self.beta) * std, sigma)
        return mu.view(means.shape), sigma.view(stds.shape).clamp(max=self.sigma)

    def place(self, node):
        """The cut: the one that was chosen, or the middle one."""
        return self.cut or node.cuts[len(node.cuts) // 2]


def drawn(means, stds, count, draw):
    """At least `count` features, as many of each class, and their classes."""
    classes = len(means)
    c = torch.arange(classes, device=means.device).repeat(-(-count // classes))
    noise = torch.randn(len(c), *means.shape[1:], generator=draw).to(means, non_blocking=True)
    return Batch(means[c] + stds[c] * noise, c)
