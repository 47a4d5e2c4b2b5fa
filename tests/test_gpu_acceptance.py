"""scripts/gpu_acceptance.py: stages that fail, wrong commands, and the page that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from distill_cli.types import TeacherScores

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import gpu_acceptance  # noqa: E402
from gpu_stages import STAGES, docs  # noqa: E402
from gpu_stages.figures import Stage, show, target  # noqa: E402
from gpu_stages.teachers import planted_teachers, teacher_problem  # noqa: E402

RECORDS = """
import sys
from pathlib import Path
from gpu_stages.figures import Stage
stage = Stage(Path({report!r}), Path({scratch!r}), rehearse=False)
stage.record("speed", 2.0, "x", at_least=1.0)
"""
ENDINGS = {
    "a": "stage.record('too slow', 1.0, at_least=2.0)",
    "b": "print('the log', flush=True); (stage.scratch / 'check.out').write_text('output of a rank'); "
    "stage.fail('OutOfMemoryError: CUDA out of memory')",
    "c": "import time; time.sleep(60)",
    "d": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "e": "stage.record('wrong', 1.0, at_most=0.0, wrong_if_missed=True)",
}
"""Stages that miss a target, fail, hang, crash, and record a wrong number."""


def acceptance(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / "gpu_acceptance.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=900)


def run_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, minutes: float = 0.0) -> gpu_acceptance.Run:
    """Run the stages of ENDINGS with a limit of four seconds each."""

    def command(name: str, report: Path, scratch: Path, *, rehearse: bool) -> list[str]:
        code = RECORDS.format(report=str(report), scratch=str(scratch)) + ENDINGS.get(name, "")
        return [sys.executable, "-c", code]

    for name in ENDINGS:
        monkeypatch.setitem(STAGES, name, replace(STAGES[name], limit_s=4.0))
    arguments = Namespace(out=tmp_path / "out", rehearse=False, minutes=minutes, commit="abc123")
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    run = gpu_acceptance.Run(arguments, scratch, command=command)
    for name in ENDINGS:
        run.stage(name)
    return run


def test_failed_stages_do_not_stop_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = run_stages(tmp_path, monkeypatch)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["stages"]
    assert {name: stage["state"] for name, stage in found.items()} == {
        **{"a": "passed", "b": "failed", "c": "cut off", "d": "failed", "e": "failed"}
    }
    assert found["b"]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert Path(found["b"]["log"]).read_text() == "the log\n\n===== check.out\noutput of a rank\n"
    assert found["c"]["error"] == "took longer than 4 s"
    assert "SIGSEGV" in found["d"]["error"]
    assert found["e"]["error"] == "wrong is 1"
    assert [len(stage["figures"]) for stage in found.values()] == [2, 1, 1, 1, 2]  # what was measured is kept
    assert run.status() == 1
    printed = capsys.readouterr().out
    assert "missed: too slow; wrong" in printed
    assert all(len(line) < 300 for line in printed.splitlines())
    assert not [child for child in psutil.Process().children() if "time.sleep(60)" in " ".join(child.cmdline())]


def test_stages_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_stages(tmp_path, monkeypatch, minutes=0.1)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["stages"]
    assert {stage["state"] for stage in found.values()} == {"left out"}
    assert run.status() == 0  # nothing was started


def test_a_later_run_adds_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stages(tmp_path, monkeypatch)
    arguments = Namespace(out=tmp_path / "out", rehearse=False, minutes=0.0, commit=None)
    scratch = tmp_path / "scratch"
    run = gpu_acceptance.Run(arguments, scratch)
    assert set(run.results["stages"]) == set(ENDINGS)
    assert run.results["stages"]["a"]["commit"] == "abc123"
    run.keep_machine({"card": "H100"})
    assert set(run.results["stages"]) == set(ENDINGS)
    run.keep_machine({})  # the machine could not be read this time
    assert run.results["machine"] == {"card": "H100"}
    run.keep_machine({"card": "H200"})  # another card's figures are dropped
    assert run.results["stages"] == {}
    arguments.rehearse = True  # so are a GPU's in a rehearsal
    assert gpu_acceptance.Run(arguments, scratch).results["stages"] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = acceptance("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: no GPU is visible")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [(("--only", "a,z"), "no stage z"), (("--minutes", "-1"), "--minutes -1"), (("--write-docs", "none.json"), "none")],
)
def test_wrong_commands_are_refused(argv: tuple[str, ...], named: str) -> None:
    done = acceptance(*argv)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_docs_have_gpu_figures_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = run_stages(tmp_path, monkeypatch)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n")
    assert docs.write_docs(run.file, page) == 2  # no GPU results
    assert "old" in page.read_text()
    results = json.loads(run.file.read_text())
    results["machine"] = {"card": "NVIDIA H100", "memory": "79 GiB", "cpus": "16", "torch": "2.11.0"}
    results["stages"]["a"]["tables"] = {"kernels": [{"kernel": "a|b", "ms": 1.5}]}
    run.file.write_text(json.dumps(results))
    assert docs.write_docs(run.file, page) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    for part in (
        "One NVIDIA H100 (79 GiB",
        "commit abc123",
        "torch 2.11.0",
        "| speed | 2 x | at least 1 | yes |",
        "| too slow | 1 | at least 2 | **no** |",
        "failed: OutOfMemoryError",
        "| a\\|b | 1.5 |",
    ):
        assert part in text
    assert docs.write_docs(run.file, page) == 0  # writing again changes nothing
    assert page.read_text() == text
    results["rehearsal"] = True
    run.file.write_text(json.dumps(results))
    assert docs.write_docs(run.file, page) == 2
    capsys.readouterr()


def test_rehearsals_check_only_general_targets(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "r.json", tmp_path, rehearse=True)
    stage.record("speed", 1.0, at_least=2.0)
    stage.record("right", 1.0, at_least=2.0, wrong_if_missed=True)
    speed, right = json.loads((tmp_path / "r.json").read_text())["figures"]
    assert (speed["is_met"], target(speed)) == (None, "")
    assert (right["is_met"], target(right)) == (False, "at least 2")
    assert show(12345.6) == "12,346"


def test_teachers_without_weights_are_noticed() -> None:
    generator = torch.Generator().manual_seed(0)

    def scores(shift: float) -> list[TeacherScores]:
        logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
        logp = logits.log_softmax(-1).sort(descending=True).values
        return [TeacherScores.of_topk(torch.arange(4, dtype=torch.int32).repeat(6, 1), logp, logp[:, 1] + shift)]

    first = scores(0.0)
    assert teacher_problem(first, scores(1e-3), limit=1e-2) is None
    others = [replace(first[0], sampled_logp=torch.randn(6, generator=generator))]
    problems = {
        name: teacher_problem(first, planted, limit=1e-2) for name, planted in planted_teachers(first, others).items()
    }
    assert "no weights" in problems["uniform"]
    assert "not finite" in problems["not finite"]
    assert "differ by" in problems["stale"]
