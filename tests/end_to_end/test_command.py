"""The command line itself: what answers without starting anything."""

from pathlib import Path

import pytest

from tests.end_to_end.conftest import distill


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["loss.topkk=3", "+loss.zz=1"], ["loss.topkk: unknown key; did you mean loss.topk?", "loss.zz: unknown key"]),
        (["train.lr=abc", "loss=mixd"], ["could not be converted to Float", "did you mean mixed?"]),
        (["loss.kl_weight=1.5", "loss.topk=513"], ["must lie in 0..1", "at most the vocabulary of 512"]),
        (["model.student.path=/nowhere"], ["no such folder"]),
        (["data=jsonl", "data.train.path=none.jsonl", "data.validation.path=none.jsonl"], ["cannot be read"]),
        (["trian"], ["no such verb; did you mean train?"]),
        (["ls", "los"], ["did you mean loss?"]),
        (["plan", "cluster.gpus_per_node=99"], ["visible GPUs"]),
        (["rollout.max_new_tokens=128"], ["leaves 0 of rollout.max_sequence_length=128"]),
    ],
)
def test_wrong_input_is_status_2_and_one_line_each(tmp_path: Path, argv: list[str], said: list[str]) -> None:
    done = distill(tmp_path, *argv)
    assert done.status == 2
    assert done.stdout == ""
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())
    for words in said:
        assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    done = distill(tmp_path, "run.name=mine")
    assert done.status == 2
    assert "this run folder exists already" in done.stderr


def test_plan_says_what_would_run_and_starts_nothing(tmp_path: Path) -> None:
    done = distill(tmp_path, "plan", "cluster.ranks_per_node=2")
    assert done.status == 0
    for words in ("mesh", "64 prompts x 1 answers = 64", "memory of a rank", "torch.distributed.run"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_ls_doctor_and_cfg(tmp_path: Path) -> None:
    assert "distill plan" in distill(tmp_path, "--help").stdout
    assert "loss=reverse" in distill(tmp_path, "ls", "loss").stdout
    assert "kl_type: reverse" in distill(tmp_path, "loss=reverse", "--cfg", "job").stdout
    doctor = distill(tmp_path, "doctor", "--json")
    assert doctor.status == 0, doctor.stdout
    assert '"torch"' in doctor.stdout


def test_completion_knows_verbs_and_groups(tmp_path: Path) -> None:
    line = "distill train loss="
    done = distill(tmp_path, "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert "loss=reverse" in done.stdout.split()
