"""The notebooks of `examples/` run from top to bottom in a kernel, and are kept without outputs."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.fixture
def notebooks(monkeypatch):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.syspath_prepend(ROOT / "docs")
    import notebooks

    return notebooks


def test_the_pages_have_every_notebook(notebooks):
    assert sorted(notebooks.names()) == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_links_of_a_notebook_lead_somewhere(path):
    text = "".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
    links = re.findall(r"\]\((?!https:)([^)]+)\)", text)
    assert all((path.parent / link.partition("#")[0]).is_file() for link in links)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_kernel_and_warns_of_nothing(path, notebooks, tmp_path):
    done = notebooks.executed(path.stem, tmp_path)
    printed = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output.text for output in printed if output.get("name") == "stderr"]
    text, pictures = notebooks.page(path.stem, done)
    assert text.count("```python\n") == sum(cell.cell_type == "code" for cell in done.cells)
    assert "Traceback" not in text and ".ipynb" not in text
    assert all(f"]({name})" in text and data for name, data in pictures.items())
    expected = {  # what the text around it speaks of
        "first_steps": r"predicted \['0', '1', '2'",
        "own_data_and_network": r"patient_id</td><td>ignored",
        "write_a_method": r"\d+ of \d+ checks passed",
    }
    assert re.search(expected[path.stem], text)
    if path.stem == "write_a_method":
        (passed,) = re.findall(r"(\d+) of (\d+) checks passed", text)
        assert passed[0] == passed[1] and int(passed[0]) > 40
