"""Every file and every class of the package is short enough to be read at a sitting: what grows is taken apart."""

import ast
from pathlib import Path

import fedloom

ROOT = Path(fedloom.__file__).parent
LINES_OF_A_FILE = 390
LINES_OF_A_CLASS = 200


def test_no_file_is_long():
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert "node.py" in lengths
    assert not {name: lines for name, lines in lengths.items() if lines > LINES_OF_A_FILE}


def test_no_class_is_long():
    lengths = {
        f"{path.relative_to(ROOT).as_posix()}: {node.name}": node.end_lineno - node.lineno + 1
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert "node.py: Node" in lengths
    assert not {name: lines for name, lines in lengths.items() if lines > LINES_OF_A_CLASS}
