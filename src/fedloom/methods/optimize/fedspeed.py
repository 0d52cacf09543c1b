"""FedSpeed."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class FedSpeed(Method):
    """Can long local training pay, if a prox term's bias is corrected and an ascent step looks for flat minima?

    Sun, Shen, Huang, Ding, Tao: FedSpeed: Larger Local Interval, Less Communication Round, and Higher Generalization
    Accuracy, ICLR 2023, arXiv 2302.10429 (Algorithm 1; released code woodenchild95/FL-Simulator).

        server:    x <- mean_i y_i + (1/N) sum_j h_j
        client i:  y <- x;  for each batch b:
                     g1 = grad l(y; b);  g2 = grad l(y + rho g1 / |g1|; b);  g = (1 - alpha) g1 + alpha g2
                     y <- y - eta (g + lambda (y - x + h_i) + wd y)
                   h_i <- h_i + (y - x);  send y - x

    Departures:
    1. `pool="all"` is the released code's rule: the mean of h runs over all N clients, those never asked counting 0;
       `pool="cohort"` is the paper's, over the cohort. They agree when everybody takes part.
    2. The mean of h is kept at the server, as the sum of what clients sent. A client whose reply does not count keeps
       its h, as if it had not been asked.
    3. The bound on the gradient's length is on g alone; the released code bounds g + lambda (h_i - x), which depends on
       where the origin lies. lambda here is the code's, 1 / lambda of the paper.
    4. Running statistics move in the first of the two passes only; clients count equally in their mean, as in x.
    5. The default lambda is larger than the code's: where lambda * lr * steps is far below 1, the mean of h is a
       momentum that hardly fades.

    Identities: lambda=rho=0 and no h in the aggregate is FedAvg with equal weights; rho=0, as long as the bound on g
    does not bind, is FedDyn with alpha = lambda (to rounding).
    """

    lr: LearningRate = 0.05  # eta: learning rate; the paper takes 0.1, times 0.998 a round
    epochs: Positive[int] = 5  # E: local epochs, as in the paper
    batch: int = 10  # batch size; the paper takes 50
    # lambda: pull to the received model; 0.1 in the released code (the paper's is its inverse, 10)
    lam: Annotated[float, Log(0.01, 10.0)] = 1.0
    rho: Annotated[float, Log(0.01, 0.2)] = 0.1  # rho: length of the ascent step, as in the released code
    alpha: float = 1.0  # alpha: share of the gradient after the ascent; 1 in the released code
    clip: float = 10.0  # bound on the gradient's length, as in the released code
    weight_decay: float = 0.0  # wd; the released code takes 1e-3
    pool: Literal["all", "cohort"] = "all"  # whose h the aggregate takes; "all" in the released code

    compressible = ("delta",)
    private = ("delta",)
    light = {"epochs": 2}
    refuses = {"dp=sample": "it takes two gradients of every batch, and one is accounted for"}

    def setup(self, server, clients):
        server.dual = server.model.params.zeros_like()  # (1/N) sum_j h_j

    def round(self, server, cohort):
        up = cohort.mean(self.local, model=server.model)
        mean = server.model + up.delta
        if self.pool == "all":
            server.dual = server.dual + up.count / server.population * up.delta.params
            mean = mean.merge(mean.params + server.dual)
        server.model = mean

    @client
    def local(self, client, model):
        x, dual = model.params, client.state.get("dual", model.params.zeros_like())
        y = model.clone()  # not read-only: its running statistics move
        for batch in client.batches(self.batch, self.epochs):
            g = client.grad(y, batch).params
            if self.rho:
                raised = y.merge(y.params + self.rho / (g.norm() + 1e-7) * g)
                g = (1 - self.alpha) * g + self.alpha * client.grad(raised, batch, statistics=False).params
            g = torch.clamp(self.clip / (g.norm() + 1e-7), max=1.0) * g
            y = y.merge(y.params - self.lr * (g + self.lam * (y.params - x + dual) + self.weight_decay * y.params))
        client.state["dual"] = dual + (y.params - x)
        return {"delta": (y if self.pool == "all" else y.merge(y.params + client.state["dual"])) - model}
