"""GGEUR."""

from dataclasses import dataclass

import torch

from fedloom.errors import Refused
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.plugin import Plugin
from fedloom.task import Data


@dataclass(frozen=True)
class GGEUR(Plugin):
    """Can clients that share only the shapes of their classes invent what the others have, and train on that?

    Ma, Dai, Huang, Chen: Geometric Knowledge-Guided Localized Global Distribution Alignment for Federated Learning,
    CVPR 2025, arXiv 2503.06457 (official code WeiDai-David/2025CVPR_GGEUR). On features of a frozen encoder (`embed`):

        once, client k:  for each of its classes c:  n_kc, mean m_kc and covariance S_kc (by 1/n) of its features
        server:          m_c <- sum_k n_kc m_kc / n_c;  Sigma_c <- sum_k n_kc (S_kc + (m_kc - m_c)(m_kc - m_c)^T) / n_c
        client k:        for each of its classes with fewer than n* samples: as many more as are missing,
                           z' ~ N(z, Sigma_c), z one of its own, drawn at random  [one domain]
                           or drawn of p such z' and p z' ~ N(m_jc, Sigma_c) for every other client j that has the
                           class  [several domains]
        the method inside trains on all of them

    Departures:
    1. A client sends n, the sum of z and the lower triangle of the sum of z z^T of each of its classes, in double
       precision: the numbers that n_kc, m_kc and S_kc are made of, of which the server needs the totals only. Means
       m_kc of single clients are sent, and sent on, with `prototypes` alone.
    2. The server sends the Cholesky factor of Sigma_c + 1e-6 I (negative eigenvalues set to 0) in place of Sigma_c.
    3. The scripts for several domains multiply ten eigenvalues by 5 to 1: the least ones, for `eigh` sorts upwards. No
       eigenvalue is changed here. Where these candidates are fewer than are missing, more lie around own samples.
    4. The method inside sees the invented samples as a client's own: FedAvg weighs by all of them, where the scripts
       weigh equally. Their double softmax, and their clients that never get the average, are not taken over.

    The covariance of fewer samples than dimensions gives away in which directions these lie: no privacy is claimed.

    Identities: Sigma_c is the covariance of all features of class c together, for any partition; n* = 0 is the method
    inside bitwise.
    """

    inner: Method = FedAvg()  # the method that trains
    # n*: samples of a class at each client that has it; the scripts take as many as all clients have of it together,
    # 5000 on CIFAR-10 and 500 on CIFAR-100. The default is ours, for small data
    target: int = 100
    prototypes: int = 0  # p: samples around each other client's mean; the scripts for several domains take 500

    by_class = True
    refuses = {
        "problem=stream": "samples are invented once, of the classes that are there when training begins",
        "problem=graph": "invented nodes have no edges",
        "secure": "clients weigh by all samples that they train on, of which they registered their own only",
    }

    def setup(self, server, clients):
        self.inner.setup(server, clients)
        inputs = server.task.blank()
        if inputs.dim() != 2 or not inputs.is_floating_point():
            raise Refused(
                f"ggeur draws samples around vectors of numbers, and inputs here are {inputs.dtype} of shape "
                f"{list(inputs.shape[1:])}; set embed=random on images, embed=sentence on texts, or another encoder"
            )
        if not self.target:
            return
        sums = clients.mean(self.moments).classes
        factors = {c: triangle(factor(covariance(**of_class)).float()) for c, of_class in sums.items()}
        centers = {}
        if self.prototypes:
            centers = {up.client: up.centers for up in clients.stream(self.average)}
        clients.tell(self.invent, factors=factors, centers=centers)

    @client
    def moments(self, client):
        x, y = client.data.all()
        own = {int(c): x[y == c].double() for c in y.unique()}
        sums = {c: {"n": float(len(z)), "first": z.sum(0), "second": triangle(z.T @ z)} for c, z in own.items()}
        return {"classes": sums}

    @client
    def average(self, client):
        x, y = client.data.all()
        return {"centers": {int(c): x[y == c].mean(0) for c in y.unique()}}

    @client
    def invent(self, client, factors, centers):
        x, y = client.data.all()
        draw, z, labels = client.rng("invent"), [], []
        for c, low in factors.items():
            own = x[y == c]
            missing = self.target - len(own)
            if len(own) and missing > 0:
                others = [means[c] for k, means in centers.items() if k != client.id and c in means]
                around = self.places(own, others, missing, draw)
                noise = torch.randn(around.shape, generator=draw).to(around)
                z.append(around + noise @ square(low, x.shape[1]).T)
                labels.append(torch.full((missing,), c))
        if z:
            client.state["invented"] = {"x": torch.cat(z), "y": torch.cat(labels)}

    def places(self, own, others, missing, draw):
        """Around what [missing, D] samples are drawn: own samples [n, D], and the means of others."""
        count = max(self.prototypes, missing - self.prototypes * len(others))
        around = torch.cat([some(own, count, draw), *(mean.expand(self.prototypes, -1) for mean in others)])
        return some(around, missing, draw)

    def around(self, client, inner):
        if invented := client.state.get("invented"):
            x, y = client.data.all()
            client.given = Data(torch.cat([x, invented["x"]]), torch.cat([y, invented["y"].to(y)]))
        return inner()


def some(rows, count, draw):
    """`count` of the rows [n, D], none of them twice; if there are fewer, of so many copies of all as are needed."""
    copies = -(-count // len(rows))
    return rows[(torch.randperm(len(rows) * copies, generator=draw)[:count] % len(rows)).to(rows.device)]


def covariance(n, first, second):
    """The covariance [D, D], by 1/n, of samples: of how many, their sum [D], and the triangle of the sum of z z^T."""
    low = square(second / n, len(first))
    return low + low.T - low.diag().diag() - torch.outer(first, first) / n**2


def factor(covariance):
    """L [D, D], lower triangular: L L^T is the covariance, without negative eigenvalues, + 1e-6 I."""
    values, vectors = torch.linalg.eigh(covariance)
    return torch.linalg.cholesky(vectors * values.clamp(min=0) @ vectors.T + 1e-6 * torch.eye(len(values)).to(values))


def triangle(matrix):
    """The numbers on and below the diagonal."""
    return matrix[tuple(torch.tril_indices(*matrix.shape, device=matrix.device))]


def square(numbers, width):
    """The lower triangular matrix that has them."""
    matrix = numbers.new_zeros(width, width)
    matrix[tuple(torch.tril_indices(width, width, device=numbers.device))] = numbers
    return matrix
