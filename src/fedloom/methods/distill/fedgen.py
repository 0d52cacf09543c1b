"""FedGen."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch.nn import functional as F

from fedloom.method import Method, client
from fedloom.nets.generator import FeatureGenerator
from fedloom.ops.adam import Adam
from fedloom.ranges import LearningRate, Log, Positive
from fedloom.task import Batch, Data


@dataclass(frozen=True)
class FedGen(Method):
    """Can a generator of features, learned from the clients' heads and label counts alone, teach what others know?

    Zhu, Hong, Zhou: Data-Free Knowledge Distillation for Heterogeneous Federated Learning, ICML 2021, arXiv 2105.10056
    (Algorithm 1; official code zhuangdizhu/FedGen).

        client k:  SGD on  CE + b_t KL(softmax(head(G(y))) || f(x)) + a_t CE(head(G(y')), y')   from w;  y' uniform
                   send w_k, its label counts and n_k;  (a_t, b_t) = (alpha, beta) 0.98^t, none in the first round
        server:    G <- Adam steps on  sum_k omega_k(y) CE(head_k(G(y)), y) + eta exp(-mean |z_i - z_j| |e_i - e_j|^2)
                   w <- sum_k n_k w_k / sum_k n_k;   omega_k(y) = count_k(y) / sum_j count_j(y)

    Departures:
    1. Label counts are those of the batches trained on, from 0; the official code starts them at 1, which gives
       clients a say on labels that they have not.
    2. A local step is one of `epochs` passes; the official code takes 20 steps a round.
    3. The generator is first sent in the second round, when it is first used; its running statistics are in the vector.
    4. Labels y' are those that the last cohort had; the official code draws from all of the federation.
    5. The student term of the generator's loss is not here; it is off in the official configuration.

    Identities: alpha=beta=0 is FedAvg bitwise; so is the first round.
    """

    lr: LearningRate = 0.05  # local learning rate; the official code takes 0.01
    epochs: Positive[int] = 1  # local epochs; the official code takes 20 steps
    batch: int = 10  # batch size; the official code takes 32
    alpha: Annotated[float, Log(0.1, 10.0)] = 10.0  # alpha: weight of generated features, as in the official code
    # beta: weight of the latent term; 10 on MNIST and CelebA, 1 on EMNIST
    beta: Annotated[float, Log(0.1, 10.0)] = 10.0
    eta: float = 1.0  # eta: weight of the diversity term, as in the official code
    decay: float = 0.98  # a round, of both weights and of the generator's learning rate, as in the official code
    gen_batch: int = 32  # features drawn a step, at clients and server, as in the official code
    gen_steps: int = 50  # Adam steps a round, as in the official code
    gen_lr: Annotated[float, Log(1e-4, 1e-2)] = 3e-4  # the generator's learning rate; 1e-4 to 3e-4 in the official code
    noise: int = 32  # numbers of noise, as on MNIST in the official code
    hidden: int = 256  # width of the generator, as on MNIST in the official code

    by_class = by_head = True
    light = {"gen_steps": 5}
    refuses = {"optimizer": "it takes single steps, between which an optimizer would forget"}

    def networks(self, site):
        classes, width = site.initial["head.weight"].shape
        return {"generator": site.network(FeatureGenerator, classes, self.noise, self.hidden, width)}

    def setup(self, server, clients):
        server.generator, server.moments, server.labels = server.nets["generator"], {}, []

    def round(self, server, cohort):
        generator = server.generator if server.labels and (self.alpha or self.beta) else None
        replies = cohort.call(
            self.local, model=server.model, generator=generator, labels=server.labels, round=server.round - 1
        )
        mean = replies.mean("delta", weight="n")
        counts = torch.stack([up.counts for up in replies]).to(server.model.flat)
        heads = [(server.model + up.delta).select("head.*") for up in replies]
        server.labels = counts.sum(0).nonzero().flatten().tolist()
        if server.labels and (self.alpha or self.beta):
            self.teach(server, heads, counts / counts.sum(0).clamp(min=1))
        server.model = server.model + mean.delta

    def teach(self, server, heads, omega):
        """Moves the generator toward features that each head [K], weighted by omega [K, C], takes for their label."""
        weight = torch.stack([head["head.weight"] for head in heads])
        bias = torch.stack([head["head.bias"] for head in heads])
        adam = Adam(self.gen_lr * self.decay ** (server.round - 1), weight_decay=1e-2)
        generator, draw = server.generator.clone(), server.rng("generator")

        def loss(net, batch):
            z = net(batch.x, batch.y)
            scores = torch.einsum("bd,kcd->kbc", z, weight) + bias[:, None]
            each = F.cross_entropy(scores.flatten(0, 1), batch.y.repeat(len(heads)), reduction="none")
            apart = (z[:, None] - z).abs().mean(2) * (batch.x[:, None] - batch.x).square().mean(2)
            return (omega[:, batch.y] * each.view(len(heads), -1)).sum(0).mean() + self.eta * (-apart.mean()).exp()

        for _ in range(self.gen_steps):
            batch = self.drawn(server.labels, generator, draw)
            gradient = server.grad(generator, batch, loss=loss)
            moved, server.moments = adam.step(generator, gradient, server.moments)
            generator = moved.clone()
        server.generator = generator

    def drawn(self, labels, like, draw):
        """Noise and labels for a batch of features."""
        y = torch.tensor(labels)[torch.randint(len(labels), (self.gen_batch,), generator=draw)]
        x = torch.rand(self.gen_batch, self.noise, generator=draw)
        return Batch(x.to(like.flat, non_blocking=True), y.to(like.flat.device, non_blocking=True))

    @client
    def local(self, client, model, generator, labels, round):
        w, seen = model, []
        make = None if generator is None else client.net(generator)
        draw = client.rng("generator")
        a, b = (max(1e-4, weight * self.decay**round) if weight else 0.0 for weight in (self.alpha, self.beta))
        for batch in client.batches(self.batch, self.epochs):
            loss = None
            if make:
                drawn = self.drawn(labels, model, draw)
                noise = torch.rand(len(batch), self.noise, generator=draw).to(batch.x.device, non_blocking=True)
                with torch.no_grad():
                    features = make(drawn.x, drawn.y), make(noise, batch.y)
                loss = partial(taught, task=client.task, features=features, y=drawn.y, a=a, b=b)
            w, _ = client.descend(w, lr=self.lr, steps=1, loss=loss, data=Data.of(batch))
            seen.append(batch.y)
        counts = torch.bincount(torch.cat(seen), minlength=client.task.classes)
        return {"delta": w - model, "counts": counts, "n": client.n}


def taught(net, batch, task, features, y, a, b):
    """CE on the batch and on generated features, and the pull toward what the head says of the labels' features."""
    outputs, ratio = net(batch.x), len(y) / len(batch)
    value = task.criterion(outputs, batch)
    if a:
        value = value + ratio * a * F.cross_entropy(net.head(features[0]), y)
    if b:
        target = net.head(features[1]).detach().softmax(1)
        value = value + b * F.kl_div(outputs.log_softmax(1), target, reduction="batchmean")
    return value
