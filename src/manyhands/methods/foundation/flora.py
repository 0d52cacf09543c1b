"""FLoRA."""

from dataclasses import dataclass

import torch

from manyhands.cohort import Each
from manyhands.errors import UsageError
from manyhands.method import Method, client
from manyhands.nets.adapters import SCALE


@dataclass(frozen=True)
class FLoRA(Method):
    """How can low-rank adapters of different ranks be aggregated without the cross terms of averaged factors?

    Wang, Shen, He, Sun, Wang, Lyu, Li: FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
    Adaptations, NeurIPS 2024, arXiv 2409.05976 (official code ATP-1010/FederatedLLM).

        client k:  A_k: fresh, B_k = 0, of its own rank r_k;  E epochs of SGD on A_k, B_k and the head
                   send A_k [r_k, in], B_k [out, r_k], n_k
        server:    A <- stack of p_k A_k;  B <- B_k side by side;  so that  B A = sum_k p_k B_k A_k
                   W <- W + s B A

    Departures:
    1. W = W_0 + D: the frozen W_0 is everywhere, D goes down whole, as the vector's buffers. The official code sends
       the stacks, which are shorter where few clients of small rank take part.
    2. SGD in place of AdamW; no drop-out. The scale s = 2 is that of the official configuration, alike for all ranks.
    3. Heads, where the network has one, are averaged by samples as in FedAvg.
    4. The room for D is in a network of FLoRA's own (`merging:RANK`), so that plain LoRA sends its factors only.

    Identities: D grows by the exact mean of the products; one client gives LoRA merged; adapters begin at zero.
    """

    lr: float = 0.1  # learning rate; the official code takes 3e-4 with AdamW
    epochs: int = 1  # E: local epochs, as in the official code
    batch: int = 10  # batch size; 128 in the official code
    ranks: tuple[int, ...] = (4,)  # r_k, dealt to the clients in turn; 64 to 4 in the official heterogeneous runs

    needs = ("finetune",)
    refuses = {
        "secure": "clients send factors of different shapes",
        "aggregate": "it aggregates products itself",
        "buffers": "the merged update travels in the vector's buffers",
    }
    ranges = {"lr": (1e-3, 1.0, "log")}

    def __post_init__(self):
        Method.__post_init__(self)
        if not self.ranks or min(self.ranks) < 1:
            raise UsageError(f"flora.ranks are {self.ranks}; each must be at least 1")

    def setup(self, server, clients):
        server.model = self.network(server, 0).merge(server.model.select("head.*"))

    def network(self, node, client):
        """The network of a client's rank, made known at this node; its weights."""
        return node.network(f"merging:{self.ranks[client % len(self.ranks)]}")

    def round(self, server, cohort):
        self.network(server, 0)  # a resumed server has had no setup
        names = adapters(server.model.layout)
        merged = server.model.select("head.*", *(f"{name}.update" for name in names))
        replies = cohort.call(self.local, model=Each(dict.fromkeys(cohort, merged)))
        if not replies:
            return
        total = sum(up.n for up in replies)
        moved = merged.clone()
        for name in names:
            a = torch.cat([up.n / total * up.factors[name][0] for up in replies])  # the weight goes on one factor only
            b = torch.cat([up.factors[name][1] for up in replies], 1)
            moved[f"{name}.update"].add_(SCALE * b @ a)
        for name in moved:
            if name.startswith("head."):
                moved[name].copy_(sum(up.n / total * up.head[name] for up in replies))
        server.model = server.model.merge(moved)

    @client
    def local(self, client, model):
        fresh = self.network(client, client.id).clone()
        draw = client.rng("adapters")
        for name in adapters(fresh.layout):
            a = fresh[factor(fresh.layout, name, "lora_A")]
            a.copy_(((2 * torch.rand(a.shape, generator=draw) - 1) / a.shape[1] ** 0.5).to(a))  # Kaiming, as in PEFT
        w, _ = client.descend(fresh.merge(model), lr=self.lr, epochs=self.epochs, batch=self.batch)
        factors = {
            name: [w[factor(w.layout, name, part)].clone() for part in ("lora_A", "lora_B")]
            for name in adapters(w.layout)
        }
        head = {name: w[name].clone() for name in w if name.startswith("head.")}
        return {"factors": factors, "head": head, "n": client.n}

    @client
    def predict(self, client, model):
        self.network(client, 0)
        return model


def adapters(layout):
    """The names of the layers that have an adapter."""
    found = [name.removesuffix(".update") for name in layout.names if name.endswith(".update")]
    if not found:
        raise UsageError("flora needs a network with low-rank adapters: problem=finetune:lora")
    return found


def factor(layout, name, part):
    """The entry of a layer's factor: `lora_A` or `lora_B`, whatever PEFT calls the adapter."""
    return next(entry for entry in layout.names if entry.startswith(f"{name}.{part}."))
