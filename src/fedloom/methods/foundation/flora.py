"""FLoRA."""

from dataclasses import dataclass

import torch

from fedloom.cohort import Each
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.nets.adapters import SCALE
from fedloom.ranges import LearningRate, Positive


@dataclass(frozen=True)
class FLoRA(Method):
    """How can low-rank adapters of different ranks be aggregated without the cross terms of averaged factors?

    Wang, Shen, He, Sun, Wang, Lyu, Li: FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
    Adaptations, NeurIPS 2024, arXiv 2409.05976 (official code ATP-1010/FederatedLLM).

        client k:  W <- W + s B A, the stacks that have come;  A_k: fresh, B_k = 0, of its own rank r_k
                   E epochs of SGD on A_k, B_k and the head;  send A_k [r_k, in], B_k [out, r_k], n_k
        server:    A <- stack of p_k A_k;  B <- B_k side by side;  so that  B A = sum_k p_k B_k A_k
                   send A, B to everybody;  W <- W + s B A

    Departures:
    1. W = W_0 + D: the frozen W_0 is everywhere, a client keeps D. One that has missed rounds is sent their stacks, or
       D whole where that is smaller; the official code has full participation only.
    2. SGD in place of AdamW; no drop-out. The scale s = 2 is that of the official configuration, alike for all ranks.
    3. Heads, where the network trains one, are averaged by samples as in FedAvg; running statistics stay as they were.
    4. The room for D is in a network of FLoRA's own (`merging:RANK`), so that plain LoRA sends its factors only.

    Identities: D grows by the exact mean of the products, bitwise alike at server and clients; one client gives LoRA
    merged; adapters begin at zero.
    """

    lr: LearningRate = 0.1  # learning rate; the official code takes 3e-4 with AdamW
    epochs: Positive[int] = 1  # E: local epochs, as in the official code
    batch: int = 10  # batch size; 128 in the official code
    ranks: tuple[int, ...] = (4,)  # r_k, dealt to the clients in turn; 64 to 4 in the official heterogeneous runs

    needs = ("finetune",)
    factors = ("factors.*.0",)
    refuses = {
        "secure": "clients send factors of different shapes",
        "aggregate": "it aggregates products itself",
        "buffers": "the merged update is among the model's buffers",
    }

    def __post_init__(self):
        Method.__post_init__(self)
        if not self.ranks or min(self.ranks) < 1:
            raise UsageError(f"flora.ranks are {self.ranks}; each must be at least 1")

    def networks(self, site):
        return {str(rank): site.network(f"merging:{rank}") for rank in self.ranks}

    def setup(self, server, clients):
        start = self.network(server, 0).clone()
        for name, value in heads(server.model).items():
            start[name].copy_(value)
        server.model = start
        server.version, server.stacks = 0, []  # how often D has changed, and by what the last times
        server.holds = {}  # the version that a client has

    def network(self, node, client):
        """The first weights of the network of a client's rank."""
        return node.nets[str(self.ranks[client % len(self.ranks)])]

    def round(self, server, cohort):
        news = Each({k: self.news(server, k) for k in cohort})
        replies = cohort.call(self.local, head=heads(server.model), version=server.version, news=news)
        if not replies:
            return
        server.holds = server.holds | {up.client: server.version for up in replies}
        total = sum(up.n for up in replies)
        model, stack = server.model.clone(), {}
        for name in adapters(model.layout):
            a = torch.cat([up.n / total * up.factors[name][0] for up in replies])  # the weight goes on one factor only
            b = torch.cat([up.factors[name][1] for up in replies], 1)
            stack[name] = [a, b]
            model[f"{name}.update"].copy_(model[f"{name}.update"] + SCALE * b @ a)
        for name in heads(model):
            model[name].copy_(sum(up.n / total * up.head[name] for up in replies))
        server.model, server.version = model, server.version + 1
        server.stacks = shortest([*server.stacks, stack], sum(map(torch.numel, updates(model).values())))

    def news(self, server, client):
        """What a client needs to have the server's D: the stacks that it has missed, or D."""
        missed = server.version - server.holds.get(client, 0)
        if missed > len(server.stacks):
            return {"whole": updates(server.model)}
        return {"stacks": server.stacks[len(server.stacks) - missed :]}

    @client
    def local(self, client, head, version, news):
        w = self.network(client, client.id).clone()
        merged = self.merged(client, version, news, updates(w))
        draw = client.rng("adapters")
        for name, update in merged.items():
            a = w[factor(w.layout, name, "lora_A")]
            a.copy_(((2 * torch.rand(a.shape, generator=draw) - 1) / a.shape[1] ** 0.5).to(a))  # Kaiming, as in PEFT
            w[f"{name}.update"].copy_(update)
        for name, value in head.items():
            w[name].copy_(value)
        w, _ = client.descend(w, lr=self.lr, epochs=self.epochs, batch=self.batch)
        factors = {name: [w[factor(w.layout, name, part)].clone() for part in ("lora_A", "lora_B")] for name in merged}
        return {"factors": factors, "head": heads(w), "n": client.n}

    def merged(self, client, version, news, nothing):
        """The server's D of that version, by layer; the client keeps it."""
        merged, stacks = client.state.get("merged", nothing), news.get("stacks", [])
        if "whole" in news:
            merged = {name: update.clone() for name, update in news["whole"].items()}
        for stack in stacks:
            merged = {name: merged[name] + SCALE * b @ a for name, (a, b) in stack.items()}
        if version:
            client.state["merged"] = merged
        return merged


def shortest(stacks, size):
    """The last of the stacks that together hold fewer numbers than D, which has `size` of them."""
    while sum(part.numel() for stack in stacks for pair in stack.values() for part in pair) >= size:
        stacks = stacks[1:]
    return stacks


def adapters(layout):
    """The names of the layers that have an adapter."""
    return [name.removesuffix(".update") for name in layout.names if name.endswith(".update")]


def factor(layout, name, part):
    """The entry of a layer's factor: `lora_A` or `lora_B`, whatever PEFT calls the adapter."""
    return next(entry for entry in layout.names if entry.startswith(f"{name}.{part}."))


def updates(w):
    """D by layer: copies of the buffers `update`."""
    return {name: w[f"{name}.update"].clone() for name in adapters(w.layout)}


def heads(w):
    """The trained entries of the head; a language model's own head is frozen."""
    return {name: w[name].clone() for name in w if name.startswith("head.")}
