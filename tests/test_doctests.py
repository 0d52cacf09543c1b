"""Every public name has an example in its docstring, and the examples do what they say."""

import doctest

import pytest
import torch

import fedloom

NAMES = [name for name in fedloom.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name(name):
    found = doctest.DocTestFinder(recurse=False).find(
        getattr(fedloom, name), name, globs={"fedloom": fedloom, "torch": torch}
    )
    assert found and found[0].examples, f"the docstring of fedloom.{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for one in found:
        runner.run(one, out=said.append)
    assert not runner.failures, "".join(said)
