"""Attackers that know of other replies before they send theirs: what they do happens on the way.

By default they know every honest reply (`knows=all`), the worst case and what most benchmarks assume; `knows=colluders`
leaves them what they themselves would have sent. They act behind a compressor, and send their reply whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedloom import encoding
from fedloom.boundary.attack.part import Part
from fedloom.boundary.stage import Stage
from fedloom.calls import Fields
from fedloom.engines.perform import decode_reply
from fedloom.errors import UsageError
from fedloom.random import stream

if TYPE_CHECKING:
    from fedloom.boundary.attack.attack import Attack
    from fedloom.boundary.attack.numbers import Sent
    from fedloom.boundary.books import Books
    from fedloom.calls import Call, Outcome
    from fedloom.task import Task

Memory = MutableMapping[str, Any]


class Known(NamedTuple):
    """Whose the replies are that colluders have seen, how many there are in all, and what they draw from."""

    clients: Sequence[int]
    total: int
    draw: torch.Generator  # the same in every round


@dataclass(frozen=True)
class Collusion(Stage):
    """Lets the malicious clients of one kind agree on what they send."""

    attack: Attack
    part: Colluding

    kinds = frozenset({"train", "finish"})

    def outcomes(self, books: Books, call: Call, outcomes: Sequence[Outcome]) -> list[Outcome]:
        mine = [o.client for o in outcomes if self.attack.part_of(o.client, call.round) is self.part]
        if not mine:
            return list(outcomes)
        seen = self.part.knows == "all"
        replies = {
            o.client: decode_reply(books.site, call, o)
            for o in outcomes
            if o.client in mine or (seen and self.attack.part_of(o.client, call.round) is None)
        }
        memory = books.memory.setdefault(f"attack {self.part.name()} {call.function}", {})
        sent: dict[int, Fields] = {}
        views = {k: self.attack.updates.sent(call.message(k)) for k in replies}
        forms = {k: views[k].outline(reply) for k, reply in replies.items()}
        for form in dict.fromkeys(forms[k] for k in mine):
            if not form:
                continue
            alike = [k for k in replies if forms[k] == form]
            rows = {k: views[k].row(replies[k]) for k in alike}
            us = [k for k in alike if k in mine]
            them = [k for k in alike if k not in mine] or us
            known = torch.stack([rows[k] for k in them])
            draw = stream(books.site.seed, "attack", self.part.name(), call.function)
            kept = memory.setdefault(f"{zlib.crc32(repr(form).encode()):08x}", {})  # rows of other forms are others
            made = self.part.crafted(torch.stack([rows[k] for k in us]), known, Known(them, len(outcomes), draw), kept)
            sent |= {k: views[k].filled(replies[k], made) for k in us}
        return [
            replace(o, reply=sent[o.client], sizes=encoding.sizes(sent[o.client])) if o.client in sent else o
            for o in outcomes
        ]


@dataclass(frozen=True)
class Colluding(Part):
    """Sends one row that is made of many."""

    knows: Literal["all", "colluders"] = "all"  # whose replies it has seen: every honest one, or the colluders' own

    def crafted(self, mine: Tensor, known: Tensor, about: Known, memory: Memory) -> Tensor:
        """What all of them send, [D].

        `mine` [m, D] are the colluders' honest rows and `known` [H, D] the replies they have seen; without any honest
        one these are their own. `memory` is kept from round to round.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Alie(Colluding):
    """A little is enough: as far from the mean, in every coordinate, as can pass for one of the honest.

    Baruch, Baruch, Goldberg: A Little Is Enough: Circumventing Defenses For Distributed Learning, NeurIPS 2019, arXiv
    1902.06156 (Algorithm 3): mean - z * deviation.
    """

    z: float | None = None  # deviations from the mean; null: the paper's, from the numbers of clients

    def fit(self, task: Task) -> Part:
        many = self.count(task.population)
        if self.z == 0 or (self.z is None and not furthest(task.population, many)):
            raise UsageError(
                f"alie: {many} of {task.population} clients can hide no deviation by the paper's rule (z = 0), so that "
                "the attack would do nothing; set one, as in alie:0.2,z=1.5, or take more attackers"
            )
        return self

    def crafted(self, mine: Tensor, known: Tensor, about: Known, memory: Memory) -> Tensor:
        z = self.z if self.z is not None else furthest(about.total, len(mine))
        wide = known.double()
        return (wide.mean(0) - z * wide.std(0, correction=0)).to(known.dtype)


@dataclass(frozen=True)
class Ipm(Colluding):
    """Inner-product manipulation: -epsilon times the mean of the honest replies.

    Xie, Koyejo, Gupta: Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation, UAI 2019, arXiv
    1903.03936. A small epsilon slips past distances; above (n - m) / m the plain mean turns round.
    """

    epsilon: float = 0.5  # the paper tries 0.1 to 10

    reverses = True

    def crafted(self, mine: Tensor, known: Tensor, about: Known, memory: Memory) -> Tensor:
        return (-self.epsilon * known.double().mean(0)).to(known.dtype)


