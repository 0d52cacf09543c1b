"""Per-FedAvg."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class PerFedAvg(Method):
    """Can clients learn together a model from which one step on their own data leads each of them far?

    Fallah, Mokhtari, Ozdaglar: Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic
    Meta-Learning Approach, NeurIPS 2020, arXiv 2002.07948 (Algorithm 1 and section 5; no official code).

        min_w  mean_i f_i(w - alpha grad f_i(w))
        client i:  w_i <- w;  tau times, on fresh batches b, b', b'':
                     v = grad f(w_i - alpha grad f(w_i; b); b')
                     FO:  w_i <- w_i - beta v
                     HF:  d = (grad f(w_i + delta v; b'') - grad f(w_i - delta v; b'')) / (2 delta)
                          w_i <- w_i - beta (v - alpha d)
                   send w_i - w
        server:    w <- mean_i w_i
        judged:    w - alpha grad f_i(w; b), some steps of it

    Departures:
    1. The exact variant, with the Hessian itself, is left out, as in the paper's experiments; `hf` comes near to it.
    2. Before every evaluation a client takes its step from the present w, also one that no cohort had; newcomers do the
       same, and no `join` is needed.
    3. Running statistics move in the first gradient of a step, at w_i.

    Identities: alpha=0 is FedAvg with as many steps and equal weights (on the batches b'); on a quadratic loss, with
    whole batches, `hf` is the exact gradient of f_i(w - alpha grad f_i(w)).
    """

    lr: LearningRate = 0.05  # beta: rate of w_i; 0.001 in the paper
    alpha: Annotated[float, Log(1e-3, 0.5)] = 0.05  # alpha: rate of the step to a personal model; 0.01 in the paper
    variant: Literal["fo", "hf"] = "fo"  # first-order, or Hessian-free
    steps: Positive[int] = 10  # tau: local steps in a round; the paper takes 10 and 4
    batch: int = 10  # size of each of the batches; 40 in the paper
    delta: Annotated[float, Log(1e-4, 0.1)] = 1e-3  # delta: width of the difference; 0.001 in re-implementations
    adapt: Positive[int] = 1  # steps to a personal model, as in the paper

    compressible = ("delta",)
    private = ("delta",)
    light = {"steps": 3}
    refuses = {"dp=sample": "a step takes several gradients, each at another point"}

    def __post_init__(self):
        Method.__post_init__(self)
        if self.variant == "hf" and not self.delta:
            raise UsageError("per_fedavg.delta is 0; the Hessian-free variant divides by it, take 0.001")

    def round(self, server, cohort):
        server.model = server.model + cohort.mean(self.local, model=server.model).delta

    @client
    def local(self, client, model):
        w = model.clone()
        batches = client.batches(self.batch, steps=(2 + (self.variant == "hf")) * self.steps)
        for _ in range(self.steps):
            near = self.stepped(client, w, next(batches))
            v = client.grad(near, next(batches), statistics=False).params
            if self.variant == "hf":
                third = next(batches)
                ahead, behind = (w.merge(w.params + sign * self.delta * v) for sign in (1, -1))
                difference = client.grad(ahead, third, statistics=False) - client.grad(behind, third, statistics=False)
                v = v - self.alpha / (2 * self.delta) * difference.params
            w = w.merge(w.params - self.lr * v)
        return {"delta": w - model}

    def stepped(self, client, w, batch):
        """w - alpha grad f(w), and the running statistics of w, which move, in both."""
        g = client.grad(w, batch).params
        return w.merge(w.params - self.alpha * g)

    @client
    def predict(self, client, model):
        w = model.clone()
        for batch in client.batches(self.batch, steps=self.adapt) if client.n else ():
            w = self.stepped(client, w, batch)
        return w
