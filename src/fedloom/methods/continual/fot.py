"""FOT."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn
from torch.nn import functional as F

from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Linear, Positive


@dataclass(frozen=True)
class FOT(Method):
    """Can the server prevent forgetting, by keeping new updates out of the space in which old tasks' inputs lay?

    Bakman, Yaldiz, Ezzeldin, Avestimehr: Federated Orthogonal Training: Mitigating Global Catastrophic Forgetting in
    Continual Federated Learning, ICLR 2024, arXiv 2309.01289 (code duygunuryldz/Federated_Orthogonal_Training).

        client k:  W_k <- E epochs of SGD from W;  send W_k - W
                   last round of a task, of every layer:  X: its inputs;  R = X - U U^T X
                   send R Omega with Omega Gaussian of its own, |R| / |X|, n_k
        server:    G_l <- mean difference;  W_l <- W_l + G_l (I - U_l U_l^T)
                   last round of a task:  the first singular vectors of sum R Omega that hold the energy still missing
                   to eps join U_l;  eps <- eps + eps_inc

    Departures:
    1. Biases count as the weight of an input that is always 1, and are protected with it; the paper's layers have none.
    2. The network has one head with all classes, of which a task's loss and its judgement take the task's own. It is
       not protected, nor are a normalization's parameters and statistics.
    3. Where the space already holds eps of a new task's energy nothing is added; the official code adds one direction.
    4. Sketches are of the client's own trained model, and are summed batch by batch with fresh Gaussians.
    5. If nobody is heard in a task's last round, sketches of that task are asked for before the next step is taken.
    6. eps bounds a share of energy in the first task; later |R| / |X| is a ratio of lengths, as in the official code.

    Identities: the first task is FedAvg with equal weights bitwise; later updates are orthogonal to U.
    """

    lr: LearningRate = 0.05  # learning rate; the official code takes 0.01
    epochs: Positive[int] = 1  # E: local epochs, as in the official code
    batch: int = 10  # batch size; 16 to 64 in the official code
    # eps: share of the inputs' energy that is kept; 0.87 to 0.96 in the official code
    eps: Annotated[float, Linear(0.8, 0.99)] = 0.95
    eps_inc: float = 0.001  # what a task adds to eps, as in the official code
    width: int = 5  # columns of a sketch by dimension of a linear layer's inputs, as in the official code

    needs = ("stream",)
    by_head = True

    def setup(self, server, clients):
        net = server.net(server.model)
        names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        server.bases = {name: torch.zeros(fan(net.get_submodule(name)), 0) for name in names if name.startswith("body")}
        server.eps, server.protected = self.eps, 0  # tasks whose inputs are in U

    def round(self, server, cohort):
        for task in range(server.protected, server.task.number(server.round)):  # nobody was heard in its last round
            ended = (task + 1) * server.task.lasting
            self.protect(server, cohort.mean(self.owed, model=server.model, bases=server.bases, ended=ended).sketches)
        last = server.task.ends(server.round)
        up = cohort.mean(self.local, model=server.model, bases=server.bases if last else None)
        step = up.delta
        for name, basis in server.bases.items():
            if basis.shape[1]:
                step = step.merge(projected(step.select(f"{name}.weight", f"{name}.bias"), name, basis.to(step.flat)))
        server.model = server.model + step
        if last:
            self.protect(server, up.sketches)

    def protect(self, server, sketches):
        """Takes a task's inputs into U."""
        server.bases = {name: self.grown(server.bases[name], sketches[name], server.eps) for name in server.bases}
        server.eps, server.protected = min(1.0, server.eps + self.eps_inc), server.protected + 1
        server.log(directions=sum(basis.shape[1] for basis in server.bases.values()))

    def grown(self, basis, found, eps):
        """U [D, k] with the directions that a task's summed sketch adds."""
        rest = float(found["ratio"] / found["n"])
        missing = (rest - (1 - eps)) / max(rest, 1e-12)
        if missing <= 0:
            return basis
        vectors, values, _ = torch.linalg.svd(found["sketch"].double(), full_matrices=False)
        energy = values.square().cumsum(0) / values.square().sum().clamp(min=1e-300)
        count = min(int((energy < missing).sum()) + 1, len(basis) - basis.shape[1])
        return torch.linalg.qr(torch.cat([basis.double(), vectors[:, :count]], 1)).Q.float()

    @client
    def local(self, client, model, bases):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        if bases is None:
            return {"delta": w - model}
        return {"delta": w - model, "sketches": self.sketched(client, client.net(w), bases, client.data)}

    @client
    def owed(self, client, model, bases, ended):
        data = client.task.at(ended).data(client.id, "train")  # kept until a sketch of it has arrived
        return {"sketches": self.sketched(client, client.net(model), bases, data)} if len(data) else {}

    def sketched(self, client, net, bases, data):
        """For every layer: the sketch [D, S] of what its inputs have outside of U, and n times the share of that."""
        seen = {}
        for name in bases:
            net.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen.__setitem__(name, x[0]))
        sums = {name: [0.0, 0.0, 0.0] for name in bases}
        draw = client.rng("sketch")
        for batch in client.batches(self.batch, data=data):
            with torch.no_grad():
                net(batch.x)
            for name, basis in bases.items():
                layer = net.get_submodule(name)
                x = columns(layer, seen[name])
                rest = x - basis.to(x) @ (basis.to(x).T @ x)
                size = len(x) * (1 if isinstance(layer, nn.Conv2d) else self.width)
                omega = torch.randn(x.shape[1], size, generator=draw).to(x, non_blocking=True)
                for place, term in enumerate((rest @ omega, rest.square().sum(), x.square().sum())):
                    sums[name][place] = sums[name][place] + term
        return {
            name: {"sketch": sketch, "ratio": len(data) * float((rest / all_of).sqrt()), "n": len(data)}
            for name, (sketch, rest, all_of) in sums.items()
        }


def fan(layer):
    """D: the numbers that go into one output of a layer, and the 1 of its bias."""
    if layer.bias is None or (isinstance(layer, nn.Conv2d) and layer.groups != 1):
        raise UsageError("fot protects layers with a bias, and convolutions in one group")
    return layer.weight[0].numel() + 1


def columns(layer, x):
    """What a layer multiplies its weights with, and 1 for its bias: [D, columns]."""
    if isinstance(layer, nn.Conv2d):
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # [B, D - 1, places]
        x = patches.transpose(1, 2).flatten(0, 1)
    return torch.cat([x.flatten(1), x.new_ones(len(x.flatten(1)), 1)], 1).T


def projected(step, name, basis):
    """A layer's step without its part in the space of old inputs."""
    weight, bias = step[f"{name}.weight"], step[f"{name}.bias"]
    rows = torch.cat([weight.flatten(1), bias[:, None]], 1)
    rows = rows - (rows @ basis) @ basis.T
    step = step.clone()
    step[f"{name}.weight"].copy_(rows[:, :-1].view(weight.shape))
    step[f"{name}.bias"].copy_(rows[:, -1])
    return step
