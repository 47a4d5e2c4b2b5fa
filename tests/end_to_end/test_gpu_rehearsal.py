"""All that scripts/gpu_acceptance.py does on a GPU, on the CPU with tiny shapes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "gpu_acceptance.py"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_stage_can_be_rehearsed(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["stages"]
    states = {name: (stage["state"], stage.get("error")) for name, stage in found.items()}
    assert done.returncode == 0, (states, done.stdout, done.stderr)
    assert states == dict.fromkeys("abcdefghi", ("passed", ""))
    assert all(stage["figures"] for stage in found.values())
