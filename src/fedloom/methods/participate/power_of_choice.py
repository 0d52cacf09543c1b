"""Power-of-Choice."""

from dataclasses import dataclass
from typing import Annotated

import torch

from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.plugin import Plugin
from fedloom.ranges import Log


@dataclass(frozen=True)
class PowerOfChoice(Plugin):
    """Does training speed up if, among some candidates, those with the highest loss are chosen?

    Cho, Wang, Joshi: Towards Understanding Biased Client Selection in Federated Learning, AISTATS 2022,
    arXiv 2010.01243 (Section 3).

        server:       d candidates, drawn without replacement with chances n_k
        candidate k:  F_k(w) on its own data, or on a few of them;   send it
        server:       the m candidates with the highest F_k take part in the round of `inner`

    Departures:
    1. `inner` is any method with a global model, not FedAvg only. Its weights stay its own.
    2. Candidates are drawn among those that can be reached; who does not reply is not chosen.

    Identities: candidates=chosen: a draw with chances n_k; chosen of the whole population: `inner` itself.
    """

    inner: Method = FedAvg()  # the method whose clients are chosen
    candidates: Annotated[int, Log(3, 30)] = 6  # d: between m and the population; the paper takes 2 m to 10 m
    chosen: int = 3  # m: clients in a round; the paper takes 3 of 100 and 10 of 100
    sample: int = 0  # samples that a loss is of, 0: all (the paper's variant cpow-d takes a batch)

    refuses = {
        "cohort": "it chooses by itself; set chosen",
        "participation": "it chooses by itself",
        "dp=sample": "clients tell how large their losses are, which no gradient's noise protects",
    }

    def __post_init__(self):
        Plugin.__post_init__(self)
        if not 1 <= self.chosen <= self.candidates:
            raise UsageError(f"power_of_choice chooses {self.chosen} of {self.candidates}; it needs 1 <= m <= d")

    def select(self, server, clients):
        sizes = torch.tensor([clients.info(k)["n"] for k in clients], dtype=torch.float64)
        count = min(self.candidates, len(clients))
        drawn = torch.multinomial(sizes, count, generator=server.rng("candidates")).tolist()
        asked = clients.where([clients[place] for place in drawn])
        if len(asked) <= self.chosen:
            return asked
        losses = {reply.client: reply.loss for reply in asked.call(self.judge, model=server.model)}
        return clients.where(sorted(losses, key=lambda k: (-losses[k], k))[: self.chosen])

    @client
    def judge(self, client, model):
        batch = next(client.batches(self.sample))
        with torch.no_grad():
            return {"loss": float(client.task.criterion(client.scores(model, batch.x), batch))}
