"""axe finds nothing on any page; no test installs it: `npm pack axe-core`, unpack, and AXE=.../axe.min.js."""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

import fedloom
from fedloom.report import write
from fedloom.runs.record import Run
from fedloom.tasks.toy import Toy

AXE = Path(os.environ.get("AXE", Path(__file__).parent.parent / "node_modules/axe-core/axe.min.js"))
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
RUN = """axe.run(document).then(found => {
  const told = document.createElement("pre");
  told.id = "found";
  told.textContent = JSON.stringify(found.violations.map(one => [one.id, one.nodes.map(node => node.html)]));
  document.body.replaceChildren(told);
})"""

pytestmark = pytest.mark.skipif(not (AXE.is_file() and CHROMIUM), reason="needs chromium, and axe-core in AXE")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    fedloom.run("fedavg", problem="stream:2,rounds=1", clients=4, rounds=2, measures="auc", attack="sign_flip:0.3",
                aggregate="median", out=folder / "run")  # fmt: skip
    manifest = json.loads((folder / "run/manifest.json").read_text())  # as if its clients had been elsewhere
    manifest["network"] = [{"name": name, "number": k, "up": 5000, "down": 7000} for k, name in enumerate("abcd")]
    (folder / "run/manifest.json").write_text(json.dumps(manifest))
    write(Run(folder / "run"))
    fedloom.sweep("fedprox", Toy(), over={"mu": [0.1, 1.0], "lr": [0.1, 0.2]}, seeds=2, rounds=1, out=folder / "sweep")
    fedloom.compare(["fedavg", "local"], Toy(), seeds=1, rounds=1, out=folder / "compare")
    return folder


@pytest.mark.parametrize("kind", ["run", "sweep", "compare"])
def test_axe_finds_nothing(pages, kind, tmp_path):
    page = (pages / kind / "report.html").read_text()
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)  # which lets no script run
    scripts = f"<script>{AXE.read_text()}</script><script>{RUN}</script></body>"
    (tmp_path / "page.html").write_text(page.replace("</body>", scripts))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--dump-dom")
    done = subprocess.run([CHROMIUM, *flags, (tmp_path / "page.html").as_uri()], capture_output=True, text=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-500:]
    assert json.loads(unescape(found[1])) == []
