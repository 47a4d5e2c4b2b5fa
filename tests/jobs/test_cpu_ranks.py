"""The number of ranks that share the cores of this machine."""

import pytest

from distill_cli.config.compose import compose
from distill_cli.jobs import cpu_ranks
from distill_cli.jobs.preflight import preflight, preflight_evaluation
from distill_cli.machine import hardware


@pytest.mark.parametrize(
    ("cores", "overrides", "expected"),
    [
        (1, [], 1),
        (2, [], 2),
        (64, [], 4),  # of 16 sequences each
        (64, ["rollout.prompts_per_step=1024", "train.global_batch_size=1024"], 64),
        (2, ["rollout.prompts_per_step=16", "train.global_batch_size=16"], 1),
        (4, ["mesh.tensor=2"], 4),
        (3, ["mesh.tensor=2"], 2),
        (3, ["engine.teacher.tensor_parallel=2"], 2),
        (2, ["cluster.parallel_jobs=2"], 1),
        (8, ["cluster.parallel_jobs=2"], 4),
        (8, ["cluster.ranks_per_node=1"], 1),
    ],
)
def test_ranks_follow_from_cores_and_batch(
    cores: int, overrides: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cores", lambda: cores)
    monkeypatch.setattr(hardware, "host_memory", lambda: 256 << 30)
    resolved = preflight(compose(overrides)[0].config)
    assert resolved.ranks.per_node == resolved.config.cluster.ranks_per_node == expected


def test_large_models_have_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cores", lambda: 4)
    monkeypatch.setattr(cpu_ranks, "SMALL_PARAMS", 600_000)  # the teacher of the pair has more, the student less
    assert preflight(compose([])[0].config).ranks.per_node == 1
    monkeypatch.setattr(cpu_ranks, "SMALL_PARAMS", 700_000)
    assert preflight(compose([])[0].config).ranks.per_node == 4


def test_ranks_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cores", lambda: 4)
    monkeypatch.setattr(hardware, "host_memory", lambda: 3 << 30)
    assert preflight(compose([])[0].config).ranks.per_node == 2


@pytest.mark.parametrize(
    ("cores", "overrides", "expected"),
    [
        (2, [], 2),
        (64, [], 4),  # 256 answers
        (64, ["eval.repeat=2", "eval.temperature=1"], 8),
        (64, ["eval.max_samples=10000"], 30),  # what 32 GiB hold
        (2, ["eval.max_samples=100"], 1),
        (3, ["engine.student.tensor_parallel=2"], 2),
        (2, ["cluster.ranks_per_node=1"], 1),
    ],
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_ranks_of_an_evaluation(
    cores: int, overrides: list[str], expected: int, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student alone has no teacher whose memory could be asked for."""
    monkeypatch.setattr(hardware, "cores", lambda: cores)
    monkeypatch.setattr(hardware, "host_memory", lambda: 32 << 30)
    config = compose([word.replace("student", role) for word in overrides])[0].config
    assert preflight_evaluation(config, role=role).ranks.per_node == expected


@pytest.mark.parametrize(
    ("quota", "expected"), [("150000 100000", 1), ("max 100000", None), ("100000000 100000", None)]
)
def test_cores_of_a_control_group(quota: str, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.Path, "read_text", lambda _path: quota)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _process: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert hardware.cores() == (expected or 12)
    assert hardware.threads_of_rank(5) == max(1, hardware.cores() // 5)


@pytest.mark.parametrize(
    ("given", "expected"), [("1", 1), ("2", 2), ("12", 3), ("2,4", 2), (" 2 ", 2), ("", 3), ("0", 3), ("many", 3)]
)
def test_a_shell_sets_the_most_threads_of_a_rank(given: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cores", lambda: 12)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert hardware.threads_of_rank(4) == expected
