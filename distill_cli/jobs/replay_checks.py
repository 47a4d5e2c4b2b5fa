"""Whether a config can train on what another run recorded. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from distill_cli.config.schema import Config
from distill_cli.config.variation import forbidden_changes, load_config
from distill_cli.data.recorded_run import Recording, vocabulary_digest
from distill_cli.models.model_files import ModelFiles


def recording_problems(
    recording: Recording, config: Config, *, student: ModelFiles, tokenizer: ModelFiles
) -> Iterator[str]:
    """Yield one line for each reason why `config` cannot train on `recording`."""
    recorded = load_config(recording.folder.parent / "config.yaml")
    for key, before, after in forbidden_changes(recorded, config, unless="replay"):
        yield f"{key}={after}: the rollouts were recorded with {before}; leave it out, or start a new run"
    facts, loss, rollout = recording.facts, config.loss, config.rollout
    if loss.temperature != facts.temperature:
        yield (
            f"loss.temperature={loss.temperature}: the teacher was recorded with {facts.temperature}, which its "
            "scores rest on; leave it out"
        )
    if loss.topk > facts.topk:
        yield f"loss.topk={loss.topk}: {facts.topk} tokens of the teacher were recorded; lower it"
    if rollout.max_new_tokens < recording.longest_response and rollout.max_turns == 1:
        yield (
            f"rollout.max_new_tokens={rollout.max_new_tokens}: the longest recorded answer has "
            f"{recording.longest_response} tokens; raise it"
        )
    if rollout.max_sequence_length < recording.longest_sequence:
        yield (
            f"rollout.max_sequence_length={rollout.max_sequence_length}: the longest recorded sequence has "
            f"{recording.longest_sequence} tokens; raise it"
        )
    yield from _student_problems(recording, student, tokenizer, before=recorded.model.student.path)


def _student_problems(
    recording: Recording, student: ModelFiles, tokenizer: ModelFiles, *, before: str
) -> Iterator[str]:
    facts, what = recording.facts, f"model.student.path={student.path}"
    if student.max_positions is not None and student.max_positions < recording.longest_sequence:
        yield (
            f"{what}: has {student.max_positions} positions, and the longest recorded sequence has "
            f"{recording.longest_sequence} tokens; give another student"
        )
    digest = vocabulary_digest(tokenizer.folder, facts.vocab_size)
    if student.vocab_size < facts.vocab_size:
        yield (
            f"{what}: its vocabulary has {student.vocab_size} ids, and {facts.vocab_size} were recorded with {before}"
        )
    elif set(facts.end_tokens) != set(student.eos_ids):
        yield (
            f"{what}: ends with tokens {list(student.eos_ids)}, and {before}, which was recorded, with "
            f"{facts.end_tokens}; give a student that ends alike"
        )
    elif None not in (digest, facts.vocabulary) and digest != facts.vocabulary:
        yield f"{what}: its tokens are not those that were recorded with {before}; give a student with the same"
