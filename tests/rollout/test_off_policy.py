"""Sequences of a step that the dataset or the teacher wrote."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distill_cli.config.checks import config_problems
from distill_cli.config.compose import compose
from distill_cli.config.schema import OffPolicy
from distill_cli.config.variation import override
from distill_cli.data.row_check import check_data
from distill_cli.errors import ConfigError
from distill_cli.models.model_files import ASSETS
from distill_cli.rollout.off_policy import dataset_sample, off_policy_places, response_encoder
from distill_cli.train.step_metrics import rollout_metrics
from distill_cli.types import Example, Prompt, Rollout, Sample


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_share_is_exact_over_steps(fraction: float) -> None:
    places = [off_policy_places(7, on_policy_fraction=fraction, seed=1, step=step) for step in range(1, 41)]
    assert sum(map(len, places)) == pytest.approx(40 * 7 * (1 - fraction), abs=1)
    assert all(abs(len(one) - 7 * (1 - fraction)) < 1 for one in places)
    assert all(one == sorted(set(one) & set(range(7))) for one in places)


def test_places_differ_by_step_only() -> None:
    draws = [off_policy_places(64, on_policy_fraction=0.5, seed=1, step=step) for step in (1, 2, 1)]
    assert draws[0] == draws[2] != draws[1]


def test_dataset_answer_is_ended_and_cut() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_pair" / "student")
    encode = response_encoder(tokenizer, template_kwargs={})
    prompt = Prompt(3, [5, 6], Example("?", "7", response="#### 7"))
    whole = dataset_sample(prompt, encode=encode, max_new_tokens=20)
    assert tokenizer.decode(whole.token_ids) == "#### 7" + tokenizer.eos_token
    assert (whole.finish_reason, whole.source) == ("stop", "dataset")
    assert whole.logp is None
    cut = dataset_sample(prompt, encode=encode, max_new_tokens=2)
    assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:2], "length")
    with pytest.raises(ConfigError, match="row 3 "):
        dataset_sample(Prompt(3, [5], Example("?", "7")), encode=encode, max_new_tokens=2)


def test_metrics_cover_the_student_only() -> None:
    prompt = Prompt(0, [5], Example("?", "7"))
    own = Rollout(prompt, Sample([1, 2], [-1.0, -1.0], "stop"), reward=1.0)
    other = Rollout(prompt, Sample([1] * 9, None, "length", source="teacher"))
    metrics = rollout_metrics([own, other])
    assert metrics == {
        "rollout/mean_length": 2,
        "rollout/truncated_rate": 0,
        "rollout/on_policy_fraction": 0.5,
        "rollout/accuracy": 1.0,
    }
    assert rollout_metrics([other])["rollout/mean_length"] == 9
    assert "rollout/accuracy" not in rollout_metrics([other])


def test_impossible_mixtures_are_refused(tmp_path: Path) -> None:
    (job,) = compose(["rollout.on_policy_fraction=1.5"])
    assert any("rollout.on_policy_fraction=1.5" in line for line in config_problems(job.config))
    (job,) = compose(["rollout.on_policy_fraction=0.5", "rollout.environment=guess"])
    assert any("rollout.on_policy_fraction=0.5" in line for line in config_problems(job.config))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"question": "1 + 1?", "answer": "2", "worked": "2"}\n' * 4
        + '{"question": "2?", "answer": "2", "worked": null}\n'
    )
    paths = [f"data.train.path={rows}", f"data.validation.path={rows}"]
    (job,) = compose(["data=jsonl", *paths, "rollout.on_policy_fraction=0"])
    config = override(job.config, {"data.verifier": None})
    with pytest.raises(ConfigError, match="data.train: 5 of 5 rows"):
        check_data(config)
    config = override(config, {"data.train": {**config.data.train, "response_key": "worked"}})
    with pytest.raises(ConfigError, match="data.train: 1 of 5 rows"):
        check_data(config)
    check_data(override(config, {"rollout.off_policy": OffPolicy.teacher}))
