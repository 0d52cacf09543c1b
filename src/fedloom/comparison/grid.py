"""What is compared, in words: methods, seeds and settings, which make the cells; read and checked before any starts."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom import tasks
from fedloom._version import __version__
from fedloom.comparison import measures, statistics
from fedloom.comparison.layout import folder
from fedloom.comparison.reading import (
    apply_shared_fields,
    class_of,
    fields_of,
    given_fields,
    inside,
    labelled,
    mapping,
    placed,
    seeds_of,
    settings_label,
    with_absolute_paths,
)
from fedloom.errors import UsageError, unknown
from fedloom.fields import coerced, current_names, dumped
from fedloom.method import Method, build
from fedloom.quality import Quality, asked, family_of
from fedloom.runs.spec import BUDGETS, KNOWN, Spec, plain

if TYPE_CHECKING:
    from fedloom.data.given import Given
    from fedloom.task import Task

Key = tuple[str, str, int]  # setting, method's label, seed

SEEDS = 3  # where nobody says how many
CAP = 1000  # rounds, where a budget of another kind ends a run and nobody says `rounds`
TRIAL_SEED = 1000  # of tuning, or the next one that no cell has
OWN = ("method", "seed")  # settings of a run that a comparison decides


@dataclass(frozen=True)
class Comparison:
    """Which methods, at which seeds, under which settings. One run each is a cell."""

    methods: dict[str, dict[str, Any]]  # by label: {"name": ..., field: value}, only the fields that were given
    seeds: tuple[int, ...] = tuple(range(SEEDS))  # a number n stands for 0 to n - 1
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name: run settings in place of the base's
    base: dict[str, Any] = field(default_factory=dict)  # run settings of every cell
    tune: int = 0  # trials of every method under every setting, before its cells run
    ranges: dict[str, Any] = field(default_factory=dict)  # by field: where tuning looks, in place of the methods' own
    baseline: str | None = None  # the label that others are tested against; null: the best
    test: str | None = None  # which paired test
    metric: str | None = None  # what methods are compared by
    target: float | None = None  # the accuracy up to which rounds, bytes and seconds are counted
    objects: dict[str, Method] = field(default_factory=dict, repr=False, compare=False)  # that no file gives again

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Comparison)
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, coerced(f.name, getattr(self, f.name), hints[f.name]))
        if not self.methods:
            raise UsageError("nothing to compare: give methods, as in `fedloom compare fedavg scaffold`")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"seeds are {list(self.seeds)}; give a number, such as 5, or distinct seeds")
        for seed in self.seeds:
            coerced("a seed", seed, int)
        if self.tune < 0:
            raise UsageError(f"tune is {self.tune}; it is a number of trials, at least 0")
        if self.baseline is not None and self.baseline not in self.methods:
            raise unknown("baseline", self.baseline, self.methods)
        if not self.settings:
            name = folder(Path(self.base.get("data", Spec.data)).stem)
            object.__setattr__(self, "settings", {name: {}})
        for kind, names in (("methods", self.methods), ("settings", self.settings)):
            taken: dict[str, str] = {}
            for one in names:
                if folder(one) in taken:
                    raise UsageError(f"the {kind} {taken[folder(one)]!r} and {one!r} would share a folder; rename one")
                taken[folder(one)] = one
        self._check_settings()

    def _check_settings(self) -> None:
        for where, given in (("", self.base), *self.settings.items()):
            for name in given:
                told = f"setting {where}: " if where else ""
                if name in OWN:
                    raise UsageError(f"{told}{name} is not shared by all cells; a comparison has `{name}s`")
                if name not in KNOWN:
                    fields = "a field of all methods is fields={NAME: ...}, of one of them METHOD:NAME=..."
                    raise UsageError(f"{told}{unknown('setting', name, KNOWN)}; {fields}")

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Comparison:
        """A comparison from its YAML: its own fields by name, `fields` for all methods, and run settings beside them.

        `methods` is a list of names, files, Methods and mappings (`{name: fedprox, mu: 0.1, label: strong}`), or a
        mapping from labels; `settings` a mapping from names to run settings, or a list of such settings.
        """
        given = current_names(settings)
        given.pop("fedloom", None)  # the version that wrote it
        shared = given.pop("fields", None) or {}
        own = {name: given.pop(name) for name in OURS if name in given}
        own["methods"], own["objects"] = labelled(own.get("methods") or ())
        own["methods"] = apply_shared_fields(own["methods"], own["objects"], shared)
        if "seeds" in own:
            own["seeds"] = seeds_of(own["seeds"])
        circumstances = own.pop("settings", None) or {}
        if not isinstance(circumstances, Mapping):
            circumstances = {settings_label(one): one for one in circumstances}
        anywhere = {name: with_absolute_paths(dict(one or {})) for name, one in circumstances.items()}
        return Comparison(**own, settings=anywhere, base=with_absolute_paths(given))

    @staticmethod
    def read(path: str | Path) -> Comparison:
        """A comparison from a YAML file."""
        return Comparison.of(mapping(path))

    def text(self) -> str:
        """The YAML of this comparison, which `of` reads."""
        own = {name: getattr(self, name) for name in OURS}
        set_ = {name: value for name, value in own.items() if value not in (None, 0, {})}
        return dumped(plain({"fedloom": __version__} | set_ | self.base))

    def grid(self) -> Iterator[Key]:
        """Every cell: by setting, then method, then seed."""
        return itertools.product(self.settings, self.methods, self.seeds)

    @property
    def budgets(self) -> dict[str, float]:
        """What beside rounds ends a run, by name; a setting may have its own in the place of the base's."""
        found = self.base | {name: value for one in self.settings.values() for name, value in one.items()}
        return {name: found[name] for name in BUDGETS if found.get(name) is not None}

    @property
    def trial_seed(self) -> int:
        """The seed of all tuning trials: none of the cells'."""
        return next(seed for seed in itertools.count(TRIAL_SEED) if seed not in self.seeds)

    def spec(self, setting: str, method: str, seed: int, tuned: Mapping[str, Any] | None = None) -> Spec:
        """The spec of a cell's run."""
        settings = self.base | self.settings[setting]
        if "rounds" not in settings and any(settings.get(name) is not None for name in BUDGETS):
            settings["rounds"] = CAP
        return Spec.of(
            settings | {"method": placed(self.kind(method), self.methods[method], tuned or {}), "seed": seed}
        )

    def kind(self, method: str) -> type[Method]:
        """The class of a method."""
        return type(self.objects[method]) if method in self.objects else class_of(self.methods[method])

    def inside(self, method: str) -> Iterator[tuple[str, type[Method], Mapping[str, Any]]]:
        """A method and those that it wraps, as `reading.inside` gives them."""
        return inside(self.kind(method), self.methods[method])

    def made(self, method: str, spec: Spec) -> Method:
        """The method of a cell, whose fields this checks."""
        fields = given_fields(spec.method)
        if method in self.objects:
            return dataclasses.replace(self.objects[method], **fields)
        return build(spec.method["name"], fields)

    @property
    def problems(self) -> list[str]:
        """The kinds of problems of the settings, each once."""
        kinds = ((self.base | one).get("problem", Spec.problem) for one in self.settings.values())
        return list(dict.fromkeys(kinds))

    @property
    def asked(self) -> list[Quality]:
        """The measures that the settings ask for beside their problems' own, each once."""
        each = [self.base | one for one in self.settings.values()]
        texts = [text for one in each for text in (*one.get("measures", ()), one.get("choose_by"))]
        having = {text for one in each for text in one.get("measures", ())}
        return list(dict.fromkeys(asked(text) for text in texts if text and (text in having or family_of(text))))

    @property
    def code(self) -> list[Mapping[str, Any]]:
        """What names files that the runs execute: methods, and measures of one's own."""
        first = next(iter(self.methods))
        specs = (self.spec(setting, first, self.seeds[0]) for setting in self.settings)
        return [*self.methods.values(), *(one for spec in specs for one in spec.code[1:])]

    def check(self, task: Task | Given | None = None) -> None:
        """Raises UsageError that names the first cell which could not be run, without reading any data."""
        own = getattr(task, "qualities", None)  # data have none, and are what the settings make of them
        judged = [own] if own else [tasks.qualities(problem) for problem in self.problems]
        mains = list(dict.fromkeys(one[0].words for one in judged))
        if len(mains) > 1:
            raise UsageError(
                f"the settings are judged by {' and '.join(mains)}, which do not compare; make a comparison of each"
            )
        measures.metric(self.metric, (*judged[0], *(one for one in self.asked if one not in judged[0])))
        statistics.which_test(self.test)
        for setting, method, seed in itertools.product(self.settings, self.methods, self.seeds[:1]):
            with naming(f"{setting}/{method}"):
                spec = self.spec(setting, method, seed)
                self.made(method, spec)
                if self.tune and not spec.validation:
                    raise UsageError("tune needs validation data, and validation is 0; give a share, such as 0.1")
        for name in self.ranges:
            if not any(name in fields_of(kind) for label in self.methods for _, kind, _ in self.inside(label)):
                raise UsageError(f"ranges: no method of this comparison has a field {name!r}")

    def clashes(self, other: Comparison) -> str | None:
        """The first cell that both have and that would not be the same run, with what differs; None if none does."""
        shared = set(other.grid())
        for key in self.grid():
            if key in shared:
                mine, theirs = self.spec(*key), other.spec(*key)
                differing = mine.differences(theirs, free=frozenset({"engine", "workers", "track"}))
                if (self.tune, self.ranges) != (other.tune, other.ranges):
                    differing.append(f"tuning: {other.tune} trials there, {self.tune} here")
                elif self.tune and self.trial_seed != other.trial_seed:
                    differing.append(f"the seed of tuning: {other.trial_seed} there, {self.trial_seed} here")
                if differing:
                    return f"cell {key[0]}/{key[1]}/seed-{key[2]}: {'; '.join(differing)}"
        return None


OURS = tuple(f.name for f in dataclasses.fields(Comparison) if f.name not in ("base", "objects"))


@contextmanager
def naming(cell: str) -> Iterator[None]:
    """Around work on a cell: a UsageError of it begins with the cell's name."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"cell {cell}: {error}") from error
