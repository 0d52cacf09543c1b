"""Learned digital codes over the air."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch.nn import functional as F

from fedloom.cohort import Once
from fedloom.method import Method, client
from fedloom.methods.aggregate._counting import Decoder, whole
from fedloom.ops.adam import Adam
from fedloom.ranges import LearningRate, Log, Positive
from fedloom.task import Batch
from fedloom.vector import Vector


@dataclass(frozen=True)
class OTACodes(Method):
    """Can replies be summed in the air as words of a code, if the code and its decoder are learned together?

    Tarizzo, Kazemi, Gündüz: Learned Digital Codes for Over-the-Air Federated Learning, 2025, arXiv 2509.16577 (official
    code tonytarizzo/AMP-DA-Net).

        server:    Q <- n blocks of its own update by k-means++, the most popular first;  send w, Q and, once, C
        client k:  u <- local SGD's difference + e_k, in S blocks of length L;  i_s <- the block of Q nearest to u_s
                   e_k <- u - Q[i];  send C[i_1] .. C[i_S], all clients at once
        server:    y = sum_k C[i^k] + noise;  x, K <- decoder(y), made whole;  w <- w + eta_g (x Q) / K

    Before the first round C and the decoder learn by Adam to find counts again at 0 to 20 dB:
    |x - x'|^2 + 1e-3 mean|x'| / mean|x| + 1e-3 |W'W - 1|^2 + 1e-2 (K - K')^2, with C = rows of C_0 W, of length 1.

    Departures:
    1. The server's update is made on public data. In the official code it is the first client's, which leaks it.
    2. Counts to learn from are drawn, with popularities of a random Zipf law; the official code records a training run.
       K begins at the number of clients asked, and popularities are counted with one added to each.
    3. Q has a block of zeros, so that no block becomes longer by its quantization.
    4. Running statistics travel beside the code, as they are, and are divided by the number of replies (by K there).
    5. The noise is that of the setting `channel`: `air:10`. The official code has a level of its own for each row.

    Identities: codes that do not overlap are counted exactly, and the update is then the mean of quantized differences;
    what was sent and what is left add up to all differences; S d uses of the channel, however many clients there are.
    """

    lr: LearningRate = 0.05  # local learning rate; the official recipes take 0.01
    epochs: Positive[int] = 1  # local epochs; the official recipes take 3
    batch: int = 10  # batch size; the official recipes take 20
    server_lr: Annotated[float, Log(0.1, 1.0)] = 1.0  # eta_g, as in the official recipes
    words: Positive[int] = 32  # n: words of the code; 128 in the official recipes
    length: Positive[int] = 32  # d: length of a word; 64
    block: Positive[int] = 4  # L: parameters a word; 20
    layers: Positive[int] = 3  # T: layers of the decoder; 10
    filters: Positive[int] = 8  # of its networks; 32
    train: int = 40  # steps of Adam before the first round; the official recipe takes two million
    train_lr: Positive[float] = 0.01  # Adam's rate; 1e-4
    rows: Positive[int] = 32  # rows a step; 64 in the official recipe
    blend: Positive[float] = 0.1  # share of the networks to begin with; 0.85, after which little training does not do

    needs = ("public",)
    rough = True
    light = {"train": 5, "layers": 1}
    refuses = {"aggregate": "a robust rule would choose among words of a code, of which only the sum is meant"}

    def networks(self, site):
        return {"decoder": site.network(Decoder, self.words, self.length, self.layers, self.filters, self.blend)}

    def setup(self, server, clients):
        w, moments, draw, adam = server.nets["decoder"].clone(), {}, server.rng("counts"), Adam(self.train_lr)
        for _ in range(self.train):
            counts, noise, popular, asked = sample(self.words, self.length, self.rows, min(len(clients), 20), draw)
            loss = partial(coding, popular=popular.to(w.flat), asked=asked)
            gradient = server.grad(w, Batch(counts.to(w.flat), noise.to(w.flat)), loss)
            w, moments = adam.step(w, gradient, moments)
        server.decoder = w
        server.code = server.net(w).code()

    def round(self, server, cohort):
        own, _ = server.descend(server.model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        blocks = self.blocks((own - server.model).params.flat)
        quantizer, popular = self.quantizer(blocks, server.rng("quantizer"))
        up = cohort.mean(self.local, model=server.model, quantizer=quantizer, code=Once(server.code))
        counts, senders = self.decoded(server, up.symbols * up.count, popular, len(cohort))
        server.log(senders=senders, sent=up.count)
        moved = (counts @ quantizer).flatten()[: server.layout.split] / senders
        model = server.model.merge(server.model.params + self.server_lr * Vector(moved, server.model.params.layout))
        server.model = model.merge(server.model.buffers + up.statistics)

    def decoded(self, server, received, popular, asked):
        """How many sent each word in each row of what was received [S, d]: [S, n], and how many sent at all."""
        guess, senders = server.net(server.decoder)(received, popular, asked)
        senders = max(1, round(float(senders)))
        return whole(guess, received, server.code, senders), senders

    @client
    def local(self, client, model, quantizer, code):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        delta = (w - model).params.flat
        whole = delta + client.state.get("residual", torch.zeros_like(delta))
        blocks = self.blocks(whole)
        nearest = torch.cdist(blocks, quantizer).argmin(1)
        client.state["residual"] = whole - quantizer[nearest].flatten()[: len(whole)]
        return {"symbols": code[nearest], "statistics": (w - model).buffers}

    def blocks(self, flat):
        """Numbers [D] as blocks [S, L], zeros behind the last."""
        return F.pad(flat, (0, -len(flat) % self.block)).view(-1, self.block)

    def quantizer(self, blocks, draw):
        """Blocks Q [n, L], the most popular among `blocks` [S, L] first, and their popularities [n]."""
        chosen = [torch.zeros_like(blocks[0])]
        apart = blocks.square().sum(1)
        while len(chosen) < self.words and apart.max() > 0:
            place = torch.multinomial(apart.double().cpu(), 1, generator=draw).item()
            chosen.append(blocks[place])
            apart = torch.minimum(apart, (blocks - blocks[place]).square().sum(1))
        found = F.pad(torch.stack(chosen), (0, 0, 0, self.words - len(chosen)))
        counts = torch.cdist(blocks, found).argmin(1).bincount(minlength=self.words)
        order = counts.argsort(descending=True, stable=True)
        return found[order], (counts[order] + 1.0) / (counts.sum() + self.words)


def sample(words, length, rows, most, draw):
    """Counts [B, n] of at most `most`, noise [B, d] on a signal of size 1, popularities [n], how many were asked."""
    asked = int(torch.randint(1, most + 1, (), generator=draw))
    senders = asked - int(torch.randint(asked // 3 + 1, (), generator=draw))
    popular = torch.arange(1.0, words + 1) ** -(2 * torch.rand((), generator=draw))
    popular = popular / popular.sum()
    sent = torch.multinomial(popular.expand(rows, -1), senders, replacement=True, generator=draw)
    counts = torch.zeros(rows, words).scatter_add(1, sent, torch.ones(rows, senders))
    level = 10 ** (-torch.rand((), generator=draw))  # 0 to 20 dB
    return counts, level * torch.randn(rows, length, generator=draw), popular, asked


def coding(net, batch, popular, asked):
    """How far a decoder is from the counts [B, n] in a batch's inputs; its targets are the noise."""
    counts, noise = batch
    signal = counts @ net.code()
    found, senders = net(signal + noise * signal.square().mean(1, keepdim=True).sqrt(), popular, asked)
    turned = (net.turn.T @ net.turn - torch.eye(len(net.turn)).to(counts)).square().sum()
    sparse = found.abs().mean() / counts.abs().mean()
    missed = (senders - counts.sum(1).mean()).square()
    return F.mse_loss(found, counts) + 1e-3 * sparse + 1e-3 * turned + 1e-2 * missed
