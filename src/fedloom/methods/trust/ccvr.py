"""CCVR."""

from dataclasses import dataclass
from typing import Annotated

import torch

from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.plugin import Plugin
from fedloom.ranges import Log
from fedloom.task import Data


@dataclass(frozen=True)
class CCVR(Plugin):
    """Is the harm of skewed labels mostly in the classifier, and can virtual features mend it after training?

    Luo, Chen, Hu, Zhang, Liang, Feng: No Fear of Heterogeneity: Classifier Calibration for Federated Learning with
    Non-IID Data, NeurIPS 2021, arXiv 2106.05001 (Algorithm 1).

        any method to its end;  then once:
        client k:  z = f(x);  for every class c:  n_kc, sum z, sum z z^T over its samples of c
        server:    mu_c, Sigma_c: mean and unbiased covariance of all features of class c
                   M features z ~ N(mu_c, Sigma_c) for every class;  retrain the head on them, f stays

    Departures:
    1. Clients send sums instead of means and covariances: as many numbers, of which the server needs only the total.
       The pooled moments are the same; the paper's equations 5 and 6 compute them from each client's.
    2. Sums are in double precision; classes with one sample or none at all clients get no virtual features.
    3. No power transform of the features, which the paper applies in some of its settings.

    Identities: the body is bitwise as it was; the moments are those of all features pooled, for any partition.
    """

    inner: Method = FedAvg()  # the method that trains
    virtual: int = 2000  # M_c: virtual features a class; the paper takes 2000 on CIFAR-10, 500 on CIFAR-100
    # learning rate of the head; the re-implementation's range is 0.001 to 0.01
    head_lr: Annotated[float, Log(1e-3, 0.1)] = 0.01
    head_epochs: int = 10  # epochs over the virtual features, as in the re-implementation
    head_batch: int = 64  # batch size, as in the re-implementation
    weight_decay: float = 1e-5  # as in the re-implementation
    ridge: float = 1e-6  # added to the diagonal of every covariance; ours

    by_class = by_head = True
    light = {"virtual": 50, "head_epochs": 2}

    def finish(self, server, clients):
        self.inner.finish(server, clients)
        sums = clients.mean(self.moments, model=server.model)
        z, y = self.drawn(server.rng("virtual"), *pooled(*(t * sums.count for t in (sums.n, sums.first, sums.second))))
        if not len(y):
            return
        server.model, _ = server.descend(
            server.model,
            lr=self.head_lr,
            epochs=self.head_epochs,
            batch=self.head_batch,
            loss=server.task.head_loss,
            momentum=0.9,
            weight_decay=self.weight_decay,
            only="head.*",
            data=Data(z.to(server.model.flat), y),
        )

    @client
    def moments(self, client, model):
        x, y = client.data.all()
        z = client.features(model, x).double()
        member = torch.nn.functional.one_hot(y, client.task.classes).to(z)  # [n, C]
        low = torch.tril_indices(z.shape[1], z.shape[1], device=z.device)
        products = z[:, low[0]] * z[:, low[1]]  # the lower triangles of z z^T, [n, D (D + 1) / 2]
        return {"n": member.sum(0), "first": member.T @ z, "second": member.T @ products}

    def drawn(self, generator, n, mean, covariance):
        """Virtual features [M * classes, D] and their labels, for the classes whose covariance is known."""
        known = (n > 1.5).nonzero().flatten()
        ridge = self.ridge * torch.eye(mean.shape[1]).to(covariance)
        whole = covariance[known] + ridge * (1 + covariance[known].abs().amax((1, 2), True))
        root, failed = torch.linalg.cholesky_ex(whole)
        if failed.any():  # no sums of samples: somebody lied, or noise was added
            values, vectors = torch.linalg.eigh(whole)
            root = torch.where(failed[:, None, None] > 0, vectors * values.clamp(min=0).sqrt()[:, None], root)
        noise = torch.randn(len(known), self.virtual, mean.shape[1], generator=generator, dtype=mean.dtype).to(mean)
        z = mean[known][:, None] + noise @ root.mT
        return z.flatten(0, 1), known.repeat_interleave(self.virtual)


def pooled(n, first, second):
    """n [C], means [C, D] and unbiased covariances [C, D, D] from sums of samples, of z [C, D] and of triangles."""
    classes, width = first.shape
    low = torch.tril_indices(width, width, device=first.device)
    square = first.new_zeros(classes, width, width)
    square[:, low[0], low[1]] = second
    square[:, low[1], low[0]] = second
    mean = first / n.clamp(min=1)[:, None]
    centred = square - n[:, None, None] * mean[:, :, None] * mean[:, None, :]
    return n, mean, centred / (n - 1).clamp(min=1)[:, None, None]
