"""Which methods come into question: from what their classes declare, their folders, and the table of claims."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from reference import cell

from fedloom.method import Method
from fedloom.plugin import Plugin
from fedloom.registry import Entry

ORDER = ("held", "not seen", "contradicted")  # a verdict's place; without one a method stands last


@dataclass(frozen=True)
class Situation:
    """What somebody's problem is like, what to know about it, and which methods are for it."""

    question: str
    advice: str
    suits: Callable[[Entry, type[Method]], bool]


def _in(*folders: str) -> Callable[[Entry, type[Method]], bool]:
    return lambda entry, kind: entry.folder in folders and not SPECIAL(entry, kind)


def _needs(*words: str) -> Callable[[Entry, type[Method]], bool]:
    return lambda entry, kind: any(need.partition(":")[0] in words for need in kind.needs)


SPECIAL = _needs("saddle", "causal")  # problems without clients' models of rows

SITUATIONS = (
    Situation(
        "Clients' data differ, and one model shall serve all",
        "Begin with `fedavg` and a tuned learning rate; that is the baseline to beat.",
        _in("optimize", "aggregate", "domain"),
    ),
    Situation(
        "Every client shall have a model of its own",
        "Compare with `local`, training without anybody else: under strong skew it is hard to beat.",
        _in("personalize", "cluster"),
    ),
    Situation(
        "Clients have different networks, or machines of different strength",
        "What is exchanged is then a part of a model, features, or scores on shared data.",
        _in("heterogeneous", "distill"),
    ),
    Situation(
        "Slow clients hold everybody up",
        "A deadline (`--deadline`) needs no other method; these do without waiting. See [time](time.md).",
        _in("asynchronous", "participate"),
    ),
    Situation(
        "Some clients lie",
        "Robust rules are a setting, `--aggregate`, and go with most methods; see [attackers](attacks.md). These "
        "defend by themselves.",
        _in("robust"),
    ),
    Situation(
        "Replies must stay private",
        "Privacy is a setting, `--dp`: these methods declare fields that it can protect. See [privacy](privacy.md).",
        lambda entry, kind: bool(kind.private) and not issubclass(kind, Plugin),
    ),
    Situation(
        "One round is all there is",
        "One exchange with every client, however many rounds a run asks for.",
        lambda entry, kind: kind.one_shot,
    ),
    Situation("There is no server", "Clients talk to their neighbors in a graph.", _in("decentralized")),
    Situation(
        "Labels are few, wrong, or must be bought",
        "See the problems [`partial` and `oracle`](problems.md#labels-on-demand).",
        lambda entry, kind: entry.folder == "labels" or _needs("partial", "oracle")(entry, kind),
    ),
    Situation(
        "Data arrive over time",
        "See [streams](problems.md#streams). Without the task known, plain averaging forgets the old classes.",
        lambda entry, kind: entry.folder == "continual" or _needs("stream")(entry, kind),
    ),
    Situation(
        "The model is large and pretrained",
        "Only a small part is trained and sent: `--problem finetune`.",
        _in("foundation"),
    ),
    Situation(
        "Clients hold other columns of the same rows, or nodes of one graph",
        "See the problems `vertical` and `graph`.",
        lambda entry, kind: entry.folder == "structure" or _needs("vertical", "graph")(entry, kind),
    ),
    Situation(
        "What is looked for is a saddle point, or a graph of causes",
        "See the problems [`saddle` and `causal`](problems.md).",
        SPECIAL,
    ),
    Situation("How far can a result be relied upon?", "Audits, calibration, contributions.", _in("trust")),
)


def table(situation: Situation, entries: Iterable[Entry], verdicts: Mapping[str, str]) -> str:
    """The methods for a situation: those whose claim held first, then those where nothing was seen."""
    found = [entry for entry in entries if situation.suits(entry, entry.load(Method))]
    places = {verdict: place for place, verdict in enumerate(ORDER)}
    found.sort(key=lambda entry: (places.get(verdicts.get(entry.name, ""), len(ORDER)), entry.name))
    rows = "".join(
        f"| [{entry.name}](methods/{entry.folder}/{entry.name}.md) | {cell(entry.question)} | "
        f"{verdicts.get(entry.name, 'not tried')} |\n"
        for entry in found
    )
    return f"| method | question | its claim, here |\n| --- | --- | --- |\n{rows}"


def sections(entries: Iterable[Entry], verdicts: Mapping[str, str]) -> str:
    """All situations, a section each."""
    known = list(entries)
    return "\n".join(f"## {one.question}\n\n{one.advice}\n\n{table(one, known, verdicts)}" for one in SITUATIONS)
