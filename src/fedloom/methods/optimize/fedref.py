"""FedRef."""

from dataclasses import dataclass
from typing import Annotated

from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.ranges import Log, Positive


@dataclass(frozen=True)
class FedRef(FedAvg):
    """Can the server alone keep a round from forgetting, by drawing each mean toward those of the rounds before?

    Yoon, Choi, De Neve: FedRef: Communication-Efficient Bayesian Fine-Tuning using a Reference Model, arXiv 2506.23210
    (v4; official code TaehwanY98/Fed-Ref).

        client k:         w_k <- E epochs of SGD from w;   send w_k - w
        server, round t:  a_t <- sum_k n_k w_k / sum_k n_k;   in the first p rounds w <- a_t, then
                          r <- sum_{j=0}^{p-1} (p - j) / (p (p + 1) / 2) a_{t-j}
                          w <- argmin_v |v - a_t|^2 + lambda_1 |v - a_{t-1}|^2 + lambda_2 |v - r|^2

    Departures:
    1. The minimum is taken where it is, (a_t + lambda_1 a_{t-1} + lambda_2 r) / (1 + lambda_1 + lambda_2); the paper's
       equations were not at hand, and this is what its text asks for. The official code has changed: one version takes
       the same number from all of a tensor, at a rate of 9e-6; the last one, where the clients' loss has risen, a step
       of gradient on |(a_t - w) - (r_t - r_{t-1})|^2, and its r weighs the oldest mean most.
    2. Running statistics of BatchNorm are those of a_t.

    Identities: lambda_1 = lambda_2 = 0, and the first p rounds: FedAvg, bitwise; p = 1: r is a_t; every coordinate of w
    lies between the least and the largest of the means.
    """

    window: Positive[int] = 3  # p: means in r; the README takes 3 to 5
    lam_last: Annotated[float, Log(0.01, 0.3)] = 0.1  # lambda_1: pull of the mean before; the script's option
    lam_ref: Annotated[float, Log(0.03, 1.0)] = 0.1  # lambda_2: pull of r; the script's option

    def setup(self, server, clients):
        server.means = []  # a_t, a_{t-1}, ...

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        server.model = server.model + up.delta
        means = server.means = [server.model, *server.means][: self.window + 1]
        if len(means) <= self.window:
            return
        now, before = means[0].params, means[1].params
        shares = [(self.window - j) / (self.window * (self.window + 1) / 2) for j in range(self.window)]
        r = sum((share * mean.params for share, mean in zip(shares, means, strict=False)), now.zeros_like())
        pulled = now + self.lam_last * before + self.lam_ref * r
        server.model = server.model.merge(1 / (1 + self.lam_last + self.lam_ref) * pulled)
