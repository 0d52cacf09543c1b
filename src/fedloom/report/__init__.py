"""A run's report: `curves.png` and the self-contained page `report.html`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedloom.runs.record import Run


def write(run: Run) -> Path:
    """Writes `curves.png` and `report.html` into the run's folder, whatever its status, and returns the page's path."""
    from fedloom.report import curves, page
    from fedloom.report.style import save
    from fedloom.runs.reading import understood

    with understood(run.path):
        run.write("curves.png", lambda file: save(curves.figure(run), file, format="png", dpi=160), durable=False)
        html = page.render(run)
    run.write("report.html", lambda file: file.write(html.encode()), durable=False)
    return run.path / "report.html"
