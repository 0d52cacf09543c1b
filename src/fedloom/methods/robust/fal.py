"""FAL."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.plugin import Plugin
from fedloom.ranges import Signed
from fedloom.task import Batch


@dataclass(frozen=True)
class FAL(Plugin):
    """Does a common model withstand adversarial inputs when every client trains on worst cases of its own?

    Li, Song, Yang: Federated Adversarial Learning: A Framework with Convergence Analysis, ICML 2023, arXiv 2208.03635
    (Algorithm 1), with the inner ascent of Madry, Makelov, Schmidt, Tsipras, Vladu, ICLR 2018, arXiv 1706.06083.

        client k, for every gradient of the method inside, at w on the batch (x, y):
            x~ <- x (or x + U(-rho, rho));  A times:  x~ <- within rho of x and the box: x~ + a sign(grad_x L(w; x~, y))
            grad_w L(w; x~, y), with x~ held constant
        server:  what the method inside does

    Departures:
    1. The paper takes full-batch steps and the plain mean of all clients; here both are those of the method inside
       (FedAvg: by samples; FedOpt gives the paper's server rate).
    2. The paper leaves the ascent open and its theory has balls of l2; here it is Madry et al.'s, in the maximum norm.
    3. Examples are made in evaluation mode, so that no running statistics move and no dropout acts in them.

    Identities: rho = 0 or A = 0, without random start, is the method inside bitwise; of a linear model one step of
    length rho finds the exact maximum.
    """

    inner: Method = FedAvg()  # the method that trains
    rho: float = 0.1  # radius of the ball in the maximum norm; 0.3 for MNIST in Madry et al., of inputs in [0, 1]
    steps: int = 7  # A: steps of the ascent, as in Madry et al. for CIFAR-10
    step: float = 0.0  # a: length of a step; 0: 2.5 rho / A, as in Madry et al.
    start: bool = False  # begin at a random point of the ball; clients then do not train as one batch
    box: tuple[Signed[float], ...] = ()  # least and greatest value of an input: 0,1 for images; none: anything goes
    test_steps: int = 20  # steps of the attack on the judged model, from a random start

    by_class = True
    light = {"steps": 2, "test_steps": 2}
    refuses = {
        "dp=sample": "the ascent by the inputs does not pass through the hooks that read gradients sample by sample"
    }

    def __post_init__(self):
        super().__post_init__()
        if self.box and (len(self.box) != 2 or self.box[0] >= self.box[1]):
            raise UsageError(f"fal.box is {self.box}; give the least and the greatest value of an input, as in 0,1")

    def around(self, client, inner):
        if self.rho and (self.steps or self.start):
            client.wrap_loss(partial(self.robust, draw=client.rng("start")) if self.start else self.robust)
        return inner()

    def robust(self, loss, net, batch, draw=None):
        """The loss of the batch's worst case near it."""
        training = net.training
        net.eval()
        x = self.climbed(lambda x: loss(net, replace(batch, x=x)), batch.x, self.steps, draw)
        net.train(training)
        return loss(net, replace(batch, x=x))

    def climbed(self, value, x, steps, draw=None):
        """x~, within rho of inputs x [B, ...] and inside the box, at which `value` is large."""
        if not x.is_floating_point():
            raise UsageError("fal moves inputs that are real numbers, and those of this problem are not")
        low, high = x - self.rho, x + self.rho
        if self.box:
            low, high = (bound.clamp(*self.box) for bound in (low, high))
        at = x if draw is None else x + self.rho * (2 * torch.rand(x.shape, generator=draw).to(x) - 1)
        length = self.step or 2.5 * self.rho / max(1, steps)
        for _ in range(steps):
            with torch.no_grad():  # of nothing but x
                slope = torch.func.grad(value)(at)
            at = torch.minimum(torch.maximum(at + length * slope.sign(), low), high)
        return torch.minimum(torch.maximum(at, low), high)

    @client
    def evaluate(self, client, **message):
        measured = self.inner.evaluate(client, **message)
        if not measured["test"]["n"]:
            return measured
        judged = self.inner.predict(client, **message)
        if isinstance(judged, dict):  # several by name, of which the first is the main one
            judged = next(iter(judged.values()))
        scores = judged if callable(judged) else partial(client.scores, judged)
        x, y = client.task.data(client.id, "test").all()
        worst = self.climbed(
            lambda x: client.task.criterion(scores(x), Batch(x, y)), x, self.test_steps, client.rng("attack")
        )
        right = (scores(worst).argmax(1) == y).double().mean()
        return measured | {"test": measured["test"] | {"robust_accuracy": float(right)}}
