"""`fedloom predict` and `fedloom export`: what a run has trained, put to use."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedloom.cli import output
from fedloom.errors import UsageError

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Of = Annotated[int | None, typer.Option(metavar="K", help="Take the model that client K would use.")]
Which = Annotated[str, typer.Option(help="Round of the model: chosen (by validation) or last.")]


def predict(
    path: RunFolder,
    rows: Annotated[str, typer.Argument(metavar="FILE", help="Raw rows: a .csv, .parquet or .npz file, or images.")],
    out: Annotated[
        Path | None, typer.Option(help="New .csv file for the predictions (default: print them), or folder for masks.")
    ] = None,
    client: Of = None,
    which: Which = "chosen",
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Add a column for each class.")] = False,
    as_json: output.Json = False,
) -> None:
    """Predict on raw rows with the model that a run has trained."""
    from fedloom.runs.record import Run
    from fedloom.runs.trained import Trained

    if out is not None and out.exists():
        raise UsageError(f"{out} exists; choose another --out")
    own = (path / "model" / "model.json").is_file()  # a client between machines has no more of a run than its model
    trained = Trained(path if own else Run(path).path)
    found, told = trained.predict(Path(rows), client, which)
    chances = trained.predict(Path(rows), client, which, True)[0] if probabilities else []
    for line in told:
        typer.echo(f"fedloom: {line}", err=True)
    if found and hasattr(found[0], "shape"):
        _masks(Path(rows), found, chances, out, as_json)
    elif as_json:
        output.tell_json({"predictions": found} | ({"probabilities": chances} if probabilities else {}))
    elif out is None:
        typer.echo(table_of(found, chances), nl=False)
    else:
        try:
            out.write_text(table_of(found, chances), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {out}: {error.strerror}; choose another --out") from error
        typer.echo(out)


def _masks(rows: Path, found: list[Any], chances: list[Any], out: Path | None, as_json: bool) -> None:
    """Masks as .png files, of the names of their images or else of their rows' numbers, or as lists."""
    from PIL import Image

    from fedloom.data.load import image_files

    if chances:
        raise UsageError("probabilities of every pixel are no table; take run.predict(x, probabilities=True) in Python")
    if as_json:
        output.tell_json({"predictions": [mask.tolist() for mask in found]})
        return
    if out is None:
        raise UsageError("what is predicted are masks; give a new folder for them: --out FOLDER")
    above = rows if rows.is_dir() else rows.parent
    files = [str(file.relative_to(above).with_suffix("")) for file in image_files(rows)]
    names = files or [*map(str, range(len(found)))]
    if len({*names}) < len(names):
        raise UsageError(f"two images of {rows} have one name but for their endings; rename one")
    try:
        for name, mask in zip(names, found, strict=True):
            file = out / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(file)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    typer.echo(out)


def table_of(found: Sequence[Any], chances: Sequence[dict[str, float] | None]) -> str:
    """A line a row, from 0: its number, what is predicted (labels joined by +), and the probability of each class.

    A row of which nothing is predicted has no line.
    """
    from fedloom.report.exports import harmless

    file, names = io.StringIO(), [*next(filter(None, chances), ())]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "prediction", *(harmless(f"probability {name}") for name in names)])
    for row, one in enumerate(found):
        if one is None:
            continue
        said = "+".join(one) if isinstance(one, list) else one
        writer.writerow([row, harmless(said), *((chances[row] or {})[name] for name in names)])
    return file.getvalue()


def export(
    path: RunFolder,
    to: Annotated[str, typer.Option(help="Form: torchscript, torch-export, onnx or peft (a folder).")],
    out: Annotated[Path | None, typer.Option(help="New file or folder (default: in RUN/model, by its round).")] = None,
    client: Of = None,
    which: Which = "chosen",
) -> None:
    """Write a run's model for programs that know neither this library nor the network's class."""
    from fedloom.runs.record import Run

    typer.echo(Run(path).export(to, out, client, which=which))
