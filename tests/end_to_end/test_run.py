"""`distill` as a user types it: real ranks, real engines, the embedded pair."""

import json
import re
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_cli.metrics import find
from distill_cli.track.base import STREAMS
from tests.end_to_end.conftest import SECRETS, SHORT, Finished, distill, files_with
from tests.end_to_end.naive import check_numbers
from tests.track.readers import mlflow_values, recorded_values, same, tensorboard_values, wandb_values

pytestmark = pytest.mark.slow

EVERY_STEP = {
    "step", "time", "train/loss", "train/kl_forward", "train/kl_reverse", "train/grad_norm", "train/lr",
    "train/entropy", "train/teacher_entropy", "train/teacher_topk_mass", "train/student_topk_mass",
    "train/top1_agreement", "train/response_tokens", "rollout/mean_length", "rollout/truncated_rate",
    "rollout/accuracy", "rollout/engine_mismatch", "time/sync_s", "time/sample_s", "time/score_s", "time/pack_s",
    "time/train_s", "time/step_s", "perf/tokens_per_s", "perf/peak_mem_gib", "perf/packing_efficiency",
}  # fmt: skip
PROBED = {
    *("probe/kl_forward", "probe/kl_reverse", "probe/entropy", "probe/teacher_entropy"),
    *("probe/top1_agreement", "probe/topk_overlap", "probe/teachability"),
}
VALIDATION = {"val/accuracy", "val/mean_length", "val/truncated_rate", "time/eval_s"}


def test_the_default_run_prints_its_result(one_rank: Finished) -> None:
    assert one_rank.status == 0, one_rank.stderr
    assert one_rank.stderr == ""
    for word in ("student", "teacher", "accuracy", "verdict", "time", "metrics", "next", "step 3/3 loss="):
        assert word in one_rank.stdout
    for tracker in ("MLflow", "W&B", "TensorBoard"):
        assert tracker in one_rank.stdout
    outcome = json.loads(one_rank.run.outcome.read_text())
    assert outcome["state"] == "finished"
    assert outcome["teacher"]["accuracy"] > 0.9 > outcome["before"]["accuracy"]


def test_secrets_are_not_written_or_printed(one_rank: Finished) -> None:
    """The run's folder with all its logs, and MLflow's database and artifacts, which are beside it."""
    assert files_with(SECRETS.values(), one_rank.folder) == []
    assert not any(secret in one_rank.stdout + one_rank.stderr for secret in SECRETS.values())
    assert (one_rank.folder / "runs/mlflow.db").stat().st_size > 0


def test_every_step_has_every_metric(one_rank: Finished) -> None:
    rows = one_rank.metrics
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0].keys() >= VALIDATION | {"val/teacher_accuracy"}
    for row in rows[1:]:
        assert row.keys() >= EVERY_STEP
        assert all(isinstance(value, int | float) for value in row.values())
    assert [row.keys() >= VALIDATION for row in rows] == [True, False, True, True]
    assert [row.keys() >= PROBED for row in rows] == [True, False, True, True]


@pytest.mark.exhaustive
def test_numbers_are_the_same_if_answers_are_scored_as_they_end(tmp_path: Path) -> None:
    """The teacher has a process of its own, and scores travel between the ranks. Some answers are the dataset's."""
    off = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "tracker=none", "cluster.ranks_per_node=2")
    mixed = ("rollout.prompts_per_step=64", "rollout.on_policy_fraction=0.8", "rollout.off_policy=dataset")
    late, early = (
        distill(tmp_path, *SHORT, *off, *mixed, "train.max_steps=2", f"run.name={name}", *more)
        for name, more in {"late": [], "early": ["rollout.score_while_sampling=true"]}.items()
    )
    assert (late.status, early.status) == (0, 0), early.stderr
    assert len(late.metrics) == 3
    for row, other in zip(late.metrics, early.metrics, strict=True):
        for key, value in row.items():
            if key.startswith(("train/", "rollout/")) and key != "rollout/engine_mismatch":
                assert other[key] == pytest.approx(value, rel=1e-4), key


def test_the_sampler_has_trained_weights(one_rank: Finished, two_ranks: Finished) -> None:
    for row in one_rank.metrics[1:] + two_ranks.metrics[1:]:
        assert row["rollout/engine_mismatch"] < 1e-4


def test_numbers_equal_a_naive_reference(one_rank: Finished) -> None:
    assert 0 < one_rank.metrics[1]["rollout/truncated_rate"] < 1  # cut off or not, an answer's last token counts
    check_numbers(one_rank, steps=3)


