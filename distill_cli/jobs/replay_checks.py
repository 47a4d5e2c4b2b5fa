"""Whether a config can train on what another run recorded. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from distill_cli.config.schema import Config
from distill_cli.config.variation import forbidden_changes, load_config
from distill_cli.data.recorded_run import Recording, vocabulary_digest
from distill_cli.models.model_files import ModelFiles


def check_recording(recording: Recording, config: Config, student: ModelFiles, tokenizer: ModelFiles) -> Iterator[str]:
    """Yield one line for each reason why the config cannot train on the recording."""
    recorded, facts = load_config(recording.folder.parent / "config.yaml"), recording.facts
    for key, before, after in forbidden_changes(recorded, config, unless="replay"):
        yield f"{key}={after}: the rollouts were recorded with {before}; leave it out, or start a new run"
    if (temperature := config.loss.temperature) != facts.temperature:
        what = f"the teacher was recorded with {facts.temperature}, which its scores rest on"
        yield f"loss.temperature={temperature}: {what}; leave it out"
    if (topk := config.loss.topk) > facts.topk:
        yield f"loss.topk={topk}: {facts.topk} tokens of the teacher were recorded; lower it"
    rollout, response, sequence = config.rollout, recording.longest_response, recording.longest_sequence
    if rollout.max_new_tokens < response and rollout.max_turns == 1:
        what = f"the longest recorded answer has {response} tokens"
        yield f"rollout.max_new_tokens={rollout.max_new_tokens}: {what}; raise it"
    longest = f"the longest recorded sequence has {sequence} tokens"
    if rollout.max_sequence_length < sequence:
        yield f"rollout.max_sequence_length={rollout.max_sequence_length}: {longest}; raise it"
    key, path = f"model.student.path={student.path}", recorded.model.student.path
    if student.max_positions is not None and student.max_positions < sequence:
        yield f"{key}: has {student.max_positions} positions, and {longest}; give another student"
    digest = vocabulary_digest(tokenizer.folder, facts.vocab_size)
    if student.vocab_size < facts.vocab_size:
        yield f"{key}: its vocabulary has {student.vocab_size} ids, and {facts.vocab_size} were recorded with {path}"
    elif set(facts.end_tokens) != set(student.eos_ids):
        what = f"ends with tokens {list(student.eos_ids)}, and {path}, which was recorded, with {facts.end_tokens}"
        yield f"{key}: {what}; give a student that ends alike"
    elif None not in (digest, facts.vocabulary) and digest != facts.vocabulary:
        yield f"{key}: its tokens are not those that were recorded with {path}; give a student with the same"
