"""A client while it works: that it is heard, and what it leaves on its disk."""

import pytest
from federation import Federation, spec_of

from fedloom.deploy import journal

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

SLOW = """
import time
from dataclasses import dataclass

import fedloom


@dataclass(frozen=True)
class Slow(fedloom.Method):
    lr: float = 0.1
    seconds: float = 0.0

    def round(self, server, cohort):
        server.model = server.model + cohort.mean(self.local, model=server.model).delta

    @fedloom.client
    def local(self, client, model):
        time.sleep(self.seconds * client.id)
        w, _ = client.descend(model, lr=self.lr)
        return {"delta": w - model}
"""


def test_work_that_takes_longer_than_a_lease_is_waited_for(certificates, tmp_path):
    file = tmp_path / "slow.py"
    file.write_text(SLOW)
    federation = Federation(tmp_path, certificates, 2, f'share = true\n[methods]\nslow = "{file}"', lease=1)
    made = federation.run(spec_of({"name": str(file), "seconds": 3.5}, rounds=1))
    heard = [line["heard"] for line in journal.read(made.record.path) if "heard" in line]
    assert all(one == [0, 1] for one in heard)
    assert "gave no sign of life" not in "".join(federation.log(name) for name in federation.names)


def test_what_a_client_has_on_its_disk_does_not_grow_with_the_rounds(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, 2)
    federation.run(spec_of("scaffold", rounds=12))
    for name in federation.names:
        [run] = [path for path in (tmp_path / f"state-{name}").iterdir() if path.is_dir()]
        left = {folder: len([*(run / folder).iterdir()]) for folder in ("parts", "answers", "states")}
        assert left == {"parts": 0, "answers": 0, "states": 1}
        assert len((run / "index.jsonl").read_text().split()) <= 2 * 2
        assert (run.parent / "session.json").stat().st_mode & 0o777 == 0o600
