"""Fed-SB."""

from dataclasses import dataclass
from typing import Annotated

import torch

from fedloom.cohort import Once
from fedloom.method import Method, client
from fedloom.nets.adapters import cored, whole
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class FedSB(Method):
    """Can low-rank adapters be averaged exactly, at a cost that grows neither with the clients nor with the layers?

    Singhal, Ponkshe, Vartak, Varshney, Vepakomma: Fed-SB: A Silver Bullet for Extreme Communication Efficiency and
    Performance in (Private) Federated LoRA Fine-Tuning, 2025, arXiv 2502.15436 (official code CERT-Lab/fed-sb).

        layer:     y = W x + B R A x;   W, A [r, in] and B [out, r] are frozen, R [r, r] is trained
        round 1:   G <- sum over a few samples of dl/dW;   U S V' <- the first r singular parts of -eta_0 sign(G)
                   B <- U, R <- S, A <- V';   send A and B once
        client i:  E epochs on R and the head;  send them
        server:    R <- mean_i R_i,  so that  B R A = mean_i B R_i A

    Departures:
    1. The samples are the clients' own, a few of each of the first round's cohort: the sign is taken of their summed
       gradients, which is what one machine with these samples would take. The official code estimates G at one place.
    2. SGD in place of AdamW, which the setting `optimizer` gives; eta_0 is a field, in the official code the learning
       rate over the steps of its warm-up.
    3. The exact singular parts, in double precision, in place of ten randomised iterations.
    4. The head is averaged alike, as in the official code, where the network trains one.

    Identities: the gradient by R is B' G A', of all B X A the nearest to G; the mean of the B R_i A is B R A to
    rounding; a round costs 4 r^2 bytes a layer, and the head, each way. The first model is W + B R A, not W.
    """

    lr: LearningRate = 0.1  # learning rate; the official code takes 1e-4 with AdamW
    epochs: Positive[int] = 1  # E: local epochs; 2 in the official code
    batch: int = 10  # batch size, 0 for all samples
    rank: Positive[int] = 4  # r: 200 in the official code, for Llama-3.2 3B
    samples: Positive[int] = 10  # of each client, for G; 170 in all in the official code
    start: Annotated[Positive[float], Log(1e-4, 1.0)] = 0.01  # eta_0: the size of the first step

    needs = ("finetune",)
    compressible = ("delta",)
    private = ("delta", "grad")
    rough = True
    refuses = {"buffers": "A and B are among the model's buffers"}

    def networks(self, site):
        return {"core": site.derive(cored, self.rank), "whole": site.derive(whole)}

    def setup(self, server, clients):
        server.model, server.begun = server.nets["core"], False

    def round(self, server, cohort):
        if server.begun:
            up = cohort.mean(self.local, model=server.model.params, bases=Once(server.model.buffers))
            server.model = server.model.merge(server.model.params + up.delta)
        else:
            total = cohort.mean(self.calibrate, weight="n").grad
            server.model, server.begun = self.begin(server.model.clone(), total), True

    def begin(self, model, total):
        """The model whose fixed matrices and cores are those of a first step against a sum of gradients."""
        for name in layers(model):
            step = -self.start * total[f"{name}.update.weight"].double().sign()
            b, s, a = torch.linalg.svd(step, full_matrices=False)
            model[f"{name}.out.weight"].copy_(b[:, : self.rank])
            model[f"{name}.core.weight"].copy_(s[: self.rank].diag())
            model[f"{name}.into.weight"].copy_(a[: self.rank])
        return model

    @client
    def calibrate(self, client):
        batch = next(client.batches(self.samples, steps=1))
        grad = client.grad(client.nets["whole"], batch)
        return {"grad": grad.select("*.update.weight"), "n": len(batch)}

    @client
    def local(self, client, model, bases):
        whole = client.nets["core"].merge(model).merge(bases)
        w, _ = client.descend(whole, lr=self.lr, epochs=self.epochs, batch=self.batch)
        return {"delta": w.params - model}


def layers(w):
    """The names of the layers that have an R."""
    return [name.removesuffix(".core.weight") for name in w if name.endswith(".core.weight")]
