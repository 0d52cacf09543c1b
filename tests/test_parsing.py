"""The mini-language: terms and chains, and what binds their values to fields and parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Optional

import pytest

from fedloom.errors import UsageError
from fedloom.parsing import Term, bound, called, chain

if TYPE_CHECKING:
    from nowhere import Known

NAMED = [
    ("median", ("median", [], {})),
    ("krum:f=4,m=3", ("krum", [], {"f": 4, "m": 3})),
    ("topk:0.01", ("topk", [0.01], {})),
    (" a : 1, x , k = v=w", ("a", [1, "x"], {"k": "v=w"})),
    ("a:", ("a", [], {})),
    ("a: ", ("a", [], {})),
    ("trace:C:/x.csv,repeat=true", ("trace", ["C:/x.csv"], {"repeat": True})),
    ("run:2026-01-02", ("run", ["2026-01-02"], {})),  # no setting is a date
]


@pytest.mark.parametrize(("text", "expected"), NAMED)
def test_a_name_its_values_and_its_options(text, expected):
    term = Term(text)
    assert (term.name, term.values, term.options) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("a:k=1,2", "'2' has no name"), ("a:k=1,k=2", "gives 'k' twice"), ("a:k=1, k =2", "gives 'k'")],
)
def test_values_behind_options_and_options_given_twice_are_refused(text, complaint):
    with pytest.raises(UsageError, match=complaint):
        Term(text).options  # noqa: B018


def test_a_chain_is_its_terms_as_they_stand():
    terms = chain("topk:0.01+ qsgd:4,ef=false +zstd")
    assert [term.text for term in terms] == ["topk:0.01", " qsgd:4,ef=false ", "zstd"]
    assert [term.name for term in terms] == ["topk", "qsgd", "zstd"]
    assert [term.rest for term in terms] == ["0.01", "4,ef=false ", None]
    assert [term.name for term in chain("")] == [""], "for a registry to say that it knows no such name"


@dataclass(frozen=True)
class Base:
    keep: bool | None = None


@dataclass(frozen=True)
class Rule(Base):
    inner: object = None
    share: float = 0.1
    rounds: int = 1
    way: Literal["up", "down"] = "up"
    most: Optional[float] = None  # noqa: UP045 - as others write it

    size: ClassVar[int] = 3


def rule(text, **more):
    return bound(Term(text), Rule, besides=("inner",), last=("keep",), **more)


def test_values_become_fields_in_their_types():
    assert rule("rule") == {}
    assert rule("rule:1,2,down") == {"share": 1.0, "rounds": 2, "way": "down"}
    assert type(rule("rule:1")["share"]) is float and type(rule("rule:share=1")["share"]) is float
    assert rule("rule:0.5,way=up,keep=null,most=3") == {"share": 0.5, "way": "up", "keep": None, "most": 3.0}
    assert rule("rule:0.5,1,up,2,true")["keep"] is True


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rule:1,2,up,4,true,6", "rule got 6 values without a name; its options are share, rounds, way, most, keep"),
        ("rule:shar=1", r"unknown option of rule 'shar'; did you mean 'share'\? \(known: keep, most, rounds, share"),
        ("rule:inner=1", "unknown option of rule 'inner'"),
        ("rule:size=1", "unknown option of rule 'size'"),
        ("rule:1,share=2", "rule got share twice, with its name and without"),
        ("rule:share=1,share=2", "gives 'share' twice"),
        ("rule:many", "rule: share is 'many', of type str; it must be of type float"),
        ("rule:1,2.5", "rule: rounds is 2.5, of type float; it must be of type int"),
        ("rule:way=dwn", r"unknown rule: way 'dwn'; did you mean 'down'"),
        ("rule:share=nan", "rule: share is nan; it must be a finite number"),
    ],
)
def test_values_that_do_not_fit_are_refused(text, complaint):
    with pytest.raises(UsageError, match=complaint):
        rule(text)


def test_an_owner_is_what_errors_say():
    with pytest.raises(UsageError, match="unknown option of compress: rule 'a'"):
        rule("rule:a=1", owner="compress: rule")
    with pytest.raises(UsageError, match="compress: rule: share is 'x'"):
        rule("rule:x", owner="compress: rule")


def test_a_class_without_fields_has_no_options():
    with pytest.raises(UsageError, match="base got 1 values without a name; it has no options"):
        bound(Term("base:3"), Base, besides=("keep",))


def build(spec: Known, kind: str = "a", rank: int = 8, *others: str | float, scale: float = 1.0, like: Known = None):
    return kind, rank, others, scale, like


def ask(text, **more):
    return called(Term(text), build, "spec", where=f"problem {text!r}", **more)


def test_a_function_gets_its_values_as_they_were_written():
    assert ask("build") == ("a", 8, (), 1.0, None)
    assert ask("build:b,2,x,3,scale=2") == ("b", 2, ("x", 3), 2, None)
    assert type(ask("build:scale=2")[3]) is int
    assert ask("build:like=anything")[4] == "anything", "its type is known to type checkers alone"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("build:rang=3", r"problem 'build:rang=3': got an unexpected keyword argument 'rang'; did you mean 'rank'\?; "),
        ("build:spek=3", "'spek'; build takes kind=a, rank=8, OTHERS,..., scale=1.0, like=None$"),
        ("build:a,kind=b", "multiple values for argument 'kind'"),
        ("build:spec=3", "multiple values for argument 'spec'"),
        ("build:3", "problem 'build:3': kind is 3, of type int; it must be of type str"),
        ("build:rank=x", "rank is 'x', of type str; it must be of type int"),
        ("build:a,2,3,true", "others is True, of type bool; it must be of type str or float"),
    ],
)
def test_values_that_a_function_does_not_take_are_refused(text, complaint):
    with pytest.raises(UsageError, match=complaint):
        ask(text)


def test_a_form_says_how_values_are_written():
    with pytest.raises(UsageError, match=r"'a'; build is written as build:KIND$"):
        ask("build:a=3", form="build:KIND")


def test_an_error_inside_the_function_is_its_own():
    def broken(spec):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        called(Term("broken"), broken, "spec", where="here")
    with pytest.raises(UsageError, match="here: too many positional arguments; broken takes no options"):
        called(Term("broken:1"), broken, "spec", where="here")
