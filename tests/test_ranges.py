"""What is said beside a field's type: which numbers it takes, where a search looks, and what is read from the text."""

import ast
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pytest

from fedloom.errors import UsageError
from fedloom.method import Method
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.ranges import PLAIN, Among, LearningRate, Linear, Log, Positive, Range, Signed, hints_of
from fedloom.sources import declared


@dataclass(frozen=True)
class Ranged(Method):
    """A field of every kind."""

    rate: LearningRate = 0.1
    epochs: Positive[int] = 1
    plain: float = 0.0
    count: int = 0
    shift: Signed[float] = -1.0
    step: Signed[int] = -1
    mu: Annotated[float, Log(1e-3, 1.0)] = 0.01
    depth: Annotated[Positive[int], Linear(1, 8)] = 2
    kind: Annotated[Literal["a", "b"], Among("a", "b")] = "a"
    outside: Annotated[float | None, Log(0.1, 1.0)] = None
    whole: Positive[float | None] = None
    inside: Positive[float] | None = None
    flag: bool = False
    inner: Method = FedAvg()
    note: ClassVar[int] = -1


TAKEN = {
    "rate": ([1e-9, 1, 7.0], [0, 0.0, -1e-9], "greater than 0"),
    "epochs": ([1, 9], [0, -1], "greater than 0"),
    "plain": ([0, 0.0, 1e-9], [-1e-9, -1], "at least 0"),
    "count": ([0, 3], [-1], "at least 0"),
    "shift": ([-1e9, 0, 2.5], [], ""),
    "step": ([-9, 0, 2], [], ""),
    "mu": ([0, 0.0, 50.0], [-0.1], "at least 0"),  # a search looks in a part of what is taken
    "depth": ([1, 100], [0, -1], "greater than 0"),
    "outside": ([None, 0, 5.0], [-0.1], "at least 0"),
    "whole": ([None, 0.1], [0, -1], "greater than 0"),
    "inside": ([None, 0.1], [0, -1], "greater than 0"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_number_is_in_the_range_that_its_annotation_says(name):
    fine, wrong, said = TAKEN[name]
    for value in fine:
        assert getattr(Ranged(**{name: value}), name) == value
    for value in wrong:
        with pytest.raises(UsageError, match=f"test_ranges.{name} is .*; it must be {said}$"):
            Ranged(**{name: value})


def test_what_is_no_number_has_no_range():
    assert Ranged(flag=False, kind="b") and PLAIN.holds(None) and PLAIN.holds("x") and Range(0, above=True).holds(False)


def test_a_search_looks_where_the_fields_say_in_their_order():
    assert list(Ranged.search_space().items()) == [
        ("rate", (1e-3, 1.0, "log")),
        ("mu", (1e-3, 1.0, "log")),
        ("depth", (1, 8, "linear")),
        ("kind", ("a", "b")),
        ("outside", (0.1, 1.0, "log")),
    ]
    assert hints_of(Ranged)["depth"].type is int and hints_of(Ranged)["outside"].type == float | None


def test_a_name_alone_says_nothing_of_a_field():
    @dataclass(frozen=True)
    class Named(Method):
        lr: float = 0.1
        epochs: int = 1

    assert Named(lr=0, epochs=0).lr == 0 and Named.search_space() == {}


def test_a_field_that_is_declared_anew_has_the_new_range_and_every_other_the_bases():
    @dataclass(frozen=True)
    class Anew(FedAvg):
        epochs: Signed[int] = -1
        lr: Annotated[float, Linear(0.0, 0.5)] = 0.0

    assert Anew().epochs == -1 and Anew.search_space() == {"lr": (0.0, 0.5, "linear")}
    assert FedAvg.search_space() == {"lr": (1e-3, 1.0, "log")}
    with pytest.raises(UsageError, match="batch is -1; it must be at least 0"):
        Anew(batch=-1)

    @dataclass(frozen=True)
    class More(FedAvg):
        mu: Annotated[float, Log(0.1, 1.0)] = 0.5

    assert list(More.search_space()) == ["lr", "mu"]


def test_a_default_below_zero_says_how_it_is_declared():
    @dataclass(frozen=True)
    class Shifted(Method):
        shift: float = -1.0
        step: int = -2

    with pytest.raises(
        UsageError, match=r"shift is -1\.0; it must be at least 0, or declared as shift: Signed\[float\]$"
    ):
        Shifted()
    with pytest.raises(UsageError, match=r"step is -2; it must be at least 0, or declared as step: Signed\[int\]$"):
        Shifted(shift=0.0)
    with pytest.raises(UsageError, match=r"shift is -3\.0; it must be at least 0$"):
        Shifted(shift=-3.0)

    @dataclass(frozen=True)
    class Still(Method):
        lr: LearningRate = 0.0

    with pytest.raises(UsageError, match=r"lr is 0\.0; it must be greater than 0$"):
        Still()


def test_a_range_without_a_type_is_an_error():
    @dataclass(frozen=True)
    class Untyped(Method):
        lr: Positive = 0.1

    with pytest.raises(UsageError, match=r"Untyped\.lr has a range without a type; write lr: Positive\[float\], "):
        Untyped()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"signed": ("shift",)}, r"Mine\.signed .*declared with its type: shift: Signed\[float\]"),
        ({"ranges": {"mu": (0.1, 1.0, "log")}}, r"Mine\.ranges .*: mu: Annotated\[float, Log\(1e-3, 1\.0\)\]"),
        ({"ranges": {}, "__annotations__": {"ranges": ClassVar[dict]}}, r"Mine\.ranges has no meaning any more"),
        ({"ranges": {}, "__annotations__": {"ranges": "ClassVar[dict]"}}, r"Mine\.ranges has no meaning any more"),
    ],
)
def test_class_variables_that_said_it_before_are_loud(variables, said):
    with pytest.raises(UsageError, match=said):
        type("Mine", (Method,), {"__module__": "mine", "__annotations__": {}, **variables})


def test_fields_may_have_these_names():
    @dataclass(frozen=True)
    class Free(Method):
        signed: bool = False
        ranges: int = 3

    assert Free(signed=True).fields() == {"signed": True, "ranges": 3}


TEXT = """
class Mine(Method):
    # not of a field

    lr: LearningRate = 0.05  # eta
    epochs: Positive[int] = 1  # E
    mu: Annotated[float, Log(1e-3, 1.0)] = 0.01  # mu
    # a long comment
    deep: typing.Annotated[ranges.Positive[int], Linear(1, 8)] = 2
    # above
    both: Annotated[float | None, Log(0.1, 1.0)] = None  # beside
    rate: ranges.LearningRate | None = None
    inside: Positive[float] | None = None
    names: tuple[str, ...] = ()
    form: Literal["a", "b"] = "a"
    shared: ClassVar[int] = 3
    plain: float = 0.0
"""


def test_readers_of_the_text_see_the_plain_types_and_comments_beside_or_above():
    (cls,) = ast.parse(TEXT).body
    assert declared(TEXT, cls) == [
        ("lr", "float", "0.05", "eta"),
        ("epochs", "int", "1", "E"),
        ("mu", "float", "0.01", "mu"),
        ("deep", "int", "2", "a long comment"),
        ("both", "float | None", "None", "beside"),
        ("rate", "float | None", "None", ""),
        ("inside", "float | None", "None", ""),
        ("names", "tuple[str, ...]", "()", ""),
        ("form", "Literal['a', 'b']", "'a'", ""),
        ("plain", "float", "0.0", ""),
    ]
