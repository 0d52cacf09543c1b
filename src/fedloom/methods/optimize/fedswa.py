"""FedSWA and FedMoSWA."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fedloom.method import Method, client
from fedloom.optimizers import Linear
from fedloom.ranges import LearningRate, Log, Positive
from fedloom.ranges import Linear as Evenly


@dataclass(frozen=True)
class FedSWA(Method):
    """Do a local rate that falls within the round, and a momentum of control variates, find a global flat minimum?

    Liu, Liu, Shang, Liu, Liu: FedSWA: Improving Generalization in Federated Learning with Highly Heterogeneous Data via
    Momentum-Based Stochastic Controlled Weight Averaging, ICML 2025 (Algorithms 1 and 2).

        client i:  y_0 <- x;  step k = 0 .. K-1 at the rate  eta_k = (1 - k/K) eta + (k/K) rho eta
          swa:       y_{k+1} <- y_k - eta_k g_k(y_k)
          moswa:     y_{k+1} <- y_k - eta_k (g_k(y_k) - c_i + m)
                     c_i' <- c_i - m + (x - y_K) / (K mean eta_k);  send c_i' - m;  c_i <- c_i'
        server:    x <- x + alpha mean_{i in S}(y_K - x);  moswa:  m <- m + gamma mean_{i in S}(c_i' - m)

    Departures:
    1. K is given as epochs; each client divides by its own K and the true mean of its rates. The official code runs
       FedMoSWA at a constant rate and divides by the largest K.
    2. The cosine over rounds is the run's setting: `schedule=cosine`.
    3. In the first round m is the mean of the c_i', as in the official code.
    4. Running statistics of BatchNorm are averaged, whatever alpha, and have no control variate.

    Identities: rho = alpha = 1 and no clipping is FedAvg with equal weights; FedMoSWA's steps and c_i are then
    SCAFFOLD's; where all c_i' are one vector, m nears it by the factor 1 - gamma a round.
    """

    lr: LearningRate = 0.1  # eta: 0.2 for FedSWA, 0.1 for FedMoSWA in the official runs
    epochs: Positive[int] = 1  # local epochs; 5 in the official runs
    batch: int = 10  # local batch size; 50 in the official runs
    rho: Annotated[float, Evenly(0.0, 1.0)] = 0.1  # rho: the rate at the end of a round over that at its beginning
    alpha: Annotated[float, Log(0.5, 2.0)] = 1.0  # alpha: weight of the mean; 1 in the official code
    variant: Literal["swa", "moswa"] = "swa"  # without or with control variates
    gamma: Annotated[Positive[float], Evenly(0.2, 0.9)] = (
        0.4  # gamma: weight of the new controls, as in the official code
    )
    clip: Positive[float] = 10.0  # bound on a gradient's length, as in the official code
    weight_decay: float = 1e-3  # as in the official code

    compressible = ("delta", "shift")
    private = ("delta", "shift")
    refuses = {"optimizer": "its control variates are mean gradients of plain steps at a rate that falls"}

    def setup(self, server, clients):
        server.control, server.begun = server.model.params.zeros_like(), False

    def round(self, server, cohort):
        control = {"control": server.control} if self.variant == "moswa" else {}
        up = cohort.mean(self.local, model=server.model, **control)
        server.model = server.model + up.delta.merge(self.alpha * up.delta.params)
        if control:
            server.control = server.control + (self.gamma if server.begun else 1.0) * up.shift
            server.begun = True

    @client
    def local(self, client, model, control=None):
        rate, own, correct = Linear(self.lr, self.rho * self.lr), None, None
        if control is not None:
            own = client.state.get("control", control.zeros_like())
            correct = control - own
        w, steps = client.descend(
            model,
            rate,
            self.epochs,
            batch=self.batch,
            correct=correct,
            clip=self.clip,
            weight_decay=self.weight_decay,
        )
        if own is None:
            return {"delta": w - model}
        new = own - control + (model - w).params / (steps * rate.mean(steps))
        client.state["control"] = new
        return {"delta": w - model, "shift": new - control}