@dataclass(frozen=True)
class Mimic(Colluding):
    """All send what one honest client does, so that clients whose data differ from its are outvoted.

    Karimireddy, He, Jaggi: Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing, ICLR 2022, arXiv
    2006.09365 (appendix): in the first rounds Oja's rule finds the direction z in which honest replies differ most;
    the client furthest along z is copied, and after `warmup` rounds always the same one, as long as it replies.
    """

    warmup: int = 5  # rounds until the copied client stays the same

    def crafted(self, mine: Tensor, known: Tensor, about: Known, memory: Memory) -> Tensor:
        wide, t = known.double(), int(memory.get("rounds", 0))
        if t >= self.warmup and memory.get("copied") in about.clients:
            return known[about.clients.index(memory["copied"])]
        centre = wide.mean(0)
        if t:
            centre = (t * memory["centre"] + centre) / (t + 1)
        apart = wide - centre
        start = torch.randn(wide.shape[1], generator=about.draw, dtype=wide.dtype).to(wide.device)
        z = memory["z"] if t else start / start.norm()
        ahead = apart.T @ (apart @ z)
        z = (t * z + ahead / ahead.norm().clamp(min=1e-30)) / (t + 1)  # of one length, whatever that of the replies is
        z = z / z.norm().clamp(min=1e-30)
        copied = int((wide @ z).argmax())
        memory.update({"rounds": t + 1, "centre": centre, "z": z, "copied": about.clients[copied]})
        return known[copied]


@dataclass(frozen=True)
class Dmpa(Colluding):
    """What is left of the colluders' own replies beside their common direction, reversed.

    DMPA: Model Poisoning Attacks on Decentralized Federated Learning for Model Differences, 2025, arXiv 2502.04771.
    Rows u_i [m, D] are the colluders' honest replies; v is the first eigenvector of the correlations between them, and
    a = -mean_i (U - v v'U)_i is sent by all. One attacker, or identical rows, have no difference: a is zero.

    Departures: a is stretched to the mean length of the u_i, for it is short where these are alike (match=false: the
    authors' script); what is searched in the script after the first round is the option `adapt`.
    """

    knows: Literal["all", "colluders"] = "colluders"  # the paper's attackers know nothing of honest clients
    match: bool = True  # stretch a to the mean length of the colluders' replies; ours
    adapt: bool = False  # add the candidate least like the last a; the authors' script

    def crafted(self, mine: Tensor, known: Tensor, about: Known, memory: Memory) -> Tensor:
        u = mine.double()
        a, common = differences(u)
        length = u.norm(dim=1).mean()
        if not a.any():
            return torch.zeros_like(mine[0])
        if self.adapt:
            if "last" in memory and memory["last"].shape == a.shape:
                a = a + least_alike(u, common, a, memory["last"])
            memory["last"] = a
        if self.match:
            a = a * length / a.norm().clamp(min=1e-30)
        return a.to(mine.dtype)


def furthest(clients: int, malicious: int) -> float:
    """z of ALIE: so many honest replies are further from the mean that those and the attackers are a majority."""
    honest = clients - malicious
    if honest <= 0:
        return 0.0
    needed = min(max(clients // 2 + 1 - malicious, 1), honest)
    share = (honest - needed) / honest
    return max(0.0, NormalDist().inv_cdf(share)) if share > 0 else 0.0


def differences(u: Tensor) -> tuple[Tensor, Tensor]:
    """DMPA of rows [m, D]: a [D], zero to rounding if the rows are alike; and the rows' common part [m, D]."""
    centred = u - u.mean(1, keepdim=True)
    lengths = centred.norm(dim=1).clamp(min=1e-30)
    correlation = (centred @ centred.T) / (lengths[:, None] * lengths)
    v = torch.linalg.eigh(correlation).eigenvectors[:, -1]
    common = torch.outer(v, v @ u)
    a = -(u - common).mean(0)
    if a.norm() <= 1e-6 * u.norm(dim=1).mean():
        a = torch.zeros_like(a)
    return a, common


def least_alike(u: Tensor, common: Tensor, a: Tensor, last: Tensor) -> Tensor:
    """Of the script's candidates, as long as a [D], the one with the lowest cosine to the last malicious row [D]."""
    last = last / last.norm().clamp(min=1e-30)
    best, lowest = a, float("inf")
    for s in torch.linspace(-10, 10, 200, dtype=u.dtype):
        candidate = -(u - s * common).mean(0) + s * (a @ last) * last
        candidate = candidate * (a.norm() / candidate.norm().clamp(min=1e-30))
        cosine = float(candidate @ last) / max(float(candidate.norm()), 1e-30)
        if cosine < lowest:
            best, lowest = candidate, cosine
    return best


@dataclass(frozen=True)
class Nan(Part):
    """Sends NaN in place of every number."""

    sends_nan = True


@dataclass(frozen=True)
class Poisoned(Stage):
    """What no honest client can send: it is put in on the way, behind the check that every client makes."""

    attack: Attack
    part: Nan

    kinds = frozenset({"train", "finish"})

    @staticmethod
    def unset(reply: Mapping[str, Any], sent: Sent) -> Fields:
        """The reply without any number that is one."""
        return sent.filled(reply, torch.full_like(sent.row(reply), torch.nan))

    def outcomes(self, books: Books, call: Call, outcomes: Sequence[Outcome]) -> list[Outcome]:
        return [
            replace(o, reply=self.unset(o.reply, self.attack.updates.sent(call.message(o.client))))
            if self.attack.part_of(o.client, call.round) is self.part
            else o
            for o in outcomes
        ]