def test_two_ranks_equal_one_rank(one_rank: Finished, two_ranks: Finished) -> None:
    assert two_ranks.status == 0, two_ranks.stderr
    assert one_rank.metrics[1]["train/loss"] == pytest.approx(two_ranks.metrics[1]["train/loss"], rel=1e-5)
    for ours, theirs in zip(one_rank.metrics[1:], two_ranks.metrics[1:], strict=True):
        assert ours["train/response_tokens"] == theirs["train/response_tokens"]
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "layout",
    [
        ("mesh.tensor=2", "mesh.sequence_parallel=true", "train.activation_checkpointing=selective"),
        ("mesh.context=2", "train.packing=false"),
        ("engine.teacher.tensor_parallel=2",),
    ],
    ids=["tensor", "context", "teacher"],
)
@pytest.mark.exhaustive
def test_other_layouts_equal_one_rank(
    one_rank: Finished, two_ranks: Finished, tmp_path, layout: tuple[str, ...]
) -> None:
    without_eval = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "tracker=none")
    other = distill(tmp_path, *SHORT, *without_eval, "cluster.ranks_per_node=2", *layout)
    assert other.status == 0, other.stderr
    rows = [row for row in other.metrics if row["step"] > 0]
    for ours, theirs in zip(one_rank.metrics[1:], rows, strict=True):
        assert ours["train/response_tokens"] == theirs["train/response_tokens"]
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-4)
        assert theirs["rollout/engine_mismatch"] < 1e-4
    for step in (0, 3):
        for ours, theirs in zip(recorded(two_ranks, step), recorded(other, step), strict=True):
            assert ours["response_ids"] == theirs["response_ids"]
            for name in ("loss", "student_logp", "student_top_logp", "teacher_top_logp"):
                assert_near(theirs[name], torch.tensor(ours[name]))


def test_recorded_tokens_equal_both_models(one_rank: Finished, two_ranks: Finished) -> None:
    student, teacher = (AutoModelForCausalLM.from_pretrained(distilled_from(role)) for role in ("student", "teacher"))
    assert sorted(file.name for file in one_rank.run.rollouts.iterdir()) == [f"step_{n}.parquet" for n in (0, 2, 3)]
    assert sorted(file.name for file in two_ranks.run.rollouts.iterdir()) == [f"step_{n}.parquet" for n in (0, 3)]
    for finished in (one_rank, two_ranks):
        before, after = recorded(finished, 0), recorded(finished, 3)
        assert len(before) == finished.config.eval.record_samples
        assert [row["prompt_ids"] for row in before] == [row["prompt_ids"] for row in after]
        for row in before:
            temperature = finished.config.loss.temperature
            logits_RV = response_logits(student, row)
            logp_RV = (response_logits(teacher, row) / temperature).log_softmax(-1)
            logq_RV = (logits_RV / temperature).log_softmax(-1)
            own = torch.tensor(row["response_ids"])[:, None]
            assert_near(row["teacher_logp"], logp_RV.gather(1, own)[:, 0])
            assert_near(row["student_logp"], logits_RV.log_softmax(-1).gather(1, own)[:, 0])
            assert_near(row["teacher_top_logp"], logp_RV.topk(5).values)
            assert_near(row["student_top_logp"], logq_RV.topk(5).values)
            assert_near(row["student_top_logp"], logq_RV.gather(1, torch.tensor(row["student_top_ids"])))
            assert_near(row["teacher_top_logp"], logp_RV.gather(1, torch.tensor(row["teacher_top_ids"])))
            assert_near(row["entropy"], -(logq_RV.exp() * logq_RV).sum(-1))
            whole = (logp_RV.exp() * (logp_RV - logq_RV)).sum(-1)
            assert (torch.tensor(row["kl_forward"]) <= whole + 1e-5).all()  # on the top-16 and the rest
            assert sum(row["kl_forward"]) == pytest.approx(float(whole.sum()), rel=0.05)
            weighted = 0.3 * torch.tensor(row["kl_forward"]) + 0.7 * torch.tensor(row["kl_reverse"])
            assert_near(row["loss"], weighted)  # loss=mixed
            assert "".join(row["tokens"]).startswith(row["response"].strip()[:8])


def response_logits(model, row: dict) -> torch.Tensor:
    """The model's logits [R, V] at the positions that predict the response's tokens."""
    ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
    with torch.no_grad():
        return model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].float()


