"""FedConv."""

from dataclasses import dataclass
from functools import partial

import torch

from fedloom.cohort import Each
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.heterogeneous._filters import fresh, through
from fedloom.nets.narrow import narrower
from fedloom.optimizers import Adam
from fedloom.ranges import LearningRate, Positive


@dataclass(frozen=True)
class FedConv(Method):
    """Can a server make small models of a large one by convolving its weights, and grow what clients make of them back?

    Shen, Yang, Cui, Zheng, Wei, Liu, Han: FedConv: A Learning-on-Model Paradigm for Heterogeneous Federated Clients,
    MobiSys 2024, arXiv 2502.20639 (official code lemingshen/FedConv).

        server:    W <- some epochs on public data;  for each size e:  w_e = conv_e(W), whose filters are fitted so that
                   w_e does well on public data;   send w_e
        client k:  E epochs from w_e, an ordinary model to it;  send w_k, n_k
        server:    w_k <- some epochs on public data;  W_k = deconv_k(w_k), filters of its own, fitted likewise
                   W <- sum_k n_k v_k * W_k / sum_k n_k, coordinate by coordinate;   v_k fitted likewise

        conv:      for every place of a convolution's kernel, or for a matrix:  X <- p X + q (+ X, of convolutions);  a
                   convolution with one kernel of unit length times a gain;  0.85 x if x > 0 else 0.001 x

    Departures:
    1. Fits keep the epoch with the least loss on a fifth of the public data that they do not see; the official code
       goes by test accuracy, and repeats until that passes thresholds.
    2. Kernels begin by cutting out a corner, nearly, and v_k at 1; officially both are drawn, v_k from N(0, 1).
    3. The activation is applied once (officially twice). Running statistics are cut, and filled up as in a new network.
    4. Clients descend by SGD; the setting `optimizer` gives Adam. Rates do not fall.

    Identities: if all have the large model and nothing is fitted it is FedAvg; a client of size e has about 0.75^(2e)
    of the numbers; what is fitted never has a larger loss on the data held out than it began with.
    """

    lr: LearningRate = 0.05  # local learning rate; 0.001 with Adam in the official code
    epochs: Positive[int] = 1  # E: local epochs; 5 in the official code
    batch: int = 10  # batch size, 0 for all samples
    shrink: float = 0.75  # width of each size beside the one before, as in the paper
    sizes: tuple[int, ...] = (0, 1, 2)  # e, dealt to the clients in turn; three as in the official code
    public_lr: LearningRate = 0.001  # rate of the epochs on public data, by Adam; 1e-4 in the official code
    public_epochs: int = 2  # epochs on public data, of W and of every w_k; 10 in the official code
    fit_lr: LearningRate = 0.01  # rate of the fits, by Adam; 0.001 in the official code
    fit_epochs: int = 5  # epochs of every fit; 20 in the official code

    needs = ("public",)
    rough = True  # behind the small slope gradients are as small as rounding, by whose size Adam divides them
    light = {"public_epochs": 1, "fit_epochs": 1}
    refuses = {"aggregate": "clients have models of different widths"}

    def __post_init__(self):
        Method.__post_init__(self)
        if not 0 < self.shrink < 1 or not self.sizes or min(self.sizes) < 0:
            given = f"fedconv.shrink is {self.shrink}, fedconv.sizes {self.sizes}"
            raise UsageError(f"{given}; a share below 1, and sizes from 0")

    def networks(self, site):
        return {str(e): site.derive(narrower, self.shrink**e) for e in sorted({*self.sizes} - {0})}

    def setup(self, server, clients):
        draw, wide = server.rng("filters"), server.model.layout
        server.filters = {e: fresh(wide, small.layout, draw) for e, small in server.nets.items()}
        server.growers, server.weights = {}, {}  # of every client: its own filters, and its v

    def round(self, server, cohort):
        wide = self.polished(server, server.model)
        server.filters = {e: self.fitted(server, f, self.shrunk(server, wide, e)) for e, f in server.filters.items()}
        replies = cohort.call(self.local, model=self.parts(server, wide, cohort))
        if not replies:
            return
        grown = {up.client: self.grown(server, up.client, self.polished(server, up.model)) for up in replies}
        total, sizes = sum(up.n for up in replies), {up.client: up.n for up in replies}
        v = {k: {"v": server.weights.get(k, torch.ones_like(w.flat))} for k, w in grown.items()}

        def mixed(v):
            return sum(sizes[k] / total * (w.map(lambda x, k=k: v[k]["v"] * x)) for k, w in grown.items())

        v = self.fitted(server, v, mixed)
        server.weights = server.weights | {k: its["v"] for k, its in v.items()}
        server.model = mixed(v)

    def polished(self, server, w):
        """A model after some epochs on the public data."""
        if not self.public_epochs:
            return w
        return server.descend(w, self.public_lr, self.public_epochs, batch=self.batch, optimizer=Adam())[0]

    def shrunk(self, server, wide, e):
        """What filters make of a large model: the small one of size e."""
        return partial(through, wide, server.nets[e].layout, grow=False)

    def grown(self, server, k, w):
        """A client's model in the large layout, through filters of its own."""
        wide = server.model.layout
        if w.layout == wide:
            return w
        filters = server.growers.get(k) or server.site.to_device(fresh(wide, w.layout, server.rng("growers")))
        filters = self.fitted(server, filters, partial(through, w, wide, grow=True))
        server.growers = server.growers | {k: filters}
        return through(w, wide, filters, grow=True)

    def fitted(self, server, given, make):
        """What is given by name, tensors by name, fitted so that the model that is made of it does well."""
        data = server.own.all()
        seen, held = (type(data)(data.x[mask], data.y[mask]) for mask in parted(data))
        given = {name: {part: t.clone().requires_grad_() for part, t in its.items()} for name, its in given.items()}
        optimizer = torch.optim.Adam([t for its in given.values() for t in its.values()], lr=self.fit_lr)
        best, least = None, float("inf")
        for epoch in range(self.fit_epochs + 1):
            loss = server.task.criterion(server.scores(make(given), held.x), held).item()
            if best is None or loss < least:
                least, best = loss, {n: {p: t.detach().clone() for p, t in its.items()} for n, its in given.items()}
            order = torch.randperm(len(seen), generator=server.rng("fit")).split(self.batch or len(seen))
            for rows in order if epoch < self.fit_epochs else ():
                batch = type(data)(seen.x[rows], seen.y[rows])
                optimizer.zero_grad()
                server.task.criterion(server.scores(make(given), batch.x), batch).backward()
                optimizer.step()
                server.meter(1, len(rows))
        return best

    def parts(self, server, wide, clients):
        """What each client has of a large model."""
        models = {0: wide} | {int(e): self.shrunk(server, wide, e)(f) for e, f in server.filters.items()}
        return Each({k: models[self.sizes[k % len(self.sizes)]] for k in clients})

    @client
    def local(self, client, model):
        return {"model": client.descend(model, self.lr, self.epochs, batch=self.batch)[0], "n": client.n}

    @client
    def predict(self, client, model):
        return model

    def predict_message(self, server, clients):
        return {"model": self.parts(server, server.model, clients)}


def parted(data):
    """Which rows a fit sees, and which it is judged by: every fifth."""
    held = torch.arange(len(data), device=data.y.device) % 5 == 4
    return ~held, held
