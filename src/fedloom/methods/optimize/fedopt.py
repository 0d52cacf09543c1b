"""FedOpt: FedAdagrad, FedAdam, FedYogi, and FedAvgM as the case with momentum only."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class FedOpt(Method):
    """Does a per-coordinate adaptive optimizer at the server converge better than plain averaging?

    Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: Adaptive Federated Optimization, ICLR 2021,
    arXiv 2003.00295 (Algorithm 2). FedAvgM: Hsu, Qi, Brown 2019, arXiv 1909.06335.

        client i:  x_i <- E epochs of SGD with eta_l from x;   send x_i - x
        server:    D <- sum_i n_i (x_i - x) / sum_i n_i;       m <- beta1 m + (1 - beta1) D
                   adagrad:  v <- v + D^2
                   adam:     v <- beta2 v + (1 - beta2) D^2
                   yogi:     v <- v - (1 - beta2) D^2 sign(v - D^2)
                   x <- x + eta m / (sqrt(v) + tau)
        momentum (FedAvgM):  m <- beta1 m + D;   x <- x + eta m

    Departures:
    1. Weights by samples, as in the paper's experiments (its pseudo-code averages plainly).
    2. Running statistics of BatchNorm get the plain average: an adaptive step on a variance makes no sense.

    Identities: momentum with beta1=0, server_lr=1 is FedAvg bitwise; for a very large tau an adaptive step tends to
    (eta / tau) m. There is no bias correction, and D stands for the negative gradient.
    """

    lr: LearningRate = 0.05  # eta_l: local learning rate; the paper tunes it from 1e-3 to 10
    epochs: Positive[int] = 1  # E: local epochs, as in the paper
    batch: int = 10  # local batch size
    optimizer: Literal["adagrad", "adam", "yogi", "momentum"] = "adam"  # which of the family
    # eta: null is 0.03, and 1 for momentum; the paper tunes it from 1e-3 to 10
    server_lr: Annotated[float | None, Log(1e-3, 10.0)] = None
    beta1: float | None = None  # beta1: null is the paper's choice, 0.9, and 0 for adagrad
    beta2: float = 0.99  # beta2: of adam and yogi, as in the paper
    # tau: adaptivity, of all but momentum; the paper tunes it from 1e-5 to 0.1
    tau: Annotated[float, Log(1e-5, 0.1)] = 1e-3

    compressible = ("delta",)
    private = ("delta",)

    def __post_init__(self):
        Method.__post_init__(self)
        if self.tau == 0 and self.optimizer != "momentum":
            raise UsageError("fedopt.tau is 0; where nothing moves the step would be 0/0, so it must be greater than 0")

    def setup(self, server, clients):
        server.m = server.model.params.zeros_like()
        server.v = server.model.params.zeros_like() + self.tau**2

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        step = self.step(server, up.delta.params)
        eta = self.server_lr if self.server_lr is not None else 1.0 if self.optimizer == "momentum" else 0.03
        server.model = server.model + up.delta.merge(eta * step)

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        return {"delta": w - model, "n": client.n}

    def step(self, server, delta):
        """The server's direction for the averaged difference; moves both moments."""
        beta1 = self.beta1 if self.beta1 is not None else 0.0 if self.optimizer == "adagrad" else 0.9
        if self.optimizer == "momentum":
            server.m = beta1 * server.m + delta
            return server.m
        server.m = beta1 * server.m + (1 - beta1) * delta
        server.v = {
            "adagrad": lambda v, square: v + square,
            "adam": lambda v, square: self.beta2 * v + (1 - self.beta2) * square,
            "yogi": lambda v, square: v - (1 - self.beta2) * square * (v - square).sign(),
        }[self.optimizer](server.v, delta * delta)
        return server.m / (server.v.sqrt() + self.tau)
