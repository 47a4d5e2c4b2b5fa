"""A run whose teacher is the student's running mean: its scores are those of the mean of the weights."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill_cli.models.model_files import ASSETS
from tests.end_to_end.conftest import SHORT, Finished, distill
from tests.end_to_end.naive import recorded, response_logits

OFF = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "eval.record_samples=0", "tracker=none")
MOVING = ("model.teacher.path=student", "model.teacher.ema=0.75", "train.max_grad_norm=1e6", "train.lr=1e-2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The teacher reads a template of its own: else the student would never change."""
    kept = ("rollout.save_scores=true", "checkpoint.period=1", "cluster.ranks_per_node=2")
    template = "model.teacher.chat_template='Q: {{ messages[0].content }}'"
    return distill(tmp_path_factory.mktemp("moving"), *SHORT, *OFF, *MOVING, *kept, template)


def as_question(tokenizer, prompt: list[int]) -> list[int]:
    question = tokenizer.decode(prompt).split("user\n")[1].split("<|im_end|>")[0]
    return tokenizer.encode(f"Q: {question}", add_special_tokens=False)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_scores_are_the_running_means(finished: Finished, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert finished.status == 0, finished.stdout + finished.stderr
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_pair/student")
    students = [ASSETS / "tiny_pair/student"]
    for step in (1, 2):
        folder = tmp_path / str(step)
        assert distill(finished.folder, "export", "runs/latest", str(folder), f"--step={step}").status == 0
        students.append(folder)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in students]
    mean = models[0]
    for step, student in enumerate(models, start=1):
        with torch.no_grad():
            for ours, theirs in zip(mean.parameters(), student.parameters(), strict=True):
                ours.lerp_(theirs, 0.25) if step > 1 else None
        moved = max(float((a - b).abs().max()) for a, b in zip(mean.parameters(), student.parameters(), strict=True))
        assert (moved > 1e-3) == (step > 1)  # the mean is another model than the student
        rollouts, scores = recorded(finished.run.scores / f"step_{step}")
        for rollout, found in zip(rollouts, scores, strict=True):
            with torch.no_grad():
                logits_RV = response_logits(mean, as_question(tokenizer, rollout.prompt.token_ids), rollout)
            logp_RV = (logits_RV / finished.config.loss.temperature).log_softmax(-1)
            expected = logp_RV.gather(1, found.topk_ids.long())
            torch.testing.assert_close(found.topk_logp.double(), expected, rtol=0, atol=5e-4)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_resumed_run_is_the_same(finished: Finished) -> None:
    before = finished.metrics[-1]
    done = distill(finished.folder, "resume", "runs/latest", "--step=2")
    assert done.status == 0, done.stdout + done.stderr
    after = done.metrics[-1]
    same = [name for name in before if name.startswith(("train/", "rollout/"))]
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
