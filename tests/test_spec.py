"""A run in words: read, checked, overridden, written and read again."""

from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.errors import UsageError
from fedloom.fields import MOST_DEPTH, coerced, loaded, parse
from fedloom.runs.spec import FREE, KNOWN, Spec, resolved_path, with_overrides

TEXTS = [
    ("0.1", 0.1),
    ("1e-3", 1e-3),  # YAML's own reader takes this for a word
    ("1E5", 1e5),
    ("3", 3),
    ("-3", -3),
    ("true", True),
    ("null", None),
    ("", None),
    ("adam", "adam"),
    ("dirichlet:0.3", "dirichlet:0.3"),
    ("[1, 2]", [1, 2]),
    ("{a: 1}", {"a": 1}),
    ("'1e-3'", 1e-3),
]


@pytest.mark.parametrize(("text", "value"), TEXTS)
def test_values_are_read_as_they_look(text, value):
    parsed = parse(text)
    assert parsed == value and type(parsed) is type(value)


def nested(depth):
    return "[" * depth + "]" * depth


def test_texts_have_bounds_in_depth_and_in_values_with_those_that_aliases_repeat(monkeypatch):
    monkeypatch.setattr("fedloom.fields.MOST_VALUES", 10_000)
    assert loaded(nested(MOST_DEPTH), "it") is not None and loaded(f"[{','.join(['[1]'] * 99)}]", "it")
    with pytest.raises(UsageError, match=f"it has more than {MOST_DEPTH} lists or mappings inside one another"):
        loaded(nested(MOST_DEPTH + 1), "it")
    hundred = "[" + ",".join("1" * 99) + "]"
    ninety = f"a: &a {hundred}\nb: [{','.join(['*a'] * 98)}]"  # 1 + 2 keys, 100, and 1 + 98 times 100
    assert len(loaded(ninety, "it")["b"]) == 98
    for text in (
        f"a: &a {hundred}\nb: [{','.join(['*a'] * 99)}]",
        "{" + ",".join(f"k{i}: 1" for i in range(5_000)) + "}",  # keys count as well
        "&a [*a]",
    ):
        with pytest.raises(UsageError, match="it has more than 10000 values"):
            loaded(text, "it")


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None)
def test_every_float_comes_back(number):
    assert parse(repr(number)) == number


FITTING = [
    (1, float, 1.0),
    (1, int, 1),
    (1, int | None, 1),
    (None, int | None, None),
    (1, int | float, 1),
    (True, bool, True),
    ("1e-3", float, 1e-3),  # as it comes out of a YAML file
    ("1e-3", str, "1e-3"),
    ([1, 2], tuple[int, ...], (1, 2)),
    ([1, 2], list[int], [1, 2]),
    ("a", Literal["a", "b"], "a"),
    ({"a": 1}, dict[str, int], {"a": 1}),
]


@pytest.mark.parametrize(("value", "hint", "fitted"), FITTING)
def test_a_value_in_the_type_that_is_asked_for(value, hint, fitted):
    found = coerced("x", value, hint)
    assert found == fitted and type(found) is type(fitted)


UNFIT = [
    (1.5, int, "x is 1.5, of type float; it must be of type int"),
    (True, int, "of type bool; it must be of type int"),
    (True, float, "of type bool; it must be of type float"),
    (1, bool, "of type int; it must be of type bool"),
    ("fast", float, "x is 'fast', of type str; it must be of type float"),
    (None, str, "of type NoneType; it must be of type str"),
    ("x", int | None, "it must be of type int or null"),
    ([1], dict[str, int], "of type list; it must be of type dict"),
    (float("nan"), float, "x is nan; it must be a finite number"),
    (float("inf"), float | None, "x is inf; it must be a finite number"),
    ("addam", Literal["adam", "yogi"], "unknown x 'addam'; did you mean 'adam'"),
]


@pytest.mark.parametrize(("value", "hint", "complaint"), UNFIT)
def test_a_value_of_another_type_is_refused(value, hint, complaint):
    with pytest.raises(UsageError) as refused:
        coerced("x", value, hint)
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


WRONG = [
    ({"cohorts": 3}, "unknown setting 'cohorts'; did you mean 'cohort'"),
    ({"rounds": 0}, "rounds is 0; it must be at least 1"),
    ({"rounds": 2.5}, "rounds is 2.5, of type float"),
    ({"clients": 0}, "clients is 0; it must be at least 1"),
    ({"cohort": -1}, "cohort is -1; it must be at least 1"),
    ({"threads": 0}, "threads is 0; it must be at least 1"),
    ({"workers": -1}, "workers is -1; it must be at least 0"),
    ({"eval_every": 0}, "eval_every is 0; it must be at least 1"),
    ({"max_seconds": -1}, "max_seconds is -1.0; it must be at least 0"),
    ({"validation": 1.0}, "validation is 1.0; it is a share, at least 0 and below 1"),
    ({"validation": -0.1}, "validation is -0.1; it is a share"),
    ({"public": 1.0}, "public is 1.0; it is a share, at least 0 and below 1"),
    ({"public": -0.1}, "public is -0.1; it is a share"),
    ({"shared_data": 1.0}, "shared_data is 1.0; it is a share, at least 0 and below 1"),
    ({"buffers": "averaged"}, "unknown policy for buffers 'averaged'; did you mean 'average'"),
    ({"method": {"lr": 0.1}}, "a spec needs the name of a method"),
    ({"method": 3}, "method is 3, of type int"),
    ({"seed": "zero"}, "seed is 'zero', of type str"),
    ({"label": False}, "label is False, of type bool"),
]


