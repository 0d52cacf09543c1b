"""Delta-SGD."""

from dataclasses import dataclass

from fedloom.method import client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.optimizers import DeltaSGD as Rule
from fedloom.ranges import LearningRate, Positive


@dataclass(frozen=True)
class DeltaSGD(FedAvg):
    """Can every client pick its own step size from the smoothness that it measures, so that nobody tunes a rate?

    Kim, Toghani, Uribe, Kyrillidis: Adaptive Federated Learning with Auto-Tuned Clients, ICLR 2024, arXiv 2306.11201
    (Algorithm 1).

        server:    x <- weighted mean of the y_K
        client i:  y_0 <- x, eta_0 and theta_0 = 1 anew in every round;  for each batch b_k, k = 0, 1, ...:
                   g_k = grad l(y_k; b_k);  from k = 1 on, with g' = grad l(y_{k-1}; b_k), on the same batch:
                     eta_k = min(gamma |y_k - y_{k-1}| / (2 |g_k - g'|), sqrt(1 + delta theta_{k-1}) eta_{k-1})
                     theta_k = eta_k / eta_{k-1}
                   y_{k+1} <- y_k - eta_k g_k

    Departures:
    1. The average is weighted by samples and runs over the replies that arrive; the official code's is not weighted.
    2. eps is added to the first candidate's minimum, as in the official code. Where point or gradient have not changed,
       the second candidate counts alone; the official code lets it also change the first step, which the paper takes at
       eta_0.
    3. The rule is an optimizer that any method can take, `optimizer=delta_sgd`; this is FedAvg with it.

    Identities: where the smoothness never binds, and with delta = 0, it is FedAvg at the rate eta_0; on a loss of
    curvature h the step is at most gamma / (2 h) + eps from the second on, whatever eta_0 was.
    """

    lr: LearningRate = 0.2  # eta_0: the first step of every round; not tuned, as in the paper
    gamma: Positive[float] = 2.0  # gamma: 2, the paper's; 2 over the official code's damping
    delta: float = 0.1  # delta: growth of the step; 0.02 by default in the official code
    eps: float = 1e-8  # as in the official code

    refuses = {
        "dp=sample": "it takes a second gradient of every batch, and one is accounted for",
        "optimizer": "it is one; take fedavg with optimizer=delta_sgd or another",
    }

    @client
    def local(self, client, model):
        rule = Rule(self.gamma, self.delta, self.eps)
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch, optimizer=rule)
        return {"delta": w - model, "n": client.n}
