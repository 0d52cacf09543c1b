"""FedAsync."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fedloom.method import Method, client
from fedloom.ops.overlap import idle_up_to_cohort, staleness_weight
from fedloom.ranges import LearningRate, Linear, Log, Positive


@dataclass(frozen=True)
class FedAsync(Method):
    """Can every model be mixed into the global one the moment it arrives, if old ones weigh less?

    Xie, Koyejo, Gupta: Asynchronous Federated Optimization, OPT 2020, arXiv 1903.03934 (Algorithm 1).

        client i:  x <- x_t;  local steps on  f_i(x) + rho/2 |x - x_t|^2;   send x
        server:    as each x arrives:  alpha_t <- alpha s(staleness);   w <- (1 - alpha_t) w + alpha_t x
                   constant:    s(d) = 1
                   polynomial:  s(d) = (1 + d)^-a
                   hinge:       s(d) = 1 if d <= b, else 1 / (a (d - b) + 1)

    Departures:
    1. Who has ended begins anew at once, on the newest model (the paper's server triggers clients at random times).
    2. A round is one arrival; if it was lost the model stays.
    3. The paper counts staleness from 1 on; here fresh work has 0.

    Identities: alpha=1, one client and rho=0 is FedAvg of one client.
    """

    lr: LearningRate = 0.1  # gamma: local learning rate, as the paper on CIFAR-10
    epochs: Positive[int] = 2  # local epochs; the paper takes 1, and many more arrivals than a test has
    batch: int = 10  # local batch size; the paper takes 50
    alpha: Annotated[float, Linear(0.1, 0.9)] = 0.6  # alpha: as in the paper; it also tries 0.8 and 0.9
    rho: Annotated[float, Log(1e-3, 0.1)] = 0.005  # rho: pull toward the received model, as in the paper
    staleness: Literal["constant", "polynomial", "hinge"] = "polynomial"  # s: which of the family
    a: float | None = None  # a: null is the paper's 0.5 for the polynomial and 10 for the hinge
    b: float = 4.0  # b: as in the paper

    def round(self, server, cohort):
        idle_up_to_cohort(cohort, server.rng("idle")).submit(self.local, model=server.model)
        for reply in cohort.wait(min(1, cohort.working)):
            alpha = self.alpha * self.weight(reply.staleness)
            server.model = (1 - alpha) * server.model + alpha * reply.model
            server.log(staleness=reply.staleness)

    @client
    def local(self, client, model):
        pull = (lambda w: self.rho * (w - model).params) if self.rho else None
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch, correct=pull)
        return {"model": w}

    def weight(self, staleness):
        """What work of that staleness counts."""
        if self.staleness == "polynomial":
            return staleness_weight(staleness, 0.5 if self.a is None else self.a)
        if self.staleness == "hinge" and staleness > self.b:
            return 1 / ((10.0 if self.a is None else self.a) * (staleness - self.b) + 1)
        return 1.0
