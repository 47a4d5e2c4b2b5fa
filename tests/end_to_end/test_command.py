"""The command line itself: what answers without starting anything."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import distill, refused


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["loss.topkk=3", "+loss.zz=1"], ["loss.topkk: unknown key; did you mean loss.topk?", "loss.zz: unknown key"]),
        (["train.lr=abc", "loss=mixd"], ["could not be converted to Float", "did you mean mixed?"]),
        (["loss.kl_weight=1.5", "loss.topk=513"], ["must lie in 0..1", "at most the vocabulary of 512"]),
        (["model.student.path=/nowhere"], ["no such folder"]),
        (["data=jsonl", "data.train.path=none.jsonl", "data.validation.path=none.jsonl"], ["cannot be read"]),
        (["trian"], ["no such verb; did you mean train?"]),
        (["ls", "los"], ["did you mean loss?"]),
        (["plan", "cluster.gpus_per_node=99"], ["visible GPUs"]),
        (["rollout.max_new_tokens=128"], ["rollout.max_sequence_length=128"]),
    ],
)
def test_wrong_input_is_status_2(
    tmp_path: Path, argv: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    printed = "\n".join(refused(tmp_path, monkeypatch, capsys, *argv))
    for words in expected:
        assert words in printed
    assert list(tmp_path.iterdir()) == []


def test_every_mistake_has_a_line(tmp_path: Path) -> None:
    done = distill(tmp_path, "loss.topkk=3", "+loss.zz=1")
    assert (done.status, done.stdout) == (2, "")
    assert [line.partition(";")[0] for line in done.stderr.splitlines()] == [
        "error: loss.topkk: unknown key",
        "error: loss.zz: unknown key",
    ]


GOOD = ("data.train.path=good.jsonl", "data.validation.path=good.jsonl")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["data=jsonl"], "data.validation.path: a value is needed; give held-out rows"),
        (["data=jsonl", GOOD[0], "data.validation.path=none.jsonl"], "data.validation.path=none.jsonl: cannot be read"),
        (["data=jsonl", *GOOD, "data.train.question_key=problem"], "no column 'problem'; this row has: 'question'"),
        (
            ["data=jsonl", *GOOD, "data.train.qestion_key=q"],
            "data.train.qestion_key: unknown key; did you mean",
        ),
        (["data=table", *GOOD, "data.train.limit=0"], "data.train.limit=0: must be at least 1"),
        (["data=table", *GOOD, "data.train.limit=many"], "data.train.limit='many': must be int | None"),
        (["data=jsonl", "data.train.path=empty.jsonl", GOOD[1]], "data.train.path=empty.jsonl: the file has no rows"),
        (
            ["data=table", "data.train.path=empty.csv", GOOD[1]],
            "path=empty.csv, split=train: no rows",
        ),
        (["data=jsonl", *GOOD], "rollout.prompts_per_step=64: the training data has only 3 rows"),
        (["data.verifier=maths"], "data.verifier=maths: no such name; did you mean math?"),
        (["eval.repeat=0"], "eval.repeat=0: must be at least 1"),
        (["loss.topk=0"], "loss.topk=0: must be at least 1"),
        (
            ["data=mix", "data.train.weights={deepscaler: 0, gsm8k: 0}"],
            "data.train.weights.deepscaler=0: must be a number",
        ),
        (["model.chat_template=none.jinja"], "model.chat_template=none.jinja: no such file, and no template either"),
    ],
)
def test_wrong_data_is_status_2(
    tmp_path: Path, argv: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "good.jsonl").write_text('{"question": "What is 1 + 1?", "answer": "2"}\n' * 3)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.csv").write_text("question,answer\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert expected in "\n".join(refused(tmp_path, monkeypatch, capsys, *argv))


def test_existing_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    done = distill(tmp_path, "run.name=mine")
    assert done.status == 2
    assert "this run folder exists already" in done.stderr


def test_plan_starts_nothing(tmp_path: Path) -> None:
    done = distill(tmp_path, "plan", "cluster.ranks_per_node=2")
    assert done.status == 0
    for words in ("mesh", "shard 1   [1]", "64 prompts x 1 answers = 64", "GiB each, every", "memory of a rank"):
        assert words in done.stdout
    for words in ("launch", "distill_cli.launch.local"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.exhaustive
def test_plan_measures_and_leaves_nothing(tmp_path: Path) -> None:
    small = ("rollout.prompts_per_step=8", "train.global_batch_size=4", "eval.max_samples=16", "eval.record_samples=2")
    done = distill(tmp_path, "plan", "--measure", *small)
    assert done.status == 0, done.stderr
    lines = done.stdout.split("seconds, measured here")[1].splitlines()
    rows = {line[:20].strip(): line[20:].strip() for line in lines}
    seconds = {name: float(row.split(",")[0]) for name, row in rows.items() if re.match(r"\d+\.\d+($|,)", row)}
    assert all(seconds[stage] > 0 for stage in ("sync", "sample", "score", "pack", "train"))
    parts = [seconds.get(stage, 0) for stage in ("wake", "sync", "sample", "score", "pack", "train", "other")]
    assert seconds["a step"] == pytest.approx(sum(parts), abs=0.01)
    assert seconds["start"] > 1
    assert seconds["a validation"] > 0
    assert "a checkpoint" in rows
    assert "1,024 steps" in rows["an epoch"]  # 8,192 rows, 8 a step
    assert list(tmp_path.iterdir()) == []


def test_help_ls_and_cfg(tmp_path: Path) -> None:
    assert "\n  plan " in distill(tmp_path, "--help").stdout
    assert "loss=reverse" in distill(tmp_path, "ls", "loss").stdout
    assert "kl_type: reverse" in distill(tmp_path, "loss=reverse", "--cfg", "job").stdout


def test_doctor_names_fixes(tmp_path: Path) -> None:
    """Two processes meet over gloo; neither the hub nor the tracking server answers, which stops no run."""
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "MLFLOW_TRACKING_URI": "http://me:pa55@127.0.0.1:9"}
    doctor = distill(tmp_path, "doctor", "--json", HF_HUB_OFFLINE="0", **away)
    assert doctor.status == 0, doctor.stdout
    assert "pa55" not in doctor.stdout + doctor.stderr
    findings = {finding["name"]: finding for finding in json.loads(doctor.stdout)}
    for name in (
        "python",
        "torch",
        "vllm",
        "gloo",
        "disk",
        "shared memory",
        "ports",
        "hub cache",
        "mlflow",
        "wandb",
        "tensorboard",
        "tiny pair",
    ):
        assert findings[name]["ok"], findings[name]
    for name in ("hub", "mlflow server"):
        assert not findings[name]["ok"]
        assert "does not answer" in findings[name]["detail"]
        assert findings[name]["fix"]


LOSSES = (
    *("forward", "gold", "jsd", "l1", "mixed", "no_teacher", "policy_gradient", "reverse", "reward"),
    *("sft", "skew_forward", "skew_reverse", "uld"),
)
TYPED = {
    "distill loss=": [f"loss={name}" for name in LOSSES],
    "distill plan model=ll": ["model=llama3_1b_8b"],
    "distill mod": ["model.", "model="],
    "distill pl": ["plan"],
    "distill plan --me": ["--measure"],
    "distill resume runs/latest train.lr": ["train.lr="],
    "distill ls lo": ["loss", "loss/token_weight"],
    "distill track ": ["sync"],
    "distill track sync runs/x --u": ["--uri"],
    "distill eval --step ": ["best", "last"],
    "distill replay runs/s/0_topk=32 --wait train.lr": ["train.lr="],
    "distill watch ru": [],
}
"""What Tab offers at the end of each line."""


def test_tab_in_bash(tmp_path: Path) -> None:
    """Through the function that `distill -sc install=bash` defines, called as bash calls it."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "distill").write_text(f'#!/bin/sh\nexec {sys.executable} -m distill_cli "$@"\n')
    (bin_dir / "distill").chmod(0o755)
    script = """
        eval "$(distill -sc install=bash)"
        complete -p distill | grep -q -- "-F hydra_bash_completion" || exit 1
        while IFS= read -r COMP_LINE; do
            COMP_POINT=${#COMP_LINE}; read -ra COMP_WORDS <<< "$COMP_LINE"
            [[ $COMP_LINE != *" " ]] || COMP_WORDS+=("")
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
            hydra_bash_completion
            echo "${COMPREPLY[*]}"
        done
    """
    done = subprocess.run(
        ["bash", "--norc", "--noprofile", "-c", script],
        input="".join(f"{line}\n" for line in TYPED),
        env={**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split() for line in done.stdout.splitlines()] == list(TYPED.values())