def assert_near(recorded: list, expected: torch.Tensor) -> None:
    assert torch.allclose(torch.tensor(recorded), expected, atol=2e-4)


def recorded(finished: Finished, step: int) -> list[dict]:
    return pyarrow.parquet.read_table(finished.run.rollouts / f"step_{step}.parquet").to_pylist()


def test_the_folder_has_its_documented_files(one_rank: Finished) -> None:
    run = one_rank.run
    assert re.fullmatch(r"\d{8}-\d{6}_tiny_mixed", run.path.name)
    assert (run.path / "command.txt").read_text().startswith("distill train.max_steps=3 ")
    assert json.loads((run.path / "env.json").read_text())["packages"]["torch"]
    assert one_rank.config.train.max_steps == 3
    assert run.rank_log(0).is_file()
    assert "of the gap closed" in run.report.read_text()
    assert {"weights", "sampler"} <= json.loads(run.resolved.read_text())["memory"]["parts"].keys()
    assert not [path for path in one_rank.folder.iterdir() if path.name != "runs"]


def test_the_trained_student_loads(one_rank: Finished) -> None:
    student = AutoModelForCausalLM.from_pretrained(one_rank.run.student)
    tokenizer = AutoTokenizer.from_pretrained(one_rank.run.student)
    before = AutoModelForCausalLM.from_pretrained(distilled_from("student"))
    assert tokenizer.chat_template
    assert student.config.tie_word_embeddings
    moved = [n for n, p in student.named_parameters() if not p.equal(before.get_parameter(n))]
    assert len(moved) == len(list(student.named_parameters()))


def test_every_key_is_a_declared_metric(one_rank: Finished, two_ranks: Finished) -> None:
    keys = {key for run in (one_rank, two_ranks) for row in run.metrics for key in row} - {"step", "time"}
    assert {key for key in keys if find(key) is None} == set()


def test_trackers_have_what_the_file_has(one_rank: Finished) -> None:
    run, stored = one_rank.run, recorded_values(one_rank.run, *STREAMS)
    assert mlflow_values(run) == stored
    assert wandb_values(run) == recorded_values(run, "metrics.jsonl")
    assert same(tensorboard_values(run), stored)
    client = MlflowClient(tracking_uri=f"sqlite:///{one_rank.folder}/runs/mlflow.db")
    found = client.get_run(json.loads((run.path / "mlflow.json").read_text())["run_id"])
    assert (found.data.params["loss.topk"], found.info.status) == ("16", "FINISHED")


@pytest.mark.exhaustive
def test_sweep_runs_have_own_folders(tmp_path) -> None:
    off = ("eval.period=0", "eval.max_samples=16", "train.max_steps=1", "tracker=none", "eval.teacher=false")
    done = distill(tmp_path, "-m", "loss.topk=4,8", *off)
    assert done.status == 0, done.stdout + done.stderr
    (sweep,) = tmp_path.glob("runs/*_sweep")
    assert sorted(path.name for path in sweep.iterdir()) == ["0_topk=4", "1_topk=8", "report.html", "sweep.json"]
    assert all((folder / "outcome.json").is_file() for folder in sweep.glob("*_topk=*"))
    table = done.stdout[done.stdout.index("loss.topk  step") :]
    assert all(words in table for words in ("KL forward", "tokens", "best KL reverse"))
    assert distill(tmp_path, "report", str(sweep.relative_to(tmp_path))).stdout in done.stdout


@pytest.mark.exhaustive
def test_failed_rank_prints_line_and_log(tmp_path) -> None:
    (tmp_path / "broken.py").write_text("def kl(logp, logq):\n    raise ValueError('a loss of my own')\n")
    done = distill(tmp_path, "loss.kl_type=broken:kl", "eval.at_start=false", "tracker=none")
    assert done.status == 1
    (line,) = done.stderr.splitlines()
    log = re.fullmatch(r"error: rank 0: ValueError: a loss of my own; log: (.*)", line)[1]
    assert "Traceback" in Path(log).read_text()


def distilled_from(role: str) -> str:
    from distill_cli.models.model_files import ASSETS

    return str(ASSETS / "tiny_pair" / role)


def test_ranks_find_user_mistakes_too(tmp_path) -> None:
    done = distill(tmp_path, "rollout.max_new_tokens=127", "tracker=none")
    assert done.status == 2
    assert done.stderr.startswith("error: data.train: no prompt is left: 8192 of 8192 prompts")
