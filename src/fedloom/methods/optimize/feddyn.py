"""FedDyn."""

from dataclasses import dataclass
from typing import Annotated

from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class FedDyn(Method):
    """Can each client's objective be bent every round so that all local optima agree with the global one?

    Acar, Zhao, Navarro, Mattina, Whatmough, Saligrama: Federated Learning Based on Dynamic Regularization, ICLR 2021,
    arXiv 2111.04263 (Algorithm 1).

        client k:  w_k ~ argmin_v L_k(v) - <g_k, v> + alpha/2 |v - w|^2;    g_k <- g_k - alpha (w_k - w)
        server:    h <- h - alpha/m sum_{k in P}(w_k - w);    w <- mean_{k in P} w_k - h / alpha      (m: population)

    Departures:
    1. Few epochs of SGD stand for the argmin, as in the authors' experiments.
    2. P are the clients whose replies count; any other goes on as if it had not been asked.
    3. Clients count equally, as in the paper; the official code divides a client's alpha by its share of the samples,
       which weights the objective by samples, and clips gradients.
    4. The server's model is judged; the official code's curves are of the mean of all clients' models.
    5. Running statistics of BatchNorm are averaged with the model; g and h live on parameters.
    6. The default alpha is larger than the paper's: where alpha * lr * steps is far below 1, local training is far from
       the argmin, and h is a momentum that hardly fades.

    Identities: under full participation h = mean_k g_k; at a fixed point every g_k is the client's gradient there.
    """

    lr: LearningRate = 0.05  # local learning rate; the paper takes 0.1
    epochs: Positive[int] = 5  # local epochs; the paper takes 5 to 50
    batch: int = 10  # local batch size
    # alpha: strength of the pull; the paper tunes it in 0.001, 0.01, 0.1 (see departure 6)
    alpha: Annotated[float, Log(1e-2, 10.0)] = 1.0

    compressible = ("delta",)

    def __post_init__(self):
        Method.__post_init__(self)
        if self.alpha == 0:
            raise UsageError("feddyn.alpha is 0; it divides the server's correction and must be greater than 0")

    def setup(self, server, clients):
        server.h = server.model.params.zeros_like()

    def round(self, server, cohort):
        up = cohort.mean(self.local, model=server.model)
        server.h = server.h - self.alpha * up.count / server.population * up.delta.params
        mean = server.model + up.delta
        server.model = mean.merge(mean.params - server.h / self.alpha)

    @client
    def local(self, client, model):
        own = client.state.get("gradient", model.params.zeros_like())
        w, _ = client.descend(
            model,
            lr=self.lr,
            epochs=self.epochs,
            batch=self.batch,
            correct=lambda w: self.alpha * (w - model).params - own,
        )
        client.state["gradient"] = own - self.alpha * (w - model).params
        return {"delta": w - model}
