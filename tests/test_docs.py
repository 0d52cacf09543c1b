"""What the pages of the documentation show, works."""

import ast
import csv
import re
from pathlib import Path

import pytest
import yaml

import fedloom
from fedloom.errors import UsageError
from fedloom.method import Method, build
from fedloom.registry import catalogue, entry_of
from fedloom.runs.spec import KNOWN
from fedloom.testing import check_method

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "benchmarks/results/claims.csv"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The files that `write-a-method.md` has its reader write, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for block in blocks("write-a-method.md", "python"):
        if named := re.match(r"# (\w+\.py)\n", block):
            Path(named[1]).write_text(block)
    return {path.name for path in tmp_path.iterdir()}


def test_the_page_has_its_reader_write_three_files(written):
    assert written == {"my_method.py", "polished.py", "bent.py"}


@pytest.mark.parametrize("name", ["my_method.py", "polished.py", "bent.py"])
def test_the_pages_methods_pass_the_contract(written, name):
    check_method(entry_of(name).load(Method))


def test_the_pages_method_is_some_forty_lines(written):
    text = Path("my_method.py").read_text()
    code = re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40


def test_the_pages_comparison(written):
    results = fedloom.compare(["fedavg", "my_method.py"], "digits", seeds=2, rounds=2, jobs=1, clients=4)
    assert not results.failed and not results.unfinished
    assert list(results.methods) == ["fedavg", "my_method"]
    steps = [row["server/step"] for cell in results.of("digits", "my_method") for row in cell.run.metrics]
    assert len(steps) == 4 and min(steps) >= 1


def test_the_pages_python_names_what_there_is(written, capsys, monkeypatch):
    (text,) = [block for block in blocks("write-a-method.md", "python") if "fedloom.compare(" in block]
    whole = fedloom.compare

    def tiny(*given, **settings):
        return whole(*given, **settings | {"seeds": 2, "rounds": 2, "clients": 4, "jobs": 1})

    monkeypatch.setattr(fedloom, "compare", tiny)
    exec(compile(text, "write-a-method.md", "exec"), {})  # noqa: S102 - our own page
    assert re.findall(r"^\w+", capsys.readouterr().out, re.MULTILINE) == ["fedavg", "my_method"]


def test_with_one_client_the_pages_method_is_fedavg(written):
    mine, fedavg = (
        fedloom.run(name, "digits", clients=1, partition="iid", rounds=2, fields={"lr": 0.1}).model
        for name in ("my_method.py", "fedavg")
    )
    assert (mine - fedavg).norm() <= 1e-5 * fedavg.norm()


def test_without_steps_of_the_server_the_plugin_is_the_method_inside(written):
    inside = {"name": "fedprox", "mu": 0.1}
    settings = {"public": 0.1, "clients": 4, "rounds": 2}
    around = fedloom.run("polished.py", "digits", fields={"inner": inside, "server_epochs": 0}, **settings)
    alone = fedloom.run("fedprox", "digits", fields={"mu": 0.1}, **settings)
    assert around.model.flat.equal(alone.model.flat)
    assert build("polished.py").inner.name() == "fedavg"


def test_what_the_pages_methods_refuse_and_need_is_said(written):
    with pytest.raises(UsageError, match="its step is made from plain means"):
        fedloom.run("my_method.py", "digits", aggregate="median", rounds=1)
    with pytest.raises(UsageError, match=r"set public=0\.05"):
        fedloom.run("polished.py", "digits", rounds=1)


# Pages about terms, settings and commands


def pages_of(navigation):
    """The pages that a navigation lists, its groups opened."""
    for entry in navigation:
        inside = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from pages_of(inside) if isinstance(inside, list) else [inside]


def test_the_navigation_has_every_page():
    pages = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert {"glossary.md", "settings.md", "cli.md"} <= {*pages}
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "examples").glob("*.ipynb")}
    assert {*pages} - {"methods/", "api/", "settings.md", "cli.md"} == written | notebooks
    assert len(pages) == len(set(pages))


