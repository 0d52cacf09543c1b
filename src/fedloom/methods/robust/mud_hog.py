"""MUD-HoG."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from fedloom.aggregators.stacked import average, columnwise, middle, norms, squared_distances
from fedloom.method import Method, client
from fedloom.ops.kmeans import kmeans
from fedloom.ranges import LearningRate, Positive
from fedloom.vector import Vector

DELAYS = {"sign_flip": 1, "untargeted": 1, "targeted": 2}  # times the delay until it is confirmed
NEW = (0, 0, "", False)  # a client's record: rounds found in a row, doubts, what is confirmed, whether unreliable


@dataclass(frozen=True)
class MudHog(Method):
    """Can long and short histories of updates tell honest, unreliable and malicious clients apart, kind by kind?

    Gupta, Luo, Ngo, Das: Long-Short History of Gradients Is All You Need: Detecting Malicious and Unreliable Clients in
    Federated Learning, ESORICS 2022, arXiv 2208.10273 (official code LabSAINT/MUD-HoG_Federated_Learning).

        client k:   delta_k <- E epochs of SGD from w, minus w
        server:     L_k <- L_k + delta_k (long);    S_k <- mean of the last K updates (short);    after tau_0 rounds:
         sign flip  cos(S_k, median of S) < 0
         untargeted of the rest: an outlier of DBSCAN on S, beyond the widest gap from the largest cluster's median
         targeted   of the rest: the smaller part of 2-means on L
         confirmed  when found so 2 rounds in a row, 4 for targeted; released after two clean ones
         unreliable when cos(S_k, median of S) was below the widest gap more than twice
                    w <- w + mean of delta_k over who is neither confirmed nor found untargeted or targeted just now

    Departures:
    1. Histories live at the server, without running statistics; who does not reply keeps its own. A client is of one
       kind at a time. eps is by default the median distance between two S, as the official 0.5 fits one network.
    2. The largest cluster is one of DBSCAN's, as in the paper; the official code takes its most frequent label, and
       where that is the label of outliers, it finds nobody untargeted.

    Identities: the first tau_0 rounds are FedAvg with equal weights; after T equal updates u, L = T u and S = u.
    """

    lr: LearningRate = 0.05  # eta: local learning rate; official: 0.01, with momentum 0.9 and weight decay 1e-4
    epochs: Positive[int] = 1  # E: local epochs; official: 4
    batch: int = 10  # local batch size; official: 64
    short: int = 3  # K: updates in the short history; official
    start: int = 3  # tau_0: rounds before anybody is judged; official
    delay: int = 2  # rounds in a row before a finding is confirmed, twice that for targeted; official
    eps: float | None = None  # DBSCAN's radius; null: the median distance (official: 0.5, 50 for a ResNet)
    neighbours: int = 5  # DBSCAN's min_samples; official
    unreliable_weight: float = 1.0  # of unreliable clients in the mean; official code (the paper softens it)

    compressible = private = ("delta",)
    refuses = dict.fromkeys(("aggregate", "dp=client"), "the server judges every update by its client's history")

    def setup(self, server, clients):
        server.flagged, server.history, server.record = [], {}, {}  # by client: (L_k, last K), NEW

    def round(self, server, cohort):
        replies = cohort.call(self.local, model=server.model)
        past = {}
        for reply in replies:
            long, recent = server.history.get(reply.client, (0.0, []))
            past[reply.client] = (reply.delta.params + long, [*recent, reply.delta.params][-self.short :])
        server.history = server.history | past
        weight = torch.ones(len(past), dtype=torch.float64)
        if replies and server.round > self.start:
            long = torch.stack([v.flat for v, _ in past.values()])
            short = torch.stack([sum(v.flat for v in recent) / len(recent) for _, recent in past.values()])
            weight = self.weigh(server, list(past), long, short)
            server.flagged = [k for k, own in zip(past, weight.tolist(), strict=True) if not own]
        if weight.any():
            up = torch.stack([reply.delta.flat for reply in replies])
            server.model = server.model + Vector(average(up, weight.to(up.device) / weight.sum()), server.model.layout)

    @client
    def local(self, client, model):
        return {"delta": client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)[0] - model}

    def weigh(self, server, ids, long, short):
        """The weights [K] of the updates of `ids`, from their histories [K, D]; moves their records."""
        known = [server.record.get(k, NEW) for k in ids]
        now = ["sign_flip" if c < 0 else "" for c in cosines(short, short[[not r[2] for r in known]])]
        left = [i for i, r in enumerate(known) if not now[i] and r[2] != "sign_flip"]
        for place in outliers(short[left], self.eps, self.neighbours):
            now[left[place]] = "untargeted"
        left = [i for i in left if not now[i] and known[i][2] != "untargeted"]
        for place in minority(long[left], server.rng("clusters")):
            now[left[place]] = "targeted"
        known = [confirmed(record, finding, self.delay) for record, finding in zip(known, now, strict=True)]
        left = [i for i, (_, _, kind, _) in enumerate(known) if not kind and now[i] != "sign_flip"]
        angles = cosines(short[left], short[left])
        low = {i for i, c in zip(left, angles, strict=True) if c < widest_gap(angles)}
        known = [doubted(record, i in low, self.delay) for i, record in enumerate(known)]
        server.record = server.record | dict(zip(ids, known, strict=True))
        server.log(malicious=sum(bool(r[2]) for r in known), unreliable=sum(r[3] for r in known))
        keep = [not r[2] and kind not in ("untargeted", "targeted") for r, kind in zip(known, now, strict=True)]
        weight = [float(k) * (self.unreliable_weight if r[3] else 1) for k, r in zip(keep, known, strict=True)]
        return torch.tensor(weight, dtype=torch.float64)


def confirmed(record, now, delay):
    """A client's record after it was found to do `now`, or "" for nothing."""
    found, doubts, kind, unreliable = record
    if now:
        return found + 1, doubts, now if found + 1 >= DELAYS[now] * delay else kind, unreliable
    if kind == "untargeted" and found:  # perhaps its data are poor
        return (0, doubts + 1, "", True) if doubts + 1 >= delay else (0, doubts + 1, kind, unreliable)
    return 0, doubts, kind if found else "", unreliable


