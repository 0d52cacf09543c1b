"""What a user gets who installs the package: what it exports, and the wheel in an environment without this tree."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

import fedloom

ROOT = Path(__file__).parents[1]
PUBLIC = """
    Batch ByGroup Classification Client CodecError Cohort Data Each Layout Mean Method Once Packed Replies Reply
    Results Run RunError Seed Server Sparse Spec Task UsageError Vector World __version__ client compare find_runs
    load problem resume rounds run sweep
"""


def test_the_public_names_are_these():
    assert fedloom.__all__ == sorted(PUBLIC.split())
    for name in fedloom.__all__:
        assert getattr(fedloom, name) is not None
    assert dir(fedloom) and not set(fedloom.__all__) - set(dir(fedloom))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'fedloom' has no attribute 'federate'"):
        fedloom.federate  # noqa: B018


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == fedloom.__version__ and cited["license"] == "Apache-2.0"


def test_the_wheel_works_where_this_tree_is_not(tmp_path):
    there = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

    def done(*command):
        ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=there, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    done(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("fedloom-*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    place = Path(done(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    done(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, wheel)
    # The requirements are those of this environment, whose own editable fedloom a path in a .pth does not bring.
    (place / "requirements.pth").write_text(sysconfig.get_path("purelib"))
    found = done(python, "-c", "import fedloom; print(fedloom.__file__)").strip()
    assert Path(found).is_relative_to(tmp_path)
    done(python, "-m", "fedloom", "run", "fedavg", "--rounds", "1", "--clients", "3", "--out", tmp_path / "run")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert "scaffold" in done(python, "-m", "fedloom", "methods")
