"""The notebooks of `examples/`: carried out, and written as pages with what came out.

In the repository they have no outputs, so that none can be out of date: a build carries them out.
"""

import os
import re
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CELL_SECONDS = 300  # after which a cell counts as stuck
PICTURES = {"image/svg+xml": "svg", "image/png": "png"}


def names() -> list[str]:
    """The notebooks, in the order in which they are meant to be read."""
    return ["first_steps", "own_data_and_network", "write_a_method"]


def executed(name: str, folder: Path) -> Any:
    """A notebook with its outputs, carried out in a folder; raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": str(folder)}})
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # `!fedloom` is this one's
    return client.execute(env=os.environ | {"PATH": path})


def page(name: str, notebook: Any) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by the names of their files."""
    parts, pictures = [], dict[str, bytes]()
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(linked(cell.source))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for text, picture in (shown(output) for output in joined(cell.outputs)):
            if picture:
                kind, data = picture
                file = f"{name}-{number}.{kind}"
                pictures[file] = data
                text = f"![what the cell above draws]({file})"
            parts.append(text)
    return "\n\n".join(part for part in parts if part), pictures


def linked(text: str) -> str:
    """Links between notebooks, and from them to pages, as links between pages."""
    return re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", text).replace("](../docs/", "](../")


def joined(outputs: list[Any]) -> list[Any]:
    """Outputs in which what was printed in pieces is whole."""
    whole: list[Any] = []
    for output in outputs:
        if whole and output.output_type == whole[-1].output_type == "stream" and output.name == whole[-1].name:
            whole[-1] = nbformat.from_dict(whole[-1] | {"text": whole[-1].text + output.text})
        else:
            whole.append(output)
    return whole


def shown(output: Any) -> tuple[str, tuple[str, bytes] | None]:
    """What one output is in a page: Markdown, or the kind and the bytes of a picture."""
    if output.output_type == "stream":
        return fenced(output.text), None
    data = output.data
    for mime, kind in PICTURES.items():
        if mime in data:
            return "", (kind, data[mime].encode() if kind == "svg" else b64decode(data[mime]))
    if "text/html" in data:
        table = re.sub(r"<style.*?</style>|\n\s*", "", data["text/html"], flags=re.DOTALL)
        table = table.replace(' border="1" class="dataframe"', "")
        return f'<div class="output">{table}</div>', None
    return fenced(data["text/plain"]), None


def fenced(text: str) -> str:
    """What was printed, as it stands."""
    return f"``` {{.text .output}}\n{text.rstrip()}\n```" if text.strip() else ""