def terms() -> list[str]:
    headings = re.findall(r"^### (.+)$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    return [term for heading in headings for term in heading.lower().split(" and ")]


def test_a_shape_in_a_docstring_is_not_read_as_a_link():
    """`[T][T]` in running text is Markdown's link to T, which the strict build of the pages refuses."""
    links = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = re.sub(r"`[^`]*`", "", (isinstance(node, DOCUMENTED) and ast.get_docstring(node)) or "")
            prose = "\n".join(line for line in text.splitlines() if not line.startswith((">>>", "    ")))
            links += [(path.name, found) for found in re.findall(r"\[[^\]\n]+\]\[[^\]\n]*\]", prose)]
    assert links == []


def test_the_glossary_has_each_term_once():
    assert len(terms()) == len(set(terms())) > 80


@pytest.mark.parametrize("term", terms())
def test_a_term_of_the_glossary_is_used(term):
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "src/fedloom/methods").rglob("*.py")]
    found = [page for page in pages if page.name not in ("glossary.md", "CHANGELOG.md")]
    said = " ".join(" ".join(page.read_text().lower().split()) for page in found)
    assert re.search(rf"\b{re.escape(term)}", said)


def test_pages_of_settings_and_commands_have_them_all(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import reference

    settings, commands = reference.settings_page(), reference.commands_page()
    assert re.findall(r"^\| <code>(\w+)</code>", settings, re.MULTILINE) == list(KNOWN[1:])
    for command in ("run", "resume", "compare", "sweep", "show", "report", "methods", "data", "check"):
        assert f"\n## {command}\n" in commands
    for command in ("predict", "export"):
        assert f"\n## {command}\n" in commands
    for option in ("--out", "--json", "--trust", "--seeds", "--over", "--search", "--setting", "--device", "--open"):
        assert f"<code>{option}" in commands


def test_the_page_of_installation_has_every_extra(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import reference

    assert {*reference.EXTRAS, *reference.DEVELOPERS} == {*reference.extras()}
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", reference.extras_table(), re.MULTILINE)
    assert [name for name, _ in rows] == [name for name in reference.extras() if name not in reference.DEVELOPERS]
    assert dict(rows)["llm"] == "transformers, peft" and dict(rows)["zstd"] == "zstandard"
    assert "<!-- the table of extras -->" in (ROOT / "docs" / "installation.md").read_text()


def test_every_method_comes_into_question_somewhere(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import chooser

    verdicts = {"fedavg": "contradicted", "scaffold": "held", "fedprox": "not seen"}
    text = chooser.sections(catalogue(), verdicts)
    listed = re.findall(r"^\| \[(\w+)\]\(methods/(\w+)/\w+\.md\) \|", text, re.MULTILINE)
    assert {entry.name: entry.folder for entry in catalogue()} == dict(listed)
    first = chooser.table(chooser.SITUATIONS[0], catalogue(), verdicts).splitlines()[2:]
    said = [line.split(" | ")[-1].rstrip(" |") for line in first]
    assert said == ["held", "not seen", "contradicted"] + ["not tried"] * (len(first) - 3)
    assert "<!-- the situations -->" in (ROOT / "docs" / "choosing.md").read_text()
    assert {row["verdict"] for row in csv.DictReader(CLAIMS.read_text().splitlines())} <= {*chooser.ORDER}


def test_what_the_chooser_says_of_a_method_its_class_declares(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import chooser

    for entry in catalogue():
        kind = entry.load(Method)
        found = {one.question for one in chooser.SITUATIONS if one.suits(entry, kind)}
        assert ("One round is all there is" in found) == kind.one_shot
        assert ("Clients hold other columns of the same rows, or nodes of one graph" in found) >= (
            not {"vertical", "graph"}.isdisjoint(kind.needs)
        )
