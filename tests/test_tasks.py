"""The kinds of problems, by the settings of a run."""

import pytest

from manyhands import tasks
from manyhands.errors import UsageError
from manyhands.spec import Spec
from manyhands.tasks.classification import Classification


def test_a_problem_is_built_by_its_name():
    task = tasks.build(Spec(data="digits", clients=4, public=0.1))
    assert isinstance(task, Classification) and task.population == 4
    assert task.offers == {"public"} and len(task.public()) > 0
    assert tasks.build(Spec(clients=4)).offers == frozenset()


@pytest.mark.parametrize(
    ("problem", "complaint"),
    [
        ("clasification", "unknown problem 'clasification'.* did you mean 'classification'"),
        (
            "classification:3",
            "problem 'classification:3': too many positional arguments; classification takes no options",
        ),
        ("classification:a=3", "got an unexpected keyword argument 'a'"),
    ],
)
def test_a_problem_that_does_not_exist_or_fit_is_refused(problem, complaint):
    with pytest.raises(UsageError, match=complaint):
        tasks.build(Spec(problem=problem))
