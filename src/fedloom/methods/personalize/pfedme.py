"""pFedMe."""

from dataclasses import dataclass
from typing import Annotated

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class PFedMe(Method):
    """Can each client's model be the proximal point of the global one, so that the two are learned as one problem?

    Dinh, Tran, Nguyen: Personalized Federated Learning with Moreau Envelopes, NeurIPS 2020, arXiv 2006.08848
    (Algorithm 1; official code CharlieDinh/pFedMe).

        min_w  mean_i min_theta f_i(theta) + lambda / 2 |theta - w|^2
        client i:  w_i <- w;  theta <- w;  R times, on a fresh batch b:
                     K times  theta <- theta - delta (grad f(theta; b) + lambda (theta - w_i) + mu theta)
                     w_i <- w_i - eta lambda (w_i - theta)
                   keep theta;  send w_i - w
        server:    w <- (1 - beta) w + beta mean_i w_i

    Departures:
    1. Only the cohort trains. With `all_train` the others are told the model too and learn their theta, as in the paper
       and its code, where everybody trains in every round and the server takes only the cohort's w_i.
    2. The mean is the paper's, plain; the official code weights it by samples.
    3. theta goes on from batch to batch within a round, as in the official code; the paper solves for it anew.
    4. Running statistics are theta's and move in the first of the K steps on a batch; beta is for parameters only.

    Identities: R=K=1, mu=0, beta=1 is FedSGD with the rate eta lambda delta; lambda=0 leaves w as it is for ever.
    """

    lr: LearningRate = 0.005  # eta: rate of w_i; 0.005 to 0.01 in the official commands
    inner_lr: LearningRate = 0.1  # delta: rate of theta; 0.1 on MNIST, 0.01 on Synthetic
    lam: Annotated[float, Log(1.0, 50.0)] = 15.0  # lambda: pull of w_i; 15 to 30. delta (L + lambda) below 2 is stable
    steps: Positive[int] = 20  # R: batches in a round, as in the paper
    inner: Positive[int] = 5  # K: steps on each batch, as in the paper
    batch: int = 20  # batch size, as in the paper
    mu: float = 0.0  # mu: weight decay of theta; 0.001 inside the official code's optimizer
    beta: Annotated[float, Log(0.5, 4.0)] = 1.0  # beta: step of the server; 1, tuned 2
    all_train: bool = False  # whether clients that are not asked learn their theta too

    compressible = ("delta",)
    private = ("delta",)
    light = {"steps": 3, "inner": 2}
    refuses = {"dp=sample": "it takes several gradients of every batch, and one is accounted for"}

    def round(self, server, cohort):
        model = server.model
        up = cohort.mean(self.local, model=model)
        server.model = model + up.delta.merge(self.beta * up.delta.params)
        if self.all_train:
            others = cohort.everybody.where(lambda k: k not in cohort)
            others.tell(self.personalize, model=model)

    @client
    def local(self, client, model):
        w, theta = self.trained(client, model)
        client.state["theta"] = theta
        return {"delta": theta.merge(w) - model}

    @client
    def personalize(self, client, model):
        client.state["theta"] = self.trained(client, model)[1]

    @client
    def join(self, client, model):
        client.state["theta"] = self.trained(client, model)[1]

    @client
    def predict(self, client, model):
        return client.state.get("theta", model)

    def trained(self, client, model):
        """w_i, the parameters alone, and theta after R batches."""
        w, theta = model.params, model.clone()
        for batch in client.batches(self.batch, steps=self.steps):
            for k in range(self.inner):
                g = client.grad(theta, batch, statistics=k == 0).params
                pull = self.lam * (theta.params - w) + self.mu * theta.params
                theta = theta.merge(theta.params - self.inner_lr * (g + pull))
            w = w - self.lr * self.lam * (w - theta.params)
        return w, theta
