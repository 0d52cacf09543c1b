"""Every file of the package can be read after those that it imports: no imports lead back to where they began.

All imports count: at the top of a file, inside a function, for type annotations only, relative ones.
"""

import ast
from importlib.util import resolve_name
from pathlib import Path

import pytest

import fedloom

ROOT = Path(fedloom.__file__).parent


def arrows(root):
    """By module: those of its package that it imports. `from a import b` is of `a.b` where that is a module."""
    paths = {".".join((root.name, *path.relative_to(root).with_suffix("").parts)): path for path in root.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found = {}
    for module, path in modules.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {one.name for one in node.names}
                names |= {one.name.partition(".")[0] for one in node.names if not one.asname}  # which this binds
            elif isinstance(node, ast.ImportFrom):
                home = resolve_name("." * node.level + (node.module or ""), package)
                names |= {name if (name := f"{home}.{one.name}") in modules else home for one in node.names}
        found[module] = names & modules.keys() - {module}
    return found


def circles(root):
    """The sets of modules that all reach each other by imports."""
    imported, reach = arrows(root), {}
    for module in imported:
        reach[module], todo = set(), [module]
        while todo:
            new = imported[todo.pop()] - reach[module]
            reach[module] |= new
            todo += new
    found = {frozenset(one for one in reach[module] if module in reach[one]) for module in reach}
    return sorted(sorted(circle) for circle in found if circle)


def test_no_imports_lead_back():
    assert {"fedloom.comparison.grid", "fedloom.errors"} < arrows(ROOT)["fedloom.api"]  # the package is seen
    assert circles(ROOT) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": "from p import b", "b": "from p.a import f"}, ["p.a", "p.b"]),
        ({"a": "from p.b import f", "b": "def f():\n    import p.a as other"}, ["p.a", "p.b"]),
        ({"a": "if TYPE_CHECKING:\n    from p.b import F", "b": "import p.a"}, ["p.a", "p.b"]),
        ({"a": "from . import b", "b": "from .a import f"}, ["p.a", "p.b"]),
        ({"a": "from .sub import c", "b": "import p.a", "sub/c": "from .. import b"}, ["p.a", "p.b", "p.sub.c"]),
        ({"__init__": "from p.a import f", "a": "from p import g"}, ["p", "p.a"]),
        ({"__init__": "from .a import f", "a": "import p.b", "b": ""}, ["p", "p.a"]),  # it has `p` to go by
        ({"__init__": "from .a import f", "a": "import p.b as b, q", "b": "from q import p", "c": "import p"}, None),
    ],
)
def test_whatever_leads_back_is_found(files, expected, tmp_path):
    for name, text in ({"sub/__init__": "", "__init__": ""} | files).items():
        path = tmp_path / "p" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert circles(tmp_path / "p") == ([expected] if expected else [])
