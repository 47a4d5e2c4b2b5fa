"""Names of new runs, and what is said about an experiment whose models are missing."""

from pathlib import Path

import pytest

from distill_cli.config.compose import compose
from distill_cli.errors import ConfigError
from distill_cli.jobs.new_runs import resolve_jobs, single_path


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "tiny_mixed"),
        (["experiment=quick", "loss=reverse"], "quick_reverse"),
        (["loss.kl_type=tests.losses.reference:squared"], "tiny_squared"),
    ],
)
def test_names_say_what_is_trained(overrides: list[str], name: str) -> None:
    (job,) = compose(overrides)
    assert single_path(job).name.partition("_")[2] == name


def test_missing_models_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve_jobs(compose(["experiment=smollm2", "tracker=none"]))
    assert caught.value.problems[-1].endswith("distill ls experiment=smollm2 says how")
