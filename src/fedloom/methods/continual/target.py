"""TARGET."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch.nn import functional as F

from fedloom.cohort import Once
from fedloom.data.augment import weak
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.continual._distill import among, answers, distillation, divergence
from fedloom.nets.generator import InputGenerator
from fedloom.ops.inversion import Remembered, sought
from fedloom.ranges import LearningRate, Log, Positive
from fedloom.task import Data


@dataclass(frozen=True)
class TARGET(Method):
    """Can old classes be kept without stored samples, by inputs that the server invents from the old global model?

    Zhang, Chen, Zhuang, Lyu: TARGET: Federated Class-Continual Learning via Exemplar-Free Distillation, ICCV 2023,
    arXiv 2303.06937 (official code zj-jayzhang/Federated-Class-Continual-Learning).

        client k:  E epochs of SGD from w on  CE(f(x), y), among the new classes,
                   + kd H(softmax(f_old(u) / 2), softmax(f(u) / 2)), over the old classes, u invented;  send w_k - w
        server:    w <- w + mean (w_k - w), all clients alike
                   before every task but the first:  f_old <- f;  R times, with a copy of G, fresh z and old labels y:
                   x = copy(z) from g Adam steps on  bn L_BN + oh CE(f(x'), y) - adv KL(f(x') || s(x'))[same answer],
                   x' moved;  keep the best x;  G <- Adam step on the copy's summed gradients
                   after W of them:  student s <- SGD on KL(f || s) at T = 20 on all that was kept

    Departures:
    1. The network has its whole head from the start, and classes to come are masked; officially the head grows.
    2. A batch has `beside` invented inputs for each real one, drawn anew; officially an epoch goes once through all of
       them, so that their number a step depends on how little data there are.
    3. Inputs are in the data's normalized space and are moved, not flipped; at clients they are taken as they are.
    4. R = 16 and W = 8; officially R = 10 and W = 20 on CIFAR-100, where the student is never there.
    5. The student begins with the network's initial weights, its rate is constant; L_BN needs batch normalization.
    6. Client SGD is plain, and its steps with invented inputs are single; officially momentum 0.9, weight decay 5e-4.

    Identities: the first task, and kd=0 where tasks are told, are FedAvg with equal weights bitwise.
    """

    lr: LearningRate = 0.05  # learning rate; 0.01 with momentum 0.9 in the official code
    epochs: Positive[int] = 1  # E: local epochs; 5 in the official code
    batch: int = 10  # batch size; 128 in the official code
    kd: Annotated[float, Log(1.0, 50.0)] = 5.0  # kd: weight of the old answers; officially 25, at a fifth of this lr
    beside: Positive[int] = 1  # invented inputs beside each real one
    turns: Positive[int] = 16  # R: batches that are invented; 10, or 200 on Tiny-ImageNet
    warmup: int = 8  # W: turns before there is a student; 20 in the official code
    gen_batch: Positive[int] = 32  # inputs a turn; 256 in the official code
    gen_steps: Positive[int] = 10  # g: Adam steps a turn, as in the official code; 50 on Tiny-ImageNet
    gen_lr: float = 2e-3  # of G's copy, and times g of G itself, as in the official code
    noise_lr: float = 0.01  # of z, as in the official code
    noise: Positive[int] = 64  # numbers of z; 256 in the official code
    bn: float = 10.0  # bn: weight of the remembered statistics, as on CIFAR-100
    oh: float = 0.5  # oh: weight of the labels, as on CIFAR-100
    adv: float = 1.0  # adv: weight of disagreement with the student, as in the official code
    kd_steps: int = 20  # the student's steps a turn; 400 in the official code
    kd_lr: float = 0.02  # the student's learning rate, with momentum 0.9; 0.2 in the official code, for a ResNet

    needs = ("stream:by=classes",)
    compressible = private = ("delta",)
    rough = True  # some hundred steps of Adam invent; it divides gradients as small as rounding by their size
    light = {"turns": 3, "warmup": 1, "gen_steps": 3, "kd_steps": 3}
    refuses = {"optimizer": "it takes single steps, between which an optimizer would forget"}

    def networks(self, site):
        if not site.task.blank().is_floating_point():
            raise UsageError("target invents inputs, which must be numbers; take images or tables")
        return {"generator": site.network(InputGenerator, self.noise, tuple(site.task.shape))}

    def setup(self, server, clients):
        server.old, server.invented, server.kept = None, None, 0  # tasks whose classes are in `invented`

    def round(self, server, cohort):
        task = server.task.number(server.round)
        if self.kd and server.kept < task:
            server.invented, labels = self.invent(server)
            server.old, server.kept = server.model, task
            sure = server.scores(server.old, server.invented).argmax(1) == labels
            server.log(invented_accuracy=sure.double().mean())
        held = {"old": Once(server.old), "invented": Once(server.invented)} if server.kept else {}
        server.model = server.model + cohort.mean(self.local, model=server.model, **held).delta

    def invent(self, server):
        """Inputs [R B, ...] that the model takes for old classes, and these [R B]."""
        draw, teacher, student, pool = server.rng("invention"), server.net(server.model), server.initial, []
        make, remembered = server.net(server.nets["generator"]).train().requires_grad_(), Remembered(teacher, 0.9)
        meta = torch.optim.Adam(make.parameters(), self.gen_lr * self.gen_steps, betas=(0.5, 0.999))
        for turn in range(self.turns):
            rival = server.net(student) if turn >= self.warmup else None
            pool.append(self.turn(server, make, meta, teacher, rival, remembered, draw))
            if self.adv and self.kd_steps and turn >= self.warmup:
                x = torch.cat([x for x, _ in pool])
                data = Data(x, server.scores(server.model, x).detach())
                how = {"lr": self.kd_lr, "momentum": 0.9, "steps": self.kd_steps, "batch": self.gen_batch}
                student, _ = server.descend(student, loss=taught, data=data, **how)
        return tuple(torch.cat(parts) for parts in zip(*pool, strict=True))

    def turn(self, server, make, meta, teacher, rival, remembered, draw):
        """A batch of inputs for labels drawn alike from the old classes, and these; moves G."""
        old = server.task.old.nonzero().flatten()
        y = old[torch.randint(len(old), (self.gen_batch,), generator=draw)].to(server.model.flat.device)
        z = torch.randn(self.gen_batch, self.noise, generator=draw).to(server.model.flat)

        def loss(x):
            moved = weak(x, draw)
            scores = teacher(moved)
            value = self.bn * remembered.distance() + self.oh * F.cross_entropy(scores, y)
            if rival and self.adv:
                answer = rival(moved)
                same = answer.argmax(1) == scores.argmax(1)
                value = value - self.adv * (divergence(scores, answer) * same).mean()
            return value

        x, losses = sought(make, meta, z, loss, self.gen_steps, self.gen_lr, self.noise_lr)
        server.meter(self.gen_steps, self.gen_steps * len(y))
        server.log(invention_loss=min(losses))
        remembered.take()
        return x, y

    @client
    def local(self, client, model, old=None, invented=None):
        task = client.task
        if invented is None:
            loss = partial(learned, new=task.new) if task.old.any() else None
            w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch, loss=loss)
            return {"delta": w - model}
        told, draw, w = answers(client.net(old), invented, task.old, 2.0), client.rng("beside"), model
        for batch in client.batches(self.batch, self.epochs):
            i = torch.randint(len(told), (self.beside * len(batch),), generator=draw).to(told.device, non_blocking=True)
            loss = partial(learned, new=task.new, old=task.old, u=invented[i], told=told[i], kd=self.kd)
            w, _ = client.descend(w, lr=self.lr, steps=1, loss=loss, data=Data(*batch))
        return {"delta": w - model}


def learned(net, batch, new, old=None, u=None, told=None, kd=0.0):
    """CE among the new classes, and where inputs are invented the KD of these, u, to what the old model has told."""
    value = F.cross_entropy(among(net(batch.x), new), batch.y)
    return value if u is None else value + kd * distillation(net(u), told, old, 2.0)


def taught(net, batch):
    """KL of the teacher's scores, which are the labels, to the network's at T = 20, times its square."""
    return 400 * divergence(batch.y / 20, net(batch.x) / 20).mean()
