"""Early exits."""

from dataclasses import dataclass
from functools import partial

from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.heterogeneous import _depths
from fedloom.nets.depth import blocks
from fedloom.nets.exits import exiting
from fedloom.ranges import LearningRate, Positive


@dataclass(frozen=True)
class EarlyExit(Method):
    """Can one network with several exits serve clients that each train only the part up to an exit of theirs?

    Ali, Brutti, Falavigna: Federating Dynamic Models using Early-Exit Architectures for Automatic Speech Recognition on
    Heterogeneous Clients, 2024, arXiv 2405.17376 (official code mnabihali/ASR-FL).

        server:    send client k the blocks and heads up to its exit e_k
        client k:  E epochs on  sum_{m <= e_k} loss(exit m);  send what it was sent, trained, and n_k
        server:    each tensor <- its mean over those that have it, weighted by n_k; what nobody has stays
                   maybe some epochs on the whole network, on data of the server's own
        judged:    every exit by itself

    Departures:
    1. This is the image form: the blocks of the task's own network, cross-entropy, states as means over all places. The
       speech form has Conformer layers, a CTC loss whose lengths are those after sub-sampling, masks over padding, and
       error rates of words.
    2. The published client trains the whole depth everywhere; exits of clients are those of the paper's text.
    3. Its weights by loss or error rate, which favor clients that do badly, are left out; no pretrained start.
    4. SGD with the rate of the code's first setting; the setting `optimizer` gives AdamW.

    Identities: if all clients have all exits it is FedAvg on the sum of the exits' losses; the network of m exits is
    exit m of the whole one; the gradient by a head is that of its own exit alone.
    """

    lr: LearningRate = 0.05  # local learning rate; 0.01 in the official code
    epochs: Positive[int] = 1  # E: local epochs; 5 in the official code
    batch: int = 10  # batch size, 0 for all samples
    every: Positive[int] = 1  # blocks from one exit to the next; 2 layers in the paper, which has 6 exits
    exits: tuple[int, ...] = ()  # e_k: exits that clients have, dealt in turn; none: 1, 2, ... up to all
    server_epochs: int = 0  # epochs on the server's public data after every round; 1 in the official code

    needs = ("blocks",)
    compressible = ("delta",)
    refuses = {
        "aggregate": "clients have different parts of the network, so that their replies are not alike",
        "attack=chameleon": "it trains a body and then its head, and here every exit has a head",
    }

    def networks(self, site):
        whole = -(-len(blocks(site.bench.net)) // self.every)
        if whole < 2:
            raise UsageError(f"early_exit.every is {self.every}: that leaves a single exit; take fewer blocks")
        levels = _depths.levels(self, self.exits, whole, "exits")
        return {name(level): site.derive(exiting, site.task.shape, self.every, level) for level in levels}

    def setup(self, server, clients):
        *_, server.model = server.nets.values()
        if self.server_epochs and server.task.public() is None:
            raise UsageError(
                f"early_exit.server_epochs is {self.server_epochs}; that needs public data: set public=0.05"
            )

    def round(self, server, cohort):
        model = _depths.parts(server, cohort, self.network_of)
        up = cohort.mean(self.local, weight="n", model=model)
        w = server.model
        for piece in up.delta.values():
            w = w.merge(w.select(*piece) + piece)
        if self.server_epochs:
            w, _ = server.descend(w, self.lr, self.server_epochs, batch=self.batch, loss=self.loss(server))
        server.model = w

    def network_of(self, node, k):
        """The name of client k's network."""
        return _depths.network_of(node, k, self.exits, name)

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch, loss=self.loss(client))
        return {"delta": _depths.pieces(client, self.network_of(client, client.id), w - model), "n": client.n}

    def loss(self, node):
        """The sum of the losses of all exits of a network."""
        return partial(summed, criterion=node.task.criterion)

    def observe(self, server, clients):
        return _depths.judged(server)

    @client
    def predict(self, client, model):
        return model

    def predict_message(self, server, clients):
        return {"model": _depths.parts(server, clients, self.network_of)}


def name(level):
    """What the network of so many exits is called, and its last exit."""
    return f"exit{level}"


def summed(net, batch, criterion):
    """The sum of the losses of all exits."""
    return sum(criterion(out, batch) for out in net.outputs(batch.x))