@pytest.mark.parametrize(("given", "complaint"), WRONG)
def test_settings_that_make_no_sense_are_refused(given, complaint):
    with pytest.raises(UsageError) as refused:
        Spec.of(given)
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


def test_columns_are_named_by_a_list_or_by_a_text_with_commas():
    for names in ("id, notes,", ["id", "notes"], ("id", "notes", "")):
        assert Spec(exclude=names).exclude == ("id", "notes")
    assert Spec(keep="").keep == () and Spec(keep=[3]).keep == ("3",)


def test_a_path_of_data_holds_in_every_folder_and_a_name_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").touch()
    assert resolved_path("rows.csv") == str(tmp_path / "rows.csv") and resolved_path("digits") == "digits"


def test_a_methods_name_is_short_for_a_method_without_fields():
    assert Spec.of({"method": "scaffold"}) == Spec.of({"method": {"name": "scaffold"}})
    assert Spec.of({}) == Spec() and Spec().method == {"name": "fedavg"}


VALUES = {
    "method": {"name": "fedopt", "lr": 0.1, "betas": (0.9, 1e-8), "deep": {"a": [1, None, True]}},
    "label": "no",  # YAML reads it as false unless it is quoted
    "partition": "dirichlet:1e-3",
    "clients": 7,
    "max_seconds": 1e-3,
    "seed": 2**70,
}


@pytest.mark.parametrize("settings", [{}, VALUES])
def test_what_is_written_is_read_again(tmp_path, settings):
    spec = Spec.of(settings)
    path = tmp_path / "spec.yaml"
    path.write_text(spec.text("1.2.3"))
    again = Spec.read(path)
    assert not spec.differences(again) and again.text("1.2.3") == spec.text("1.2.3")
    assert all(getattr(again, name) == getattr(spec, name) for name in KNOWN if name != "method")
    assert list(yaml.safe_load(path.read_text())) == ["fedloom", *KNOWN]


def test_tuples_are_written_as_lists_however_deep(tmp_path):
    spec = Spec.of({"method": {"name": "a", "deep": ((1, (2,)), {"b": (3,)})}})
    (path := tmp_path / "spec.yaml").write_text(spec.text("1.2.3"))
    again = Spec.read(path)
    assert again.method["deep"] == [[1, [2]], {"b": [3]}] and not spec.differences(again)


OVERRIDES = [
    (["rounds=5"], {"rounds": 5}),
    (["method=scaffold"], {"method": "scaffold"}),
    (["method.lr=1e-3"], {"method": {"name": "fedavg", "lr": 1e-3}}),
    (["method.lr=1", "method.lr=2"], {"method": {"name": "fedavg", "lr": 2}}),
    (["model="], {"method": "fedavg", "model": None}),
    (["partition=column:a=b"], {"partition": "column:a=b"}),
]


@pytest.mark.parametrize(("overrides", "expected"), OVERRIDES)
def test_overrides(tmp_path, overrides, expected):
    path = tmp_path / "spec.yaml"
    path.write_text("method: fedavg\n")
    assert Spec.read(path, overrides) == Spec.of({"method": "fedavg"} | expected)


@pytest.mark.parametrize("override", ["rounds", "=3", "rounds.x=3", "method.lr=[1"])
def test_overrides_that_cannot_be_read(override):
    with pytest.raises(UsageError) as refused:
        with_overrides({"rounds": 3, "method": "fedavg"}, [override])
    assert "\n" not in str(refused.value)


FILES = [
    (b"- a\n", "not a mapping"),
    (b"a: [1\n", "cannot read"),
    (b"\xff\xfe\x00", "cannot read"),
    (b"", "not a mapping"),
]


@pytest.mark.parametrize(("content", "complaint"), FILES)
def test_files_that_are_no_spec(tmp_path, content, complaint):
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=complaint) as refused:
        Spec.read(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(UsageError, match="cannot read the spec"):
        Spec.read(tmp_path / "absent.yaml")


def test_differences_name_what_decides_results():
    one, other = Spec.of({"method": {"name": "a", "lr": 0.1}}), Spec.of({"method": {"name": "a", "mu": 1}, "seed": 3})
    assert one.differences(other) == [
        "method.lr: None there, 0.1 here",
        "method.mu: 1 there, None here",
        "seed: 3 there, 0 here",
    ]
    free = {"rounds": 99, "engine": "pool", "workers": 3, "eval_every": 7, "track": "tensorboard"}
    free |= {"patience": 3, "min_delta": 0.1}
    free |= {"max_seconds": 1.0, "max_steps": 10, "max_bytes": 100, "max_virtual_seconds": 2.0}
    assert free.keys() == FREE and not Spec().differences(Spec.of(free))
