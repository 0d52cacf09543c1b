"""FedCDH."""

from dataclasses import dataclass
from itertools import combinations
from math import pi

import torch

from fedloom.method import Method, client
from fedloom.ops.causal import collided, completed, extended, skeleton
from fedloom.ranges import Positive


@dataclass(frozen=True)
class FedCDH(Method):
    """Can clients whose mechanisms differ find the causal graph of their variables without any row leaving them?

    Li, Ng, Luo, Huang, Chen, Liu, Gu, Zhang: Federated Causal Discovery from Heterogeneous Data, ICLR 2024,
    arXiv 2402.13241 (official code lokali/FedCDH).

        client k:  n_k and the moments of x
        server:    global means and deviations;  random features  phi_j(x_j) = sqrt(2/h) cos(omega_j x_j + b_j)
        client k:  z = all features of a standardized row;  send n_k, m_k = sum z, S_k = sum z z'
        server:    C: the covariance of z and of a surrogate U, who the client is, from these sums
                   X, Y independent given Z?  C_XY|Z = C_XY - C_XZ (C_ZZ + gamma I)^-1 C_ZY;   T = n |C_XY|Z|^2
                     against a gamma distribution of the same mean and variance
                   skeleton of the variables and U by PC;   U -> X;   colliders;   Meek's rules
                   X - Y that both change with the client:  X -> Y if cause and mechanism change more independently

    Departures:
    1. The released code tests pooled rows; this is the paper's form, in which the server has sums only.
    2. U may separate two variables, as in CD-NOD, which the method builds on; in the release it does not.
    3. A mechanism is the regression of Y's features on X's in each client, the release's a joint embedding; undirected
       edges alone are decided so, the release decides all pairs that change.
    4. U has a coordinate for each client. Features are sent down as numbers, not as a seed.

    Identities: without U, graph and tests are those of one machine with all rows, however they are split; clients send
    d h (d h + 1) / 2 + d h + 1 numbers; the order of clients does not matter.
    """

    features: Positive[int] = 5  # h: random features of a variable, as in the paper
    alpha: Positive[float] = 0.05  # the p-value above which variables count as independent, as in the paper
    ridge: Positive[float] = (
        1e-3  # gamma; 1e-10 in the paper, which makes conditioning on few rows a matter of rounding
    )
    surrogate: bool = True  # whether there is U; False takes all clients for one

    needs = ("causal",)
    one_shot = True
    rough = True
    refuses = {
        "aggregate": "its means are of moments, and what decides is every client's own sums",
        "attack=zero": "clients send sums of features, no update of a model",
        "attack=free_rider": "clients send sums of features, no update of a model",
    }

    def setup(self, server, clients):
        server.graph = torch.zeros(server.task.variables, server.task.variables, dtype=torch.bool)

    def round(self, server, cohort):
        moments = cohort.mean(self.moments, weight="n")
        scale = (moments.second - moments.first.square()).clamp(min=1e-12).sqrt()
        draw, shape = server.rng("features"), (len(scale), self.features)
        omega = torch.randn(shape, generator=draw, dtype=torch.float64)
        shift = 2 * pi * torch.rand(shape, generator=draw, dtype=torch.float64)
        replies = cohort.call(self.sums, center=moments.first, scale=scale, omega=omega, shift=shift)
        if replies:
            parts = [(up.n, up.first.cpu(), square(up.second.cpu())) for up in replies]
            server.graph = self.graph(parts, len(scale))

    @client
    def moments(self, client):
        x = client.data.x
        return {"first": x.mean(0), "second": x.square().mean(0), "n": client.n}

    @client
    def sums(self, client, center, scale, omega, shift):
        x = (client.data.x - center) / scale
        z = ((2 / self.features) ** 0.5 * (x[:, :, None] * omega + shift).cos()).flatten(1)
        products = z.T @ z
        return {"first": z.sum(0), "second": products[torch.ones_like(products).tril() > 0], "n": client.n}

    def graph(self, parts, d):
        """The directed acyclic graph, bool [d, d], that clients' sums speak for."""
        surrogate = self.surrogate and len(parts) > 1
        n, c = covariance(parts)
        places = [range(j * self.features, (j + 1) * self.features) for j in range(d)]
        places += [range(d * self.features, len(c))] if surrogate else []

        def test(i, j, given):
            z = [place for k in given for place in places[k]]
            return independence(c, n, list(places[i]), list(places[j]), z, self.ridge)

        graph, separators = skeleton(test, len(places), self.alpha)
        if surrogate:
            graph[:, d] = False  # nothing causes who the client is
        graph = completed(collided(graph, separators))
        for i, j in combinations(range(d), 2):
            if surrogate and graph[i, j] and graph[j, i] and graph[d, i] and graph[d, j]:
                there, back = (self.dependence(parts, *pair) for pair in ((i, j), (j, i)))
                graph[(j, i) if there < back else (i, j)] = False
                graph = completed(graph)
        return extended(graph[:d, :d])

    def dependence(self, parts, i, j):
        """How much a cause i and the mechanism by which j follows from it change together over the clients."""
        x, y = (slice(k * self.features, (k + 1) * self.features) for k in (i, j))
        causes = torch.stack([m[x] / n for n, m, _ in parts])
        eye = torch.eye(self.features, dtype=torch.float64)
        maps = torch.stack([torch.linalg.solve(s[x, x] + self.ridge * n * eye, s[x, y]).flatten() for n, _, s in parts])
        causes, maps = causes - causes.mean(0), maps - maps.mean(0)
        return float((causes.T @ maps).square().sum() / (causes.square().sum() * maps.square().sum()))

    def observe(self, server, clients):
        return server.graph

    @client
    def predict(self, client, graph):
        return graph


def square(triangle):
    """The symmetric matrix whose lower triangle, row by row, this is."""
    size = int((2 * len(triangle)) ** 0.5)
    full = torch.zeros(size, size, dtype=triangle.dtype)
    full[torch.ones_like(full).tril() > 0] = triangle
    return full + full.tril(-1).T


def covariance(parts):
    """Rows in all, and the covariance [dh + K, dh + K] of features and of who the client is."""
    sizes = torch.tensor([n for n, _, _ in parts], dtype=torch.float64)
    n, each = sizes.sum(), torch.stack([m for _, m, _ in parts], 1)
    first = torch.cat([each.sum(1), sizes]) / n
    second = torch.cat([torch.cat([sum(s for _, _, s in parts), each], 1), torch.cat([each.T, sizes.diag()], 1)]) / n
    return n, second - torch.outer(first, first)


def independence(c, n, x, y, z, ridge):
    """The p-value of X and Y being independent given Z, from the covariance of their features."""
    both = x + y
    left = c[both][:, both]
    if z:
        left = left - c[both][:, z] @ torch.linalg.solve(c[z][:, z] + ridge * torch.eye(len(z)).to(c), c[z][:, both])
    xx, yy, xy = left[: len(x), : len(x)], left[len(x) :, len(x) :], left[: len(x), len(x) :]
    mean, variance = xx.trace() * yy.trace(), 2 * xx.square().sum() * yy.square().sum()
    if not variance > 0:
        return 1.0  # what does not vary depends on nothing
    return float(torch.special.gammaincc(mean.square() / variance, n * xy.square().sum() * mean / variance))
