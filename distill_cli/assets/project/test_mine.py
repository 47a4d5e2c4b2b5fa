"""What should hold of the reward, the divergence and the config."""

import torch
from distill_cli.config.checks import config_problems
from distill_cli.config.compose import compose
from distill_cli.data.registry import load_examples
from mine.divergence import hellinger
from mine.reward import verify


def test_reward() -> None:
    assert verify("40 + 2 = 42\n#### 42", "42") == 1.0
    assert verify("#### 41", "42") == 0.1
    assert verify("I do not know", "42") == 0.0


def test_divergence_is_zero_at_equality_alone() -> None:
    logp, logq = torch.randn(2, 5, 8).log_softmax(-1)
    assert torch.equal(hellinger(logp, logp).sum(-1), torch.zeros(5))
    assert (hellinger(logp, logq).sum(-1) > 0).all()


def test_config_composes() -> None:
    (job,) = compose(["experiment=mine"], ["--config-dir", "conf"])
    assert config_problems(job.config) == []
    rows = list(load_examples(job.config.data.train, key="data.train"))
    assert len(rows) >= job.config.rollout.prompts_per_step
