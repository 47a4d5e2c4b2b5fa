"""The share of answers that the length guard gives to the teacher."""

from distill_cli.config.checks import config_problems, inert_overrides
from distill_cli.config.compose import compose
from distill_cli.rollout.length_guard import LengthGuard


def shares(guard: LengthGuard, rates: list[float]) -> list[float]:
    found = []
    for rate in rates:
        guard.observe(rate)
        found.append(guard.share)
    return found


def test_share_falls_after_the_last_excess() -> None:
    guard = LengthGuard(above=0.3, most=0.6, steps=3, write=lambda prompts, seeds: [])
    assert guard.share == 0
    rates = [0.3, 0.31, 0.9, 0.2, 0.1, 0.4, 0.0, 0.0, 0.0, 0.0]
    assert [round(share, 9) for share in shares(guard, rates)] == [0, 0.6, 0.6, 0.4, 0.2, 0.6, 0.4, 0.2, 0, 0]


def test_its_state_is_one_number() -> None:
    rates = [0.5, 0.2, 0.2, 0.5, 0.1, 0.1, 0.1, 0.1]
    whole = LengthGuard(0.3, 0.5, 4, lambda prompts, seeds: [])
    expected = shares(whole, rates)
    for cut in range(len(rates)):
        begun = LengthGuard(0.3, 0.5, 4, lambda prompts, seeds: [])
        before = shares(begun, rates[:cut])
        resumed = LengthGuard(0.3, 0.5, 4, lambda prompts, seeds: [], left=begun.left)
        assert before + shares(resumed, rates[cut:]) == expected


def test_its_keys_are_checked() -> None:
    (job,) = compose(["rollout.guard_above=0.2", "rollout.guard_share=1", "rollout.environment=guess"])
    problems = config_problems(job.config)
    assert any(line.startswith("rollout.guard_share=1") for line in problems)
    assert any(line.startswith("rollout.guard_above=0.2: with rollout.environment") for line in problems)
    (warning,) = inert_overrides(compose(["rollout.guard_steps=3"])[0].config, ["rollout.guard_steps=3"])
    assert "rollout.guard_above" in warning
