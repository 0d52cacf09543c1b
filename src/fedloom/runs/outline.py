"""A run in a few words, for a table of runs, a notebook, a list of folders; and the folders in which runs lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Protocol

from fedloom.errors import RunError, UsageError
from fedloom.quality import evaluated, main_of
from fedloom.runs.spec import Spec


class Shown(Protocol):
    """What is needed of a `Run`: what was asked, and what was measured."""

    @property
    def path(self) -> Path: ...

    @property
    def spec(self) -> Spec: ...

    @property
    def manifest(self) -> Mapping[str, Any]: ...

    @property
    def metrics(self) -> Sequence[Mapping[str, Any]]: ...

    @property
    def selected(self) -> Mapping[str, Any]: ...


def outline(run: Shown) -> dict[str, Any]:
    """Method, data, clients, how far it came, and the main measure in the round that validation chose."""
    spec, metrics, manifest = run.spec, run.metrics, run.manifest
    found = {
        "run": str(run.path),
        "method": Path(spec.method["name"]).stem,
        "data": Path(spec.data).stem if Path(spec.data).is_absolute() else spec.data,
        "clients": spec.clients,
        "seed": spec.seed,
        "rounds": f"{metrics[-1]['round'] if metrics else 0} of {spec.rounds}",
        "status": str(manifest.get("status", "unknown")),
        "started": str(manifest.get("started", "")),
        "measure": None,
        "value": None,
    }
    if any(map(evaluated, metrics)):
        main, row = main_of(metrics), run.selected
        columns = (f"global_test_{main.name}", f"personal_test_{main.name}")
        named = next((name for name in columns if row.get(name) is not None), None)
        found |= {"measure": named, "value": named and row[named]}
    return found


def html(outlined: Mapping[str, Any]) -> str:
    """An outline as a small table of HTML."""
    told = {name: value for name, value in outlined.items() if value is not None and name not in ("measure", "value")}
    if outlined["value"] is not None:
        told[outlined["measure"].replace("_", " ")] = f"{outlined['value']:.4f}"
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in told.items()
    )
    return f"<table>{rows}</table>"


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows as a DataFrame; raises UsageError where pandas is not installed."""
    try:
        import pandas as pd
    except ImportError:
        raise UsageError("frame() makes a DataFrame of pandas, which is not installed: pip install pandas") from None
    return pd.DataFrame(list(rows))


class Outlined:
    """How a run shows itself."""

    def frame(self: Shown) -> Any:
        """The metrics as a DataFrame, a row a round; UsageError where pandas is not installed."""
        return frame(self.metrics)

    def _repr_html_(self: Shown) -> str:
        return html(outline(self))


def folders(root: str | Path) -> Iterator[Path]:
    """The folders of runs in a folder, itself and those of comparisons included, by name; links are not followed."""
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"no folder {root} to look for runs in")
    if (root / "spec.yaml").is_file() and (root / "manifest.json").is_file():
        yield root
        return
    for inner in sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink()):
        if not inner.name.startswith("."):
            yield from folders(inner)


def damaged_outline(path: Path, error: RunError | UsageError) -> dict[str, Any]:
    """What is said in a list of a run that cannot be read."""
    return {"run": str(path), "status": "damaged", "error": str(error)}
