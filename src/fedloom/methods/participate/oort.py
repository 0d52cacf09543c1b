"""Oort."""

from dataclasses import dataclass
from math import log, sqrt
from typing import Annotated

import torch

from fedloom.cohort import Cohort
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.plugin import Plugin
from fedloom.ranges import Linear


@dataclass(frozen=True)
class Oort(Plugin):
    """Can clients be chosen that have much to teach and are fast, without losing sight of the others?

    Lai, Zhu, Madhyastha, Chowdhury: Oort: Efficient Federated Learning via Guided Participant Selection, OSDI 2021,
    arXiv 2010.06081 (Algorithm 1; code in SymbioticLab/FedScale).

        participant k:  U_k = n_k sqrt(mean of squared losses of its samples);   send it
        server:         a share e of the places explores clients never tried, with chances by their speed
                        the rest exploits:  minmax(min(U_k, 95th percentile)) + sqrt(0.1 ln t / l_k)
                        times (T / t_k)^a if k takes longer than T;   draw, by this score, among those that have at
                        least 95 % of the last place's
                        e <- max(0.2, 0.98 e)

    Departures:
    1. Losses are of the received model and of single samples, taken in a call of their own before the round of `inner`.
    2. t_k is n_k over the speed that k registered (1 if clients are alike); T is a quantile of it and has no pacer.
    3. The min-max is that of the released code (FedScale); its blacklist of clients chosen often is left out.

    Identities: as many chosen as there are clients: `inner`, but for its streams.
    """

    inner: Method = FedAvg()  # the method whose clients are chosen
    chosen: int = 3  # clients in a round; the paper takes 100 of thousands
    explore: float = 0.9  # e: share of the unknown in the first round, as in the paper
    fading: float = 0.98  # of e, as in the paper
    least: float = 0.2  # of e, as in the paper
    alpha: Annotated[float, Linear(0.0, 5.0)] = 2.0  # a: penalty of slow clients, as in the paper
    quantile: float = 0.5  # of durations, that T is; ours
    cutoff: float = 0.95  # share of the last place's score from which on clients may be drawn, as in the paper

    refuses = {
        "cohort": "it chooses by itself; set chosen",
        "participation": "it chooses by itself",
        "dp=sample": "clients tell how large their losses are, which no gradient's noise protects",
    }

    def setup(self, server, clients):
        server.utility, server.tried = {}, {}  # U, and the round in which it was told
        self.inner.setup(server, clients)

    def select(self, server, clients):
        known = [k for k in clients if k in server.tried]
        new = [k for k in clients if k not in server.tried]
        share = max(self.least, self.explore * self.fading ** (server.round - 1))
        places = min(self.chosen, len(clients))
        fresh = max(places - len(known), min(len(new), round(share * places)))
        took = {k: duration(clients, k) for k in clients}
        chosen = drawn({k: speed(clients, k) for k in new}, fresh, server.rng("explore"))
        if places > fresh:
            score = self.scores(server, known, took)
            bar = self.cutoff * sorted(score.values(), reverse=True)[places - fresh - 1]
            able = {k: value for k, value in score.items() if value >= bar}
            chosen += drawn(able, places - fresh, server.rng("exploit"))
        return clients.where(chosen)

    def scores(self, server, known, took):
        """What each client that was tried promises."""
        useful = torch.tensor([server.utility[k] for k in known], dtype=torch.float64)
        useful = useful.clamp(max=useful.quantile(0.95).item())
        width = float(useful.max() - useful.min()) or 1.0
        wanted = torch.tensor(list(took.values()), dtype=torch.float64).quantile(self.quantile).item()
        score = {}
        for k, value in zip(known, useful.tolist(), strict=True):
            long_ago = sqrt(0.1 * log(max(1, server.round)) / max(1, server.tried[k]))
            slow = (wanted / took[k]) ** self.alpha if took[k] > wanted else 1.0
            score[k] = ((value - float(useful.min())) / width + long_ago) * slow
        return score

    def round(self, server, cohort):
        told = {reply.client: reply.utility for reply in cohort.call(self.judge, model=server.model)}
        server.tried = server.tried | dict.fromkeys(told, server.round)  # who did not answer is as unknown as before
        server.utility = server.utility | told
        self.inner.round(server, cohort)

    @client
    def judge(self, client, model):
        x, _ = client.data.all()
        with torch.no_grad():
            out = client.scores(model, x)
            singles = enumerate(client.data.pieces(1))
            losses = torch.stack([client.task.criterion(out[i : i + 1], one) for i, one in singles])
        return {"utility": client.n * float(losses.double().square().mean().sqrt())}


def speed(clients: Cohort, k):
    """What a client registered; 1 if all are alike."""
    return clients.info(k).get("speed", 1.0)


def duration(clients: Cohort, k):
    """How long a client takes, up to a factor: samples over speed."""
    return clients.info(k)["n"] / speed(clients, k)


def drawn(weights, count, generator):
    """So many keys without replacement, with chances in proportion to their weights."""
    keys = list(weights)
    if count <= 0 or count >= len(keys):
        return keys[: max(0, count)]
    values = torch.tensor([weights[k] for k in keys], dtype=torch.float64).clamp(min=1e-12)
    return [keys[place] for place in torch.multinomial(values, count, generator=generator).tolist()]
