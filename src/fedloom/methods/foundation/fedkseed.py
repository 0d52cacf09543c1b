"""FedKSeed."""

from dataclasses import dataclass
from typing import Annotated

import torch

from fedloom.errors import UsageError
from fedloom.message import Seed
from fedloom.method import Method, client
from fedloom.random import seed_of
from fedloom.ranges import Log, Positive
from fedloom.vector import Vector


@dataclass(frozen=True)
class FedKSeed(Method):
    """Can all weights of a large model be tuned while a message is a few thousand bytes, whatever the model's size?

    Qin, Chen, Qian, Ding, Li, Deng: Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication
    Cost under 18 Kilobytes, ICML 2024, arXiv 2312.06353 (official code alibaba/FederatedScope, branch FedKSeed).

        everybody: w = w_0 - eta sum_k a_k z(s_k)   from K candidate seeds s_k and their coefficients a
        client i:  tau times:  a seed s_k of the K, a batch b;  g = (l(w + eps z; b) - l(w - eps z; b)) / 2 eps
                   w <- w - eta g z;  send all (k, g)   with z = z(s_k)
        server:    a_k <- a_k + sum_i p_i g   over all pairs of client i, whose share of the samples is p_i
        Pro:       seeds are drawn with softmax of the scaled mean |g| that each has had

    Departures:
    1. Noise comes from numpy's generator, the same on every machine; the official code seeds torch's.
    2. Coefficients go down in single precision, also for the server's own model; they are summed in double.
    3. p_i counts samples, the official code whole batches: they agree but for the last batch of a client.
    4. Of a seed's past the sum and the number of clipped |g| are kept, which is all that Pro needs.
    5. Networks run in evaluation mode; running statistics stay as they were at the start.

    Identities: the server rebuilds the model of a lone client; w_r - w_0 lies in the span of K vectors.
    """

    # eta: constant, or replaying is wrong; 3e-7 for language models in the official code
    lr: Annotated[Positive[float], Log(1e-4, 0.1)] = 0.02
    seeds: int = 256  # K: candidate seeds; the official code takes 4096, its example commands 1024
    steps: int = 30  # tau: local steps; the official code takes 200
    batch: int = 10  # batch size; the official code takes 1
    eps: float = 5e-4  # eps: half the distance of the two losses' points, as in the official code
    pro: bool = False  # FedKSeed-Pro: whether seeds with large gradients are drawn more often
    clip: float = 1000.0  # bound on |g| in Pro's histories, as in the official code

    light = {"steps": 4, "seeds": 32}

    def __post_init__(self):
        Method.__post_init__(self)
        if self.seeds < 1 or self.eps == 0:
            raise UsageError(f"fedkseed.seeds is {self.seeds}, fedkseed.eps {self.eps}; both must be above 0")

    def setup(self, server, clients):
        server.start = server.model
        server.coefficients = torch.zeros(self.seeds, dtype=torch.float64)
        server.past = torch.stack([torch.zeros(self.seeds), torch.ones(self.seeds)])  # sums of |g|, and their numbers
        server.master = int(torch.randint(2**31, (), generator=server.rng("seeds")))

    def round(self, server, cohort):
        odds = self.odds(server.past) if self.pro else None
        message = {"coefficients": server.coefficients.float(), "odds": odds, "master": server.master}
        replies = cohort.call(self.local, **message)
        if not replies:
            return
        total = sum(up.n for up in replies)
        coefficients, past = server.coefficients.cpu().clone(), server.past.cpu().clone()
        for up in replies:
            index = up.index.long().cpu()
            coefficients.index_add_(0, index, up.n / total * up.slope.double().cpu())
            past[0].index_add_(0, index, up.slope.cpu().abs().clamp(max=self.clip))
            past[1].index_add_(0, index, torch.ones(len(index)))
        server.coefficients, server.past = coefficients, past
        server.model = self.rebuilt(server.start, coefficients.float(), server.master)

    def rebuilt(self, start, coefficients, master):
        """w_0 - eta sum_k a_k z(s_k)."""
        flat = start.params.flat.clone()
        for k, a in enumerate(coefficients.tolist()):
            if a:
                flat -= self.lr * a * noise(master, k, flat)
        return start.merge(Vector(flat, start.params.layout))

    def odds(self, past):
        """The probabilities [K] with which Pro draws the seeds."""
        mean = past[0] / past[1]
        return ((mean - mean.min()) / (mean.max() - mean.min() + 1e-10)).softmax(0)

    @client
    def local(self, client, coefficients, odds, master):
        start = self.rebuilt(client.initial, coefficients, master)
        flat, layout = start.params.flat, start.params.layout
        net, loss = client.net(start), client.task.loss
        held = layout.held(net)

        def value(at, batch):
            for tensor, view in zip(held, layout.views(at), strict=True):
                tensor.data.copy_(view)
            return loss(net, batch).double()

        weights = torch.ones(self.seeds) if odds is None else odds.cpu()
        drawn = torch.multinomial(weights, self.steps, replacement=True, generator=client.rng("seeds"))
        slopes, losses = [], []
        with torch.no_grad():
            for k, batch in zip(drawn.tolist(), client.batches(self.batch, steps=self.steps), strict=True):
                z = noise(master, k, flat)
                above, below = value(flat + self.eps * z, batch), value(flat - self.eps * z, batch)
                client.meter(1, len(batch))
                g = (above - below) / (2 * self.eps)
                flat = flat - self.lr * g.where(g == g, 0.0) * z  # a loss that is no number skips the step
                slopes.append(g)
                losses.append((above + below) / 2)
        slope, loss = torch.stack(slopes).cpu(), torch.stack(losses).cpu()
        taken = slope == slope
        if taken.any():
            client.log(loss=loss[taken].mean())
        dtype = torch.int16 if self.seeds <= 2**15 else torch.int32
        return {"index": drawn[taken].to(dtype), "slope": slope[taken].float(), "n": client.n}


def noise(master, k, like):
    """z(s_k), [P]: drawn anew from its seed whenever it is needed."""
    return Seed(seed_of(master, "fedkseed", k)).expand(len(like)).to(like)