def doubted(record, low, delay):
    """A client's record after its update lay far from the common direction, or did not."""
    found, doubts, kind, unreliable = record
    if low:
        return found, doubts + 1, kind, unreliable or doubts >= delay
    return found, max(doubts - 1, 0), kind, unreliable and doubts > 0


def cosines(rows, some):
    """The cosines of rows [K, D] with the coordinate median of some rows [M, D]; 0 where one of the two is zero."""
    return torch.cosine_similarity(rows.double(), columnwise(some, middle).double()[None], eps=1e-30).tolist()


def widest_gap(numbers):
    """The middle of the widest gap between neighbors among numbers; 0 if there is none."""
    gap, low = max(((b - a, a) for a, b in pairwise(sorted(numbers))), default=(0.0, 0.0), key=lambda pair: pair[0])
    return low + gap / 2 if gap > 0 else 0.0


def outliers(short, eps, neighbours):
    """Rows of short histories [K, D] outside DBSCAN's clusters and beyond the widest gap from the largest of them."""
    from sklearn.cluster import DBSCAN

    apart = squared_distances(short).sqrt().cpu()
    if not apart.any():
        return []
    eps = eps or apart[apart > 0].median().item() * (1 + 1e-6)  # the middle pair is near, however it is rounded
    labels = torch.from_numpy(DBSCAN(eps=eps, min_samples=neighbours, metric="precomputed").fit_predict(apart.numpy()))
    normal = labels == labels[labels >= 0].mode().values if labels.max() >= 0 else labels < 0
    away = norms(short, columnwise(short[normal.to(short.device)], middle)).cpu()
    return ((labels < 0) & ~normal & (away > widest_gap(away[~normal].tolist()))).nonzero().flatten().tolist()


def minority(long, draw):
    """Rows of long histories [K, D] in the smaller of two clusters; none if all are alike."""
    if len(long) < 3 or (long == long[0]).all():
        return []
    labels = kmeans(long, 2, draw).tolist()
    return [i for i, label in enumerate(labels) if label == int(sum(labels) * 2 <= len(labels))]
