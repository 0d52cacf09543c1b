"""FedLAW."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive
from fedloom.vector import Vector


@dataclass(frozen=True)
class FedLAW(Method):
    """Should the weights of a mean sum to one, or can the server learn their sum and their split on a few samples?

    Li, Lin, Shang, Wu: Revisiting Weighted Aggregation in Federated Learning with Neural Networks, ICML 2023,
    arXiv 2302.10911 (official code ZexiLee/ICML-2023-FedLAW).

        client k:  w_k <- E epochs of SGD from w;  send w_k, n_k
        server:    lambda = softmax(x), gamma = exp(g)   from x_k = log(n_k / n), g = 0
                   E_s epochs over batches of the server's data:
                     (x, g) <- Adam step on l(gamma sum_k lambda_k w_k; batch)
                   w <- gamma sum_k lambda_k w_k
        form "quad":  lambda_k = x_k^2 / sum x^2, gamma = g^2   from x_k = 1 / sqrt(m), g = 1

    Departures:
    1. The server's data are rows taken from the training data, never of the test; the official code splits its test.
    2. Running statistics begin as the clients' mean and move with the server's passes over its data, in training mode;
       in the official code, which works in training mode too, they are the server's alone.
    3. The two-phase variant with averaged scalars (SWA) is not here.

    Identities: E_s=0 is FedAvg (exp) or its uniform mean (quad), to rounding; equal w_k move gamma only.
    """

    lr: LearningRate = 0.05  # local learning rate; the official code takes 0.08, times 0.99 a round
    epochs: Positive[int] = 1  # E: local epochs, as in the official code
    batch: int = 10  # local batch size; the official code takes 128
    form: Literal["exp", "quad"] = "exp"  # how lambda and gamma stay positive; "exp" in the official code
    server_lr: Annotated[float, Log(1e-3, 0.1)] = 0.01  # Adam's learning rate, as in the official code on CIFAR-10
    server_epochs: int = 20  # E_s: epochs over the server's data, as in the official code
    server_batch: int = 128  # batch size at the server, as in the official code

    needs = ("public",)
    refuses = {"secure": "the server learns a weight for every client's model", "aggregate": "it aggregates itself"}

    def round(self, server, cohort):
        replies = cohort.call(self.local, model=server.model)
        mean = replies.mean(weight="n")
        models = torch.stack([up.model.params.flat for up in replies])
        share = torch.tensor([up.n for up in replies]).to(models) / mean.weight
        split, total, statistics = self.learned(server, mean.model, models, share)
        server.log(gamma=total)
        w = Vector(total * split @ models, mean.model.params.layout)
        server.model = mean.model.merge(w).merge(statistics)

    def learned(self, server, mean, models, share):
        """lambda [m], gamma [] and running statistics, for models [m, P] whose shares of the samples are [m]."""
        exp = self.form == "exp"
        x = share.log() if exp else torch.full_like(share, len(share) ** -0.5)
        x, g = x.requires_grad_(), torch.full_like(share[:1], 0.0 if exp else 1.0).requires_grad_()
        optimizer = torch.optim.Adam([x, g], lr=self.server_lr, betas=(0.5, 0.999))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=20, gamma=0.5)
        w = mean
        for _ in range(self.server_epochs):
            for batch in server.batches(self.server_batch):
                split, total = scalars(x, g, self.form)
                mixed = total * split @ models
                w = w.merge(Vector(mixed.detach(), w.params.layout))
                slope = server.grad(w, batch).params  # moves the running statistics of w
                x.grad, g.grad = torch.autograd.grad(mixed, (x, g), slope.flat)
                optimizer.step()
            schedule.step()
        split, total = (scalar.detach() for scalar in scalars(x, g, self.form))
        return split, total, w.buffers

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        return {"model": w, "n": client.n}


def scalars(x, g, form):
    """lambda [m], which sums to 1, and gamma []."""
    if form == "exp":
        return x.softmax(0), g.exp()[0]
    return x.square() / x.square().sum(), g.square()[0]
