"""What a run's settings come to at the server and at each client alike: method, problem, stages, network.

Whatever does not fit is refused here, before the first round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedloom import tasks
from fedloom.boundary.pipeline import Pipeline
from fedloom.data.given import Given
from fedloom.errors import UsageError
from fedloom.letters import with_article
from fedloom.method import Method, build
from fedloom.nets import BUILDERS, weights
from fedloom.parsing import Term, chain
from fedloom.plugin import welcomes
from fedloom.quality import Quality, family_of
from fedloom.registry import catalogue
from fedloom.runs.rehearsal import rehearsed
from fedloom.runs.spec import IN_PYTHON, Spec, placed_function, placed_measures, resolved_path
from fedloom.scoring import beside, chosen_by
from fedloom.site import Site
from fedloom.task import Task
from fedloom.tasks._given import sound
from fedloom.tasks._trained_by import BALANCED, trained_by
from fedloom.user_networks import is_own
from fedloom.vector import Layout
from fedloom.world.availability import located

LACKING = {
    "public": "public data at the server: set public=0.05, the share of the training rows that it gets",
    "encoder": "features of a frozen encoder: set embed=random on images, embed=sentence on texts, or another encoder",
    "blocks": "a network with several blocks: set model=resnet:3, or mlp:64,64,64",
    "shared_data": "data without labels that the server and all clients have: set shared_data=0.05, the share of the "
    "training rows that are kept for this",
}
PLAIN = Spec()
COLUMNS = (
    "label",
    "exclude",
    "keep",
    "metadata",
    "missing",
    "group",
    "sep",
    "encoding",
    "decimal",
    "resize",
    "windows",
)
DEALT = ("partition", "clients", "newcomers", "validation", "test_share", "public", "shared_data")
TASKS_OWN = ("problem", *COLUMNS, "embed", *DEALT, "model", "head")


class Fitted:
    """A method and a problem that fit each other, and the settings under which they do; `spec` is what they stand for.

    `apart` makes of the problem what one side of a network has of it.
    """

    def __init__(
        self,
        spec: Spec,
        task: Task | Given | None = None,
        method: Method | None = None,
        apart: Callable[[Spec, Task], Task] = lambda spec, whole: whole,
    ) -> None:
        self.asked = spec
        given = task if isinstance(task, Given) else None
        task = task if isinstance(task, Task) else None
        if task is None and given is None and spec.in_python:
            again = "task" if spec.partition == "given" else "data"
            raise UsageError(f"this run's data are {spec.data}; resume it in Python: fedloom.resume(path, {again})")
        fields = {name: value for name, value in spec.method.items() if name != "name"}
        self.method = method or build(spec.method["name"], fields)
        if task is not None and spec.data == named_as(task):
            _alone(spec, task)
        self.task = apart(spec, trained_by(task or tasks.build(spec, given), spec.loss, spec.class_weights))
        self.sits_out = type(self.task).present is not Task.present or (
            task is not None and not all(map(task.present, range(task.population)))
        )
        self._suit(spec)
        self.measures, self.qualities, self.chooser = _judged(spec, self.task, task is None)
        self.spec = replace(
            spec,
            method={"name": placed_file(spec.method["name"]), **self.method.fields()},
            data=resolved_path(spec.data),
            init=spec.init and resolved_path(spec.init),
            availability=located(spec.availability),
            attack=spec.attack and "+".join(map(_placed, chain(spec.attack))),
            rounds=1 if self.method.one_shot else spec.rounds,
            measures=placed_measures(self.measures),
            loss=spec.loss and placed_function(spec.loss),
            clients=self.task.population + self.task.newcomers,
            model=getattr(self.task, "model", spec.model),
            device=device_named(spec.device),
        )

    @property
    def planned(self) -> int | None:
        """The rounds that the method may go by, if it does."""
        return self.spec.rounds if self.method.scheduled else None

    def stages(self) -> Pipeline:
        """What may happen to messages on their way; raises UsageError for what makes no sense."""
        return rehearsed(self.method, Pipeline.of(self.asked, self.method, self.task), self.planned)

    def site_of(self, task: Task, pipeline: Pipeline) -> Site:
        """Where nodes live that have a problem in common."""
        spec = self.spec
        return Site(
            task,
            spec.seed,
            spec.device,
            spec.buffers,
            pipeline.layers,
            spec.blind,
            self.method.networks,
            self.method.needs,
            spec.measures,
            weights.read(spec.init) if spec.init else None,
        )

    def _suit(self, spec: Spec) -> None:
        """Raises UsageError where the method and the task do not suit each other, or the method refuses a setting."""
        lacking = [need for need in self.method.needs if need not in self.task.offers]
        if lacking:
            raise UsageError(
                f"{self.method.name()} needs {LACKING.get(lacking[0], f'a problem of the kind {lacking[0]}')}"
            )
        if strange := self.task.demands.difference(self.method.needs):
            fitting = [entry.name for entry in catalogue() if strange <= {*entry.load(Method).needs}]
            raise UsageError(
                f"{self.method.name()} cannot learn a problem of the kind {min(strange)}; take {' or '.join(fitting)}"
            )
        if not self.task.classes and (one := next((one for one in self.method.nested if one.by_class), None)):
            raise UsageError(
                f"{one.name()} needs classes, and this problem has none; take a method that does not work class by "
                "class, or problem=classification"
            )
        one = next((one for one in self.method.nested if one.by_head), None)
        if one and not self.task.headed:
            raise UsageError(
                f"{one.name()} works on the head of a network, or on the features before it, and none is known of "
                f"{getattr(self.task, 'model', None) or type(self.task).__name__}; name the module that makes its "
                "outputs, such as head=fc"
            )
        if spec.newcomers and not self.task.newcomers:
            raise UsageError(
                f"newcomers={spec.newcomers}: the problem {spec.problem} holds no clients out; leave it out"
            )
        if self.task.newcomers and not welcomes(self.method):
            raise UsageError(
                f"newcomers={spec.newcomers or self.task.newcomers}: nothing that {self.method.name()} has learned "
                "comes to a client that was never asked; take a method whose `predict` is sent something, or that "
                "has a `join`"
            )
        if spec.class_weights == BALANCED and spec.dp:
            raise UsageError(
                f"class_weights=balanced goes by how many samples of each class the clients have, which dp={spec.dp} "
                "does not hide; give a number for each class, or leave it out"
            )
        if spec.patience is not None:
            _judged_by_validation(spec, self.task)
        for one in self.method.nested:
            for refused, why in one.refuses.items():
                setting, _, word = refused.partition("=")
                value = getattr(spec, setting)
                if value != getattr(PLAIN, setting) and word in str(value):
                    raise UsageError(f"{one.name()} does not go with {setting}={value}: {why}")


def _judged_by_validation(spec: Spec, task: Task) -> None:
    """Raises UsageError where no validation rows, or not the same problem all along, tell when to stop."""
    held = task.global_validation()
    if held is None and not any(task.rows_of(client, "validation") for client in range(task.population)):
        raise UsageError(
            f"patience={spec.patience} goes by validation rows, and this problem has none; set validation=0.1, the "
            "share of each client's training rows that is set aside, or leave patience out"
        )
    if task.stage(1) is not None:
        raise UsageError(
            f"patience={spec.patience} would end the run before all tasks have come: the problem {spec.problem} "
            "changes with time; leave it out"
        )


def _alone(spec: Spec, task: Task) -> None:
    """Raises UsageError for a task given in Python that is no sound one, or for a setting that it does not read."""
    sound(task)
    for name in TASKS_OWN:
        value, own = getattr(spec, name), getattr(task, name, None)
        if name == "clients":
            own = task.population + task.newcomers
        if value not in (getattr(PLAIN, name), own, "given"):
            raise UsageError(
                f"{name}={value} has no effect on a task given in Python, which brings its own data, clients "
                "and network; leave it out, and make the task so"
            )


def _judged(spec: Spec, task: Task, dealt: bool) -> tuple[tuple[str, ...], tuple[Quality, ...], Quality]:
    """The measures that a run asks for, all that it has, the task's first, and the one by which validation chooses."""
    by = spec.choose_by
    implied = (by,) if by and family_of(by) and by not in spec.measures else ()
    texts = (*spec.measures, *implied)
    others = tuple(one.quality for one in beside(texts, task))
    if by is None:
        return texts, (*task.qualities, *others), task.qualities[0]
    if dealt and not spec.validation:
        raise UsageError(f"choose_by={by}: validation=0 sets nothing aside to choose by; give a share, such as 0.1")
    return texts, (*task.qualities, *others), chosen_by(by, task, others)


