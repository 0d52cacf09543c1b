"""A run in a few words, for a table of runs, a notebook, a list of folders; and the folders in which runs lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.errors import RunError, UsageError, unknown
from fedloom.quality import evaluated, main_of
from fedloom.runs.confusion import kept
from fedloom.runs.frame import frame
from fedloom.runs.shown import Shown

if TYPE_CHECKING:
    from fedloom.report.picture import Picture


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


class Outlined:
    """How a run shows itself."""

    def frame(self: Shown, of: str = "rounds") -> Any:
        """What was measured as a DataFrame: a row for each of `rounds` (the metrics), `clients` or `classes`.

        `clients` has the tests of each client in each evaluated round, `classes` recall, precision, F1 and support of
        each class, of the global model (of those of clients together where there is none) in the round that validation
        chose. UsageError where pandas is not installed.
        """
        if of not in FRAMES:
            raise unknown("table of a run", of, FRAMES)
        return frame(FRAMES[of](self))

    def plot(self: Shown, name: str | None = None) -> Picture:
        """A picture of the run, which shows itself in a notebook; `plot("loss").save("loss.pdf")` writes it to a file.

        They are those of the report's page, and `name` is one of `pictures`; without a name it is the first.

        Examples:
            >>> run = fedloom.run("fedavg", rounds=2, clients=4)
            >>> run.plot("loss")
            Picture('Loss')
        """
        from fedloom.report.pictures import picture

        return picture(self, name)

    @property
    def pictures(self: Shown) -> dict[str, Picture]:
        """The pictures of the report's page, by name."""
        from fedloom.report.pictures import pictures

        return pictures(self)

    def _repr_html_(self: Shown) -> str:
        return html(outline(self))


def by_client(run: Shown) -> list[dict[str, Any]]:
    """The tests of clients, a row for each client and evaluated round."""
    rows = []
    for line in run.lines("clients.jsonl"):
        names = [name for name in line if name not in ("round", "id")]
        rows += [
            {"round": line["round"], "client": client} | {name: line[name][place] for name in names}
            for place, client in enumerate(line.get("id", ()))
        ]
    return rows


def by_class(run: Shown) -> list[dict[str, Any]]:
    """Recall, precision, F1 and support of each class; raises UsageError for a run that has none."""
    found = kept(run, "global") or kept(run, "personal")
    if found is None:
        raise UsageError(f"{run.path} keeps no measures class by class: it has not ended, or its problem no classes")
    return found.per_class()


FRAMES: dict[str, Callable[[Shown], Sequence[Mapping[str, Any]]]] = {
    "rounds": lambda run: run.metrics,
    "clients": by_client,
    "classes": by_class,
}


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
