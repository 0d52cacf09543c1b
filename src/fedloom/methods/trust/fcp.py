"""FCP."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.plugin import Plugin
from fedloom.ranges import Log


@dataclass(frozen=True)
class FCP(Plugin):
    """How can clients calibrate one threshold together, so that prediction sets hold the truth as often as promised?

    Lu, Yu, Karimireddy, Jordan, Raskar: Federated Conformal Predictors for Distributed Uncertainty Quantification, ICML
    2023, arXiv 2305.17564 (official code clu5/federated-conformal).

        any method to its end;  then once, with p = softmax(f(x)) on each client's held-out samples:
        client k:  s = 1 - p_y (lac), or the sum of the sorted p down to y (aps);  send a sketch of s, and n_k
        server:    q <- the ceil((N + K) (1 - alpha))-th smallest of all N scores; infinite if there are fewer
        set of x:  {c: s(x, c) <= q}

    Departures:
    1. Held out are the validation samples. If they also chose the round or a hyper-parameter, the guarantee holds
       only as nearly as that choice is harmless.
    2. A sketch is every client's scores at evenly spaced ranks with the number each stands for; its error is at most
       1 / sketch of the ranks. The official code merges t-digests and rounds the level to whole percents.
    3. APS is not randomised, and empty sets are kept: forcing the top class in would raise the coverage.
    4. No temperature, and no regularized APS; the training by TCT is any `inner` method.

    Identities: one client gives split conformal prediction; exact scores give one q however dealt to K clients.
    """

    inner: Method = FedAvg()  # the method that trains
    # alpha: share of samples whose set may lack the truth, as in the paper
    alpha: Annotated[float, Log(0.01, 0.5)] = 0.1
    score: Literal["lac", "aps"] = "lac"  # what is compared with q; lac is what the official code recommends
    pool: Literal["exact", "sketch", "mean"] = "sketch"  # all scores, sketches of them, or the mean of local thresholds
    sketch: int = 100  # ranks a sketch has, as many as centroids in the official code's digests

    by_class = True

    def setup(self, server, clients):
        self.inner.setup(server, clients)
        server.threshold = None

    def finish(self, server, clients):
        self.inner.finish(server, clients)
        replies = [up for up in clients.call(self.calibrate, **self.inner.predict_message(server, clients)) if up.n]
        if self.pool == "mean":
            local = [threshold(up.scores, up.counts, up.n, 1, self.alpha) for up in replies]
            server.threshold = sum(local) / len(local) if local else math.inf
            return
        n = sum(up.n for up in replies)
        scores = torch.cat([up.scores for up in replies] or [torch.zeros(0)])
        counts = torch.cat([up.counts for up in replies] or [torch.zeros(0)])
        server.threshold = threshold(scores, counts, n, len(replies), self.alpha)

    @client
    def calibrate(self, client, **message):
        scores = self.judging(client, "validation", **message)[1].sort().values
        if self.pool == "sketch" and len(scores) > self.sketch:
            ends = torch.linspace(0, len(scores), self.sketch + 1).round().long()[1:]
            counts = ends.diff(prepend=ends.new_zeros(1))
            return {"scores": scores[ends - 1], "counts": counts.int(), "n": len(scores)}
        return {"scores": scores, "counts": torch.ones(len(scores), dtype=torch.int32), "n": len(scores)}

    @client
    def evaluate(self, client, threshold, **message):
        measured = self.inner.evaluate(client, **message)
        if threshold is None or not measured["test"]["n"]:
            return measured
        every, true = self.judging(client, "test", **message)
        covered = {
            "coverage": float((true <= threshold).double().mean()),
            "set_size": float((every <= threshold).double().sum(1).mean()),
        }
        return measured | {"test": measured["test"] | covered}

    @client
    def join(self, client, threshold, **message):
        self.inner.join(client, **message)

    def predict_message(self, server, clients):
        return self.inner.predict_message(server, clients) | {"threshold": server.threshold}

    def judging(self, client, split, **message):
        """The scores of all classes [n, C] and of the true one [n] for a client's samples of a split."""
        x, y = client.task.data(client.id, split).all()
        if not len(y):
            return torch.zeros(0, client.task.classes), torch.zeros(0)
        judged = self.inner.predict(client, **message)
        if isinstance(judged, dict):  # several by name, of which the first is the main one
            judged = next(iter(judged.values()))
        with torch.no_grad():
            outputs = judged(x) if callable(judged) else client.scores(judged, x)
        every = SCORES[self.score](outputs.softmax(1))
        return every, every.gather(1, y[:, None])[:, 0]


def lac(p):
    """1 - p, [n, C]."""
    return 1 - p


def aps(p):
    """The sum of the probabilities at least as large, [n, C]."""
    ordered, order = p.sort(descending=True, dim=1)
    return torch.zeros_like(p).scatter(1, order, ordered.cumsum(1))


SCORES = {"lac": lac, "aps": aps}


def threshold(scores, counts, n, clients, alpha):
    """The score of rank ceil((n + clients)(1 - alpha)), each standing for a count; infinite beyond the n-th."""
    # Ten digits: (9 + 1) 0.9 is not 9.000000000000002.
    rank = math.ceil(round((n + clients) * (1 - alpha), 10))
    if rank > n:
        return math.inf
    ordered, order = scores.sort()
    place = torch.searchsorted(counts[order].cumsum(0), rank)
    return float(ordered[place])