def recipe_of(site: Site, layout: Layout) -> Mapping[str, Any] | None:
    """What a network of a layout can be built of, in plain JSON; None if only this task, or method, can do so."""
    recipe = site.task.recipe()
    if recipe is None or layout == site.bench.layout:
        return recipe
    named = (key[1] for key, w in site.others.items() if key[0] == "task" and w.layout == layout)
    model = next(named, None)
    known = recipe["kind"] == "library" and model and not is_own(model, BUILDERS)
    return {**recipe, "model": model} if known else None


def named_as(task: Task) -> str:
    """What a spec calls the data of a task that only Python has."""
    return f"{with_article(type(task).__name__)}{IN_PYTHON}"


def placed_file(name: str) -> str:
    """The name of a method; of a method's file the path that holds in every working folder."""
    return str(Path(name).resolve()) if name.endswith(".py") and Path(name).is_file() else name


def _placed(term: Term) -> str:
    """A term of a setting; a user's file in it by the path that holds in every working folder."""
    return term.text.replace(term.name, placed_file(term.name), 1)


def device_named(name: str) -> str:
    """The device that a setting stands for; UsageError if it is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("device is cuda, but this PyTorch sees no CUDA device; take --device cpu or auto")
    if name != "cpu" and not name.startswith("cuda"):
        raise UsageError(f"unknown device {name!r} (known: auto, cpu, cuda)")
    return name
