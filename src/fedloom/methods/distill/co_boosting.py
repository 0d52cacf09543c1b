"""Co-Boosting."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch.nn import functional as F

from fedloom.method import Method, client
from fedloom.nets.generator import InputGenerator
from fedloom.ranges import LearningRate, Log, Positive
from fedloom.vector import Vector


@dataclass(frozen=True)
class CoBoosting(Method):
    """In one round, can synthetic data and the weights of an ensemble improve each other until one model holds it all?

    Dai, Zhang, Li, Liu, Yang, Han: Enhancing One-Shot Federated Learning Through Data and Ensemble Co-Boosting, ICLR
    2024, arXiv 2402.15070 (official code rong-dai/Co-Boosting).

        client k:  w_k <- E epochs of SGD from w;  send w_k, once
        server:    A(x) = sum_k m_k f_k(x) / sum_k m_k,  m_k = 1 / K;  for every epoch:
          x = G(z) from Adam steps on G and z:  (1 - p_y)^h CE(A(x), y) - beta 9 KL(A(x) / 3, f(x) / 3);  keep the best
          m <- clip(m - mu 0.99^epoch sign(d CE(A(x), y) / dm), 0, 1)   on every batch kept; not at first
          x' = x + eps sign(d u' softmax(A(x) / 4) / dx), u uniform;  f <- SGD on 16 KL(A(x') / 4, f(x') / 4)

    Departures:
    1. Inputs are in the data's normalized space, where eps is relative to a deviation of 1; the official code works on
       pixels of 8 bits.
    2. Of the pool the last `pool` batches are kept; the official code keeps all, so that epochs grow longer.
    3. Clients start from the initial model, and the student from their weighted mean (warm) or anew, as officially.
    4. The ensemble is reweighted on the new batch too (officially on the older ones), and the student takes the batches
       whole and in order (officially shuffled over the pool).
    5. G begins as torch begins layers, and its gradient is not bounded (officially N(0, 0.02), and a length of 10).

    Identities: mu=0 leaves the ensemble uniform; a client is asked once in a run.
    """

    lr: LearningRate = 0.05  # local learning rate; the official code takes 0.01 with momentum 0.9
    epochs: Positive[int] = 10  # E: local epochs; the official code takes 100
    batch: int = 10  # local batch size; the official code takes 128
    server_epochs: int = 10  # T: epochs at the server; the official code takes 200
    gen_steps: int = 5  # Adam steps a batch; the official code takes 30
    gen_lr: float = 1e-2  # learning rate of G and z; the official code takes 1e-3
    gen_batch: int = 32  # inputs a batch; the official code takes 128
    noise: int = 64  # numbers of noise; the official code takes 256
    hard: float = 1.0  # h: exponent that favors what the ensemble finds hard, as in the official code
    beta: float = 1.0  # beta: weight of disagreement with the student, as in the official code
    kd_lr: Annotated[float, Log(1e-3, 0.1)] = 0.01  # the student's; momentum 0.9 and a cosine, as in the official code
    mu: Annotated[float, Log(1e-3, 0.1)] = 0.01  # mu: step of the ensemble's weights, as in the official code
    eps: float = 8 / 255  # eps: length of the last push, as in the official code
    pool: int = 20  # batches that are kept; ours
    warm: bool = True  # whether the student starts from the clients' mean; not in the official code

    one_shot = rough = by_class = True
    light = {"epochs": 2, "server_epochs": 2, "gen_steps": 2}

    def setup(self, server, clients):
        server.weights = None  # m: of the ensemble, once there is one

    def round(self, server, cohort):
        replies = cohort.call(self.local, model=server.model)
        start = replies.mean("model", weight="n").model if self.warm else server.model
        nets = [server.net(up.model) for up in replies]
        m = torch.full((len(nets),), 1 / len(nets)).to(start.flat)
        student = server.net(start).requires_grad_()
        optimizer = torch.optim.SGD(student.parameters(), lr=self.kd_lr, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.server_epochs))
        pool, draw = [], server.rng("synthesis")
        for epoch in range(self.server_epochs):
            pool = [*pool, self.synthesised(server, nets, m, student, draw)][-self.pool :] if self.pool else []
            if epoch:
                m = self.reweighted(nets, m, pool, self.mu * 0.99**epoch)
            for x, _ in pool:
                pushed = self.pushed(nets, m, x, draw)
                with torch.no_grad():
                    target = ensemble(nets, m, pushed)
                optimizer.zero_grad()
                (16 * divergence(target, student.train()(pushed), 4.0)).backward()
                torch.nn.utils.clip_grad_norm_(student.parameters(), 10.0)
                optimizer.step()
                server.meter(1, len(x))
            schedule.step()
        server.weights, server.model = m, Vector.of(student, start.layout)

    def synthesised(self, server, nets, m, student, draw):
        """Inputs and labels on which the ensemble is sure, but not too sure, and the student is not."""
        make = server.net(server.network(InputGenerator, self.noise, tuple(server.task.shape))).train()
        for module in make.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        make.requires_grad_()
        z = torch.randn(self.gen_batch, self.noise, generator=draw).to(m).requires_grad_()
        y = torch.randint(server.task.classes, (self.gen_batch,), generator=draw).to(m.device)
        optimizer = torch.optim.Adam([z, *make.parameters()], lr=self.gen_lr, betas=(0.5, 0.999))
        student.eval()
        best, least = None, float("inf")
        for _ in range(self.gen_steps):
            x = make(z)
            scores = ensemble(nets, m, x)
            p = scores.softmax(1).gather(1, y[:, None])[:, 0].detach()
            loss = ((1 - p) ** self.hard * F.cross_entropy(scores, y, reduction="none")).mean()
            if self.beta:
                loss = loss - self.beta * 9 * divergence(scores, student(x), 3.0)
            if best is None or loss.item() < least:
                best, least = x.detach(), loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            server.meter(1, len(y))
        return best, y

    def reweighted(self, nets, m, pool, step):
        """The ensemble's weights [K] after a signed step on every batch; never all zero."""
        for x, y in pool:
            with torch.no_grad():
                scores = torch.stack([net(x) for net in nets])
            w = m.clone().requires_grad_()
            loss = F.cross_entropy(mixed(scores, w), y)
            moved = (m - step * torch.autograd.grad(loss, w)[0].sign()).clamp(0, 1)
            m = moved if moved.sum() > 0 else m
        return m

    def pushed(self, nets, m, x, draw):
        """Inputs moved by eps toward what a random direction of the ensemble's answer calls harder."""
        x = x.clone().requires_grad_()
        answer = (ensemble(nets, m, x) / 4).softmax(1)
        u = 2 * torch.rand(answer.shape, generator=draw).to(answer) - 1
        return (x + self.eps * torch.autograd.grad((u * answer).sum(), x)[0].sign()).detach()

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        return {"model": w, "n": client.n}


def mixed(scores, m):
    """The weighted mean [B, C] of scores [K, B, C]."""
    return torch.einsum("k,kbc->bc", m, scores) / m.sum()


def ensemble(nets, m, x):
    """A(x), [B, C]."""
    return mixed(torch.stack([net(x) for net in nets]), m)


def divergence(target, scores, temperature):
    """KL(softmax(target / T) || softmax(scores / T)), the mean over a batch."""
    return F.kl_div((scores / temperature).log_softmax(1), (target / temperature).softmax(1), reduction="batchmean")
