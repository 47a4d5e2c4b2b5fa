"""Passwords and tokens are refused before anything is written, and no message repeats them."""

import pytest

from distill_cli.config.checks import config_problems
from distill_cli.config.compose import compose


@pytest.mark.parametrize(
    "override",
    [
        "+cluster.env.HF_TOKEN=hush-hush",
        "+cluster.env.AWS_SECRET_ACCESS_KEY=hush-hush",
        "+cluster.env.STORE=https://me:hush-hush@host/x",
        "+data.train.token=hush-hush",
        "+cluster.slurm.extra.comment=hf_hushhushhushhushhush",
        '+cluster.slurm.setup=["export A=hf_hushhushhushhushhush"]',
    ],
)
def test_secret_is_refused_and_not_repeated(override: str) -> None:
    (job,) = compose([override])
    (problem,) = config_problems(job.config)
    assert problem.startswith(override.lstrip("+").partition("=")[0])
    assert "hush" not in problem


def test_similar_names_are_no_secrets() -> None:
    (job,) = compose(
        ["rollout.stop_token_ids=[3]", "+cluster.env.TOKENIZERS_PARALLELISM=false", "+cluster.env.A=b:c@d"]
    )
    assert config_problems(job.config) == []
