"""APFL."""

from dataclasses import dataclass
from typing import Annotated

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Linear, Positive
from fedloom.task import Data


@dataclass(frozen=True)
class APFL(Method):
    """How much of the global model should each client mix into its own, learned per client?

    Deng, Kamani, Mahdavi: Adaptive Personalized Federated Learning, 2020, arXiv 2003.13461 (Algorithm 1; official code
    MLOPTPSU/FedTorch).

        server:    w <- mean_i w_i
        client i:  w_i <- w;  for each batch b:
                     h <- grad l(vbar; b) at vbar = alpha_i v_i + (1 - alpha_i) w_i
                     w_i <- w_i - eta grad l(w_i; b),  v_i <- v_i - eta alpha_i h,  and with the first batch of a round
                     alpha_i <- clip(alpha_i - eta (<h, v_i - w_i> + mu alpha_i), 0, 1),  all three from the old values
                   send w_i - w;  keep v_i, alpha_i

    Departures:
    1. Weights are mixed, as the paper defines vbar; the official code mixes both models' logits, after w_i has moved.
    2. The mean is weighted by samples, so that the global model is FedAvg's; the official code averages plainly.
    3. alpha_i is adapted by default, as in the paper; in the official code that is an option which is off.
    4. v_i starts from the w of the client's first round; the paper's is there from the beginning.
    5. vbar has running statistics of its own, those that its forward passes leave; they are kept with v_i. With
       buffers=local, vbar and w_i share those that the client keeps.

    Identities: the global model is that of FedAvg bitwise, whatever alpha does; alpha=0 held there judges w_i; alpha=1
    held there makes v_i local training on the same batches.
    """

    lr: LearningRate = 0.05  # eta: learning rate of w, v and alpha; the official sample takes 0.1
    epochs: Positive[int] = 1  # epochs in which the tau local steps are; the official sample takes tau = 10 steps
    batch: int = 10  # batch size; the official sample takes 50
    # alpha at the start: share of the client's own model, as in the official code
    alpha: Annotated[float, Linear(0.0, 1.0)] = 0.5
    adaptive: bool = True  # whether alpha is learned
    mu: float = 0.02  # weight decay of alpha, which the official code has and the paper has not

    compressible = ("delta",)
    private = ("delta",)
    refuses = {
        "dp=sample": "its second model takes another gradient of the same batch, and one is accounted for",
        "optimizer": "it takes single steps, between which an optimizer would forget",
    }

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        server.model = server.model + up.delta

    @client
    def local(self, client, model):
        w, v, alpha = model, client.state.get("personal", model), client.state.get("alpha", self.alpha)
        for step, batch in enumerate(client.batches(self.batch, self.epochs)):
            vbar = mixed(v, w, alpha)
            h = client.grad(vbar, batch).params
            moved = alpha
            if self.adaptive and step == 0:
                slope = float(h @ (v - w).params) + self.mu * alpha
                moved = min(1.0, max(0.0, alpha - self.lr * slope))
            v = vbar.merge(v.params - self.lr * alpha * h)
            w, _ = client.descend(w, lr=self.lr, steps=1, data=Data.of(batch))
            alpha = moved
        client.state.update(personal=v, last=w, alpha=alpha)
        client.log(alpha=alpha)
        return {"delta": w - model, "n": client.n}

    @client
    def predict(self, client, model):
        if "personal" not in client.state:
            return model
        return mixed(client.state["personal"], client.state["last"], client.state["alpha"])


def mixed(v, w, alpha):
    """alpha v + (1 - alpha) w, with the running statistics of v."""
    return v.merge((alpha * v + (1 - alpha) * w).params)
