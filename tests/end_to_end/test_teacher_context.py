"""What only the teacher sees (`data.teacher_context`) changes what the student learns, and nothing that it reads."""

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distill_cli.config.schema import Config
from distill_cli.data.sources.arithmetic import worked_solution
from distill_cli.folders.run_dir import RunDir
from distill_cli.models.model_files import ASSETS
from distill_cli.rollout.score_files import read_scores, read_sequences
from tests.end_to_end.conftest import SHORT, Finished, distill
from tests.end_to_end.naive import check_numbers


@pytest.mark.slow
@pytest.mark.exhaustive
def test_context_changes_scores_not_prompts(one_rank: Finished, tmp_path: Path) -> None:
    off = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "eval.record_samples=0", "tracker=none")
    context = ("data.teacher_context=solution", "rollout.save_scores=true", "train.max_steps=2")
    done = distill(tmp_path, *SHORT[1:], *off, *context)
    assert done.status == 0, done.stdout + done.stderr
    first, plain = (first_step(of.run) for of in (done, one_rank))
    for place in range(8):  # as the same student, on the same seeds, answers the same prompts
        assert first[0][place].token_ids == plain[0][place].token_ids
        assert not first[1][place].topk_logp.equal(plain[1][place].topk_logp)
    assert done.metrics[1]["train/loss"] != pytest.approx(one_rank.metrics[1]["train/loss"], rel=1e-3)
    check_numbers(done, steps=2, read_by_teacher=with_solution)


def with_solution(prompt: list[int]) -> list[int]:
    """The teacher's prompt where this is the student's."""
    tokenizer, config = AutoTokenizer.from_pretrained(ASSETS / "tiny_pair/student"), Config()
    (question,) = re.findall(r"What is .*\?", tokenizer.decode(prompt))
    asked = config.data.teacher_prompt_template.format(question=question, context=worked_solution(question))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text, add_special_tokens=False)


def first_step(run: RunDir) -> tuple[dict, dict]:
    file = run.scores / "step_1/rank_0.safetensors"
    return read_sequences(file), read_scores(file, set(range(8)), topk=64)
