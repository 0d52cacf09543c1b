"""FedLwF."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from torch.nn import functional as F

from fedloom.cohort import Once
from fedloom.method import Method, client
from fedloom.methods.continual._distill import among, answers, distillation
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class FedLwF(Method):
    """Can old classes be kept by nothing but what the old model says of the new classes' samples?

    Li, Hoiem: Learning without Forgetting, ECCV 2016, arXiv 1606.09282. Among clients: Usmanova, Portet, Lalanda, Vega:
    A distillation-based approach integrating continual learning and federated learning for pervasive services, 2021,
    arXiv 2109.04197. Here as the official code of TARGET has it as a rival (arXiv 2303.06937;
    zj-jayzhang/Federated-Class-Continual-Learning).

        server:    before every task but the first  f_old <- f;   w <- w + mean (w_k - w), all clients alike
        client k:  E epochs of SGD from w on  CE(f(x), y), among the new classes,
                   + kd H(softmax(f_old(x) / 2), softmax(f(x) / 2)), over the old classes;   send w_k - w

    Departures:
    1. The network has its whole head from the start, and classes to come are masked; officially the head grows.
    2. Client SGD is plain; officially momentum 0.9, weight decay 5e-4 (`optimizer=sgd:0.9`).

    Identities: the first task is FedAvg with equal weights bitwise; kd=0 is TARGET with kd=0.
    """

    lr: LearningRate = 0.05  # learning rate; 0.01 with momentum 0.9 in the official code
    epochs: Positive[int] = 1  # E: local epochs; 5 in the official code
    batch: int = 10  # batch size; 128 in the official code
    kd: Annotated[float, Log(0.3, 10.0)] = 3.0  # kd: weight of the old answers, as in the official code

    needs = ("stream:by=classes",)
    compressible = ("delta",)
    private = ("delta",)

    def setup(self, server, clients):
        server.old, server.kept = None, 0  # tasks whose classes the old model knows

    def round(self, server, cohort):
        task = server.task.number(server.round)
        if self.kd and server.kept < task:
            server.old, server.kept = server.model, task
        held = {"old": Once(server.old)} if server.kept else {}
        server.model = server.model + cohort.mean(self.local, model=server.model, **held).delta

    @client
    def local(self, client, model, old=None):
        task, loss = client.task, None
        if task.old.any():
            teacher = None if old is None else client.net(old)
            loss = partial(learned, new=task.new, old=task.old, teacher=teacher, kd=self.kd)
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch, loss=loss)
        return {"delta": w - model}


def learned(net, batch, new, old, teacher, kd):
    """CE among the new classes, and the KD of the teacher's answers to the same inputs over the old ones."""
    scores = net(batch.x)
    value = F.cross_entropy(among(scores, new), batch.y)
    if teacher is None:
        return value
    return value + kd * distillation(scores, answers(teacher, batch.x, old, 2.0), old, 2.0)
