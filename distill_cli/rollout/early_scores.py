"""Score the sequences that end first while the student still writes the others.

Only for teachers that work outside this process and stay awake: `Teacher.submit` returns at once. What is scored
together follows from the order in which sequences end, not from the clock, so that a step's numbers are the same each
time. A sequence is scored by the teacher of the rank that sampled it, and its scores then travel to the ranks that
train on it.
"""

import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from distill_cli.engines.base import Teacher
from distill_cli.losses.merged_eos import merge_topk
from distill_cli.tokens.translation import Translation
from distill_cli.types import Rollout, Target, TeacherScores

BATCH_TOKENS = {"cpu": 512, "cuda": 4096}
"""Tokens of prompts and answers that are scored together, at least, by device: a prefill that fills it."""

Place = tuple[int, int]
"""The place of a sequence in the step, and the index of one of its teachers."""
Key = int | tuple[int, int]
"""The place of a sequence, or what `EarlyScores.places` finds it by where it is known only later."""
Request = tuple[Rollout, Target]
"""A sequence, and a teacher that scores it."""


class EarlyScores:
    """The scores of one step's sequences that this rank's engine samples."""

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        batch_tokens: int,
        merged_eos_ids: Sequence[int] = (),
        hidden: bool = False,
        translations: Mapping[int, Translation] = MappingProxyType({}),
    ) -> None:
        """Score `batch_tokens` tokens at a time, or more; the other arguments are those of `submit`.

        Args:
            translations: by index of the teachers with a tokenizer of their own.
        """
        self._hidden, self._translations = hidden, translations
        self._teachers, self._merged_eos_ids, self._batch_tokens = teachers, merged_eos_ids, batch_tokens
        self._waiting: dict[int, dict[Key, Request]] = defaultdict(dict)  # by teacher, then by sequence
        self._submitted: list[tuple[int, list[Key], Callable[[], list[TeacherScores]]]] = []
        self.places: dict[Key, int] = {}
        """Places of the sequences in the step that were added under another key."""

    def add(self, place: Key, rollout: Rollout) -> None:
        """Take a sequence that has ended, at its place in the step."""
        for target in rollout.prompt.targets:
            waiting = self._waiting[target.teacher]
            waiting[place] = (rollout, target)
            if sum(len(one.ids_for(its)) for one, its in waiting.values()) >= self._batch_tokens:
                self._submit(target.teacher)

    def collect(self) -> dict[Place, TeacherScores]:
        """Wait for the scores of all sequences that were added."""
        for teacher in [teacher for teacher, waiting in self._waiting.items() if waiting]:
            self._submit(teacher)
        found = [(teacher, zip(keys, wait(), strict=True)) for teacher, keys, wait in self._submitted]
        return {(self._place(key), teacher): scores for teacher, pairs in found for key, scores in pairs}

    def _place(self, key: Key) -> int:
        return key if isinstance(key, int) else self.places[key]

    def _submit(self, teacher: int) -> None:
        waiting = self._waiting.pop(teacher)
        own, merged = list(waiting.values()), self._merged_eos_ids
        options: dict[str, Any] = {"hidden": self._hidden, "translation": self._translations.get(teacher)}
        wait = submit(own, self._teachers[teacher], merged_eos_ids=merged, **options)
        self._submitted.append((teacher, list(waiting), wait))


def submit(
    requests: Sequence[Request],
    teacher: Teacher,
    *,
    merged_eos_ids: Sequence[int] = (),
    hidden: bool = False,
    translation: Translation | None = None,
) -> Callable[[], list[TeacherScores]]:
    """Begin to score answers with a teacher, which may read prompts of its own; return what waits for the scores.

    Args:
        merged_eos_ids: tokens that count as one (`model.eos_map`), which are merged in the top-k here.
        hidden: take hidden states instead of the top-k; the trainer merges tokens in what it makes of them.
        translation: to the tokens of a teacher with a tokenizer of its own.
    """
    samples = [rollout.sample for rollout, _ in requests]
    assert all(one.logp is not None or one.source != "student" for one in samples), "sampled with logp=False"
    if translation is not None:
        wait = _submit_translated(requests, teacher, translation, hidden=hidden)
    else:
        wait = teacher.submit(
            [rollout.ids_for(target) for rollout, target in requests],
            response_starts=[len(rollout.context_for(target)) for rollout, target in requests],
            hidden=hidden,
        )
    if hidden or (translation is not None and translation.alignment == "rank"):  # ranks have no tokens to merge
        return wait
    return lambda: [
        merge_topk(scores, sampled_ids=sample.token_ids, merged_eos_ids=merged_eos_ids)
        for sample, scores in zip(samples, wait(), strict=True)
    ]


def _submit_translated(
    requests: Sequence[Request], teacher: Teacher, translation: Translation, *, hidden: bool
) -> Callable[[], list[TeacherScores]]:
    translated = [translation.request(rollout, target) for rollout, target in requests]
    starts = [one.response_start for one in translated]
    wait = teacher.submit([one.token_ids for one in translated], response_starts=starts, hidden=hidden)
    return lambda: translation.to_student(wait(), translated, hidden=hidden)


def deliver(scores: Mapping[Place, TeacherScores], needed: Sequence[Iterable[Place]]) -> dict[Place, TeacherScores]:
    """Send each rank the scores that it trains on, and return this rank's. A collective.

    Args:
        scores: this rank's, by place.
        needed: the places that each rank trains on.
    """
    parts = [{place: scores[place] for place in places if place in scores} for places in needed]
    return {place: one for part in exchange(parts) for place, one in part.items()}


def exchange(objects: Sequence[Any]) -> list[Any]:
    """Send each rank an object, and return what the ranks sent to this one, in their order. A collective."""
    out = [pickle.dumps(one, protocol=pickle.HIGHEST_PROTOCOL) for one in objects]
    sizes, sizes_in = torch.tensor([len(one) for one in out]), torch.empty(len(out), dtype=torch.int64)
    dist.all_to_all_single(sizes_in, sizes)
    sent = torch.frombuffer(bytearray(b"".join(out)), dtype=torch.uint8)
    received = torch.empty(int(sizes_in.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, sent, sizes_in.tolist(), sizes.tolist())
    return [pickle.loads(part.numpy().tobytes()) for part in received.split(sizes_in.tolist())]
