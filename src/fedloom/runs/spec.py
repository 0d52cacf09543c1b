"""What is run, in words: one flat set of settings, the same on the command line, in YAML and in Python."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fedloom.errors import UsageError, unknown
from fedloom.fields import coerced, current_names, dumped, loaded, parse
from fedloom.parsing import named
from fedloom.user_files import FUNCTION, function_text
from fedloom.user_networks import file_of, named_network

# Settings that change how a run is carried out, but no number in it: they may differ when it is resumed.
IN_PYTHON = " given in Python"  # ends what data are called that have no name
BUDGETS = ("max_seconds", "max_steps", "max_bytes", "max_virtual_seconds")
FREE = frozenset({"rounds", "engine", "workers", "patience", "min_delta", "eval_every", "track", *BUDGETS})


@dataclass(frozen=True)
class Spec:
    """Every setting of a run. `method` is `{"name": ..., field: value, ...}`; `of` also reads `fedprox:mu=0.1`.

    Examples:
        >>> spec = fedloom.Spec.of({"method": "scaffold", "partition": "dirichlet:0.1", "rounds": 5})
        >>> spec.method["name"], spec.rounds, spec.engine
        ('scaffold', 5, 'serial')
    """

    method: dict[str, Any] = field(default_factory=lambda: {"name": "fedavg"})
    problem: str = "classification"  # kind of problem, with options: classification, regression, partial:0.1, ...
    data: str = "digits"  # data set: digits, breast_cancer, diabetes, a file, a folder, hf:NAME
    label: str | None = None  # column to predict (default: the first with a usual name)
    exclude: tuple[str, ...] = ()  # columns to ignore: id,notes
    keep: tuple[str, ...] = ()  # columns to use as they are: features even if they look like names, '?' as a value
    metadata: tuple[str, ...] = ()  # columns beside x and y for losses and methods: sex,domain; no features unless kept
    missing: str = "refuse"  # gaps: refuse, drop the rows, or fill with the training rows' mean or most_frequent
    sep: str | None = None  # what separates the cells of .csv files: semicolon, tab, ... (default: found out)
    encoding: str | None = None  # encoding of .csv and text files: latin-1, gbk, ... (default: UTF-8, or Windows-1252)
    decimal: str | None = None  # decimal mark of .csv files, a comma or a point (default: found out)
    resize: int | str | None = None  # size of images: 32, or WIDTHxHEIGHT, such as 64x48 (default: as they are)
    windows: int | str | None = (
        None  # rows of series in windows: 32, 32,stride=8,horizon=1,series=NAME,time=NAME, or given (default: single)
    )
    group: str | None = None  # column that names known groups of clients: no feature, but what clusters are scored by
    embed: str | None = None  # frozen encoder whose features are learned from: random:128, efficientnet, sentence, ...
    partition: str = "dirichlet:0.3"  # how the data are partitioned among clients
    clients: int | None = None  # number of clients (default: 20, or the number of values of the partition's column)
    newcomers: float | str | None = None  # clients held out of training: a share, a number, or values of the column
    validation: float = 0.1  # fraction of each client's training rows set aside for validation
    test_share: float | None = None  # fraction of rows held out as test rows (default: 0.2, or the test split given)
    public: float = 0.0  # fraction of training rows, stratified by class, held by the server as public data
    shared_data: float = 0.0  # fraction of training rows held without labels by the server and by every client
    model: str | None = None  # network by name (default: one that suits the data), or your own: FILE.py:NAME
    head: str | None = None  # name of the head in a network of your own (default: the Linear that makes its outputs)
    loss: str | None = None  # loss that is trained by: focal:2, label_smoothing:0.1, huber:1, FILE.py:function, ...
    class_weights: str | None = None  # weights of classes in the loss: balanced, or one for each class: 1,2.5,1
    init: str | None = (
        None  # file of the network's initial weights: .safetensors, or a state dict that torch.save wrote
    )
    optimizer: str | None = None  # steps of clients' descents: adam, sgd:0.9, ... (default: plain SGD, or the method's)
    schedule: str | None = None  # factor on clients' lr over rounds: cosine, exponential:0.99, warmup:5+step:30, ...
    cohort: int | None = None  # clients sampled per round (default: all)
    participation: str = "uniform"  # how clients are sampled: uniform, weighted (by samples) or poisson (independently)
    availability: str = "always"  # which clients are reachable: bernoulli:0.8, markov:0.3, cyclic:0.5, trace:FILE.csv
    speed: float | str = "constant"  # compute speed of clients: uniform:0.5,2, lognormal:1.0, classes:1x0.5,4x0.5
    bandwidth: float | str | None = None  # Mbit/s of clients, UP or UP/DOWN, distributed as speed (default: no limit)
    latency: float = 0.0  # seconds per message, whatever its size
    step_seconds: float = 0.01  # virtual seconds per gradient step at speed 1
    server_speed: float | None = None  # compute speed of the server (default: its steps take no time)
    deadline: float | None = None  # virtual seconds that the server waits for the replies of a call
    overselect: float = 1.0  # oversampling factor: ask this many times the cohort, keep the first replies
    clock: str = "virtual"  # virtual, or real: replies to submitted work are taken in the order in which they arrive
    dropout: float = 0.0  # fraction of clients that stay silent in a call
    lost: float = 0.0  # fraction of replies that are lost
    attack: str | None = None  # malicious clients: sign_flip:0.2, alie:0.2+label_flip:0.1, ...; see docs/attacks.md
    faults: str | None = None  # faults in transit: corrupt:0.1+duplicate:0.05, ...; see docs/attacks.md
    channel: str | None = None  # noise on the way of messages: awgn:10, awgn:20,down, air:10 (sums in the air), ...
    compress: str | None = None  # compression of the differences a method declares: topk:0.01, qsgd:4, sign, ...
    dp: str | None = None  # differential privacy: client:noise=1.0,clip=1.0, sample:..., local:...
    secure: str | None = None  # secure aggregation of what `mean` sums: bonawitz, ckks
    aggregate: str | None = None  # robust rule in place of the mean: krum:f=4, median, nnm+trimmed_mean:0.2, ...
    cache: bool = False  # send only the hash of a value that a client already holds
    buffers: str = "average"  # running statistics: average (travel with the model), local (stay), ignore (never move)
    measures: tuple[str, ...] = ()  # measures beside the problem's own: auc,f1:weighted,top_k:3,FILE.py:function
    choose_by: str | None = None  # measure by which validation chooses rounds: loss, auc, ... (default: the main one)
    rounds: int = 30
    patience: int | None = None  # stop once validation has not become better for so many rounds (default: never)
    min_delta: float = 0.0  # by how much validation must become better for `patience`
    seed: int = 0
    engine: str = "serial"  # serial, pool, vectorized, ray, loopback, or auto: chosen from measured costs
    workers: int = 0  # worker processes, if the engine has any; 0: one per core (vectorized: none)
    threads: int = 1  # threads per client; changing it may change the last bits of the result
    device: str = "cpu"  # cpu, cuda or auto
    eval_every: int = 1  # rounds between evaluations; the last round is always evaluated
    blind: bool = False  # evaluate on validation data only (used while tuning)
    max_seconds: float | None = None  # stop cleanly after the round in which this many seconds are spent
    max_steps: int | None = None  # stop likewise on gradient steps, of all clients together and of the server
    max_bytes: int | None = None  # stop likewise on payload bytes of training: up, down and between peers
    max_virtual_seconds: float | None = None  # stop likewise on seconds of the simulated clock
    track: str | None = None  # experiment trackers: tensorboard, mlflow

    def __post_init__(self) -> None:
        hints = _types()
        for name in ("exclude", "keep", "metadata"):
            object.__setattr__(self, name, _names(getattr(self, name)))
        object.__setattr__(self, "measures", measure_texts(self.measures))
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, coerced(f.name, getattr(self, f.name), hints[f.name]))
        for name, low in LOWEST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name} is {value}; it must be at least {low}")
        for name in ("validation", "public", "shared_data"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it is a share, at least 0 and below 1")
        if self.test_share is not None and not 0 < self.test_share < 1:
            raise UsageError(f"test_share is {self.test_share:g}; it is a share, above 0 and below 1")
        late = self.newcomers
        if isinstance(late, float) and (late < 0 or (late >= 1 and late != int(late))):
            raise UsageError(f"newcomers is {late:g}; it is a share below 1, or a whole number of clients from 1")
        if self.min_delta and self.patience is None:
            raise UsageError(f"min_delta is {self.min_delta:g} and says how patience counts; give patience too")
        if self.patience is not None and self.patience >= self.rounds:
            raise UsageError(
                f"patience is {self.patience} and rounds {self.rounds}: the run is over before it could stop; "
                "give a smaller one, or leave it out"
            )
        if self.buffers not in BUFFERS:
            raise unknown("policy for buffers", self.buffers, BUFFERS)
        if not isinstance(self.method.get("name"), str):
            raise UsageError("a spec needs the name of a method: `method: {name: fedavg}`")

    @property
    def in_python(self) -> bool:
        """Whether the data, or the whole task, are what only Python has, and not what this spec names."""
        return self.partition == "given" or self.data.endswith(IN_PYTHON)

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Spec:
        """A spec from settings by name; unknown names are an error."""
        for name in settings:
            if name not in KNOWN:
                raise UsageError(
                    f"{unknown('setting', name, KNOWN)}; a field of the method is method.{name}=..., in Python "
                    f"fields={{{name!r}: ...}}"
                )
        plain: dict[str, Any] = {
            name: str(value) if isinstance(value, Path) else value for name, value in settings.items()
        }
        plain |= {"model": named_network(plain["model"])} if "model" in plain else {}
        if callable(plain.get("loss")):
            plain["loss"] = function_text(plain["loss"])
        if isinstance(plain.get("class_weights"), list | tuple):
            plain["class_weights"] = ",".join(map(str, plain["class_weights"]))
        if isinstance(plain.get("method"), str):
            plain["method"] = named(plain["method"])
        if not isinstance(plain.get("attack"), str | None):
            given = plain["attack"] if isinstance(plain["attack"], list | tuple) else [plain["attack"]]
            if all(hasattr(one, "to_text") for one in given):  # attacks made in Python
                plain["attack"] = "+".join(one.to_text() for one in given)
        return Spec(**plain)

    @staticmethod
    def read(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
        """A spec from a YAML file, with settings replaced by `name=value` (`method.lr=0.1` for the method's fields)."""
        try:
            return Spec.parsed(Path(path).read_text(encoding="utf-8"), f"the spec {path}", overrides)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the spec {path}: {error}".replace("\n", " ")) from error

    @staticmethod
    def parsed(text: str, where: str, overrides: Sequence[str] = ()) -> Spec:
        """A spec from its YAML; `where` says in errors what is read."""
        settings = loaded(text, where)
        if not isinstance(settings, dict):
            raise UsageError(f"{where} is not a mapping of settings to values")
        settings = current_names(settings)
        settings.pop("fedloom", None)  # the version that wrote it
        return Spec.of(with_overrides(settings, overrides))

    @property
    def code(self) -> list[Mapping[str, Any]]:
        """What of this spec names files that a run executes, each as a method's mapping names its own."""
        own = [found["file"] for one in self.measures if (found := FUNCTION.fullmatch(one))]
        network = [{"name": file, "what": "network"}] if (file := file_of(self.model)) else []
        loss = [{"name": found["file"], "what": "loss"}] if (found := FUNCTION.fullmatch(self.loss or "")) else []
        return [self.method, *({"name": file, "what": "measure"} for file in own), *network, *loss]

    def text(self, version: str) -> str:
        """The YAML of this spec."""
        return dumped({"fedloom": version} | plain(dataclasses.asdict(self)))

    def differences(self, other: Spec, free: frozenset[str] = FREE) -> list[str]:
        """The settings that differ and are not `free`, as `method.lr: 0.1 there, 0.05 here`."""
        mine, theirs = _flat(self), _flat(other)
        return [
            f"{name}: {theirs.get(name)} there, {mine.get(name)} here"
            for name in sorted(mine.keys() | theirs.keys())
            if name not in free and mine.get(name) != theirs.get(name)
        ]


KNOWN = tuple(f.name for f in dataclasses.fields(Spec))
LOWEST = {
    "clients": 1,
    "cohort": 1,
    "rounds": 1,
    "workers": 0,
    "threads": 1,
    "eval_every": 1,
    "patience": 1,
} | dict.fromkeys(("min_delta", *BUDGETS), 0)
BUFFERS = ("average", "local", "ignore")


@cache
def _types() -> Mapping[str, Any]:
    """The type of each setting: to read them from the annotations takes longer than to check a spec."""
    return typing.get_type_hints(Spec)


def _names(value: Any) -> Any:
    """Names of columns, `id,notes` or a list, as a tuple; anything else as it is."""
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    return tuple(str(part) for part in parts if part != "") if isinstance(parts, list | tuple) else value


def measure_texts(value: Any) -> Any:
    """The setting `measures` as texts; of functions, of which a pair `(function, "low")` says that less is better."""
    if callable(value) or (isinstance(value, tuple) and len(value) == 2 and callable(value[0])):
        value = [value]
    if isinstance(value, list | tuple):
        pairs = [one if isinstance(one, tuple) and len(one) == 2 else (one, "") for one in value]
        value = [(function_text(one) if callable(one) else str(one)) + f":{way}" * bool(way) for one, way in pairs]
    return _names(value)


def placed_measures(value: Any) -> tuple[str, ...]:
    """Measures whose files are named by the paths that hold in every working folder."""
    return tuple(map(placed_function, measure_texts(value)))


def placed_function(text: str) -> str:
    """What may name a function of a file, by the path that holds in every working folder."""
    own = FUNCTION.fullmatch(text)
    return text.replace(own["file"], resolved_path(own["file"]), 1) if own else text


def with_overrides(settings: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Settings with `name=value` applied; a dotted name reaches inside."""
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise UsageError(f"{override!r} is not of the form name=value")
        *outer, last = name.split(".")
        inside = settings
        for step in outer:
            if isinstance(inside.get(step), str):
                inside[step] = named(inside[step])
            inside = inside.setdefault(step, {})
            if not isinstance(inside, dict):
                raise UsageError(f"{name}: {step} has no fields")
        inside[last] = parse(text)
    return settings


def resolved_path(data: str) -> str:
    """A path that holds in every working folder; any other name of data as it is."""
    return str(Path(data).resolve()) if Path(data).exists() else data


def plain(value: Any) -> Any:
    """A value with every tuple a list, as YAML has them."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _flat(spec: Spec) -> dict[str, Any]:
    settings = plain(dataclasses.asdict(spec))
    method = settings.pop("method")
    return settings | {f"method.{name}": value for name, value in method.items()}
