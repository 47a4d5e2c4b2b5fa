"""Write a fixed number of tokens in every step, and go on with unfinished sequences in the next (`rollout.carry_over`).

There are as many slots as a step has sequences otherwise (prompts_per_step x generations_per_prompt). In each step
every slot writes its share of `rollout.tokens_per_step`: it goes on with its sequence, and when that ends it begins
another at once. So all engines are busy to the end of the stage, none waits for the longest answer, and the loss, which
is of tokens, gets the same number of them in every step.

The first prompt of slot i is the i-th of the first batch of `PromptOrder`, its next one the i-th of the second batch,
and so on: which prompt a slot answers depends neither on other slots nor on the number of ranks. A sequence has the
seed that it would have without carry-over; each part of it has a seed of its own (`growing.request_seed`).

A token's loss is that of the step in which it was written, by the weights of that step. Tokens of earlier steps are
read as a part of the prompt: whatever weights wrote them, the divergence at the tokens after them is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from distill_cli.data.order import PromptBatches
from distill_cli.engines.base import Request
from distill_cli.rollout.early_scores import EarlyScores
from distill_cli.rollout.growing import Growing
from distill_cli.rollout.in_flight import SampledStep, Slot, Unfinished
from distill_cli.rollout.workers import RolloutWorker
from distill_cli.types import Prompt, Rollout, Sample


@dataclass(frozen=True)
class Piece:
    """What a slot wrote of one sequence in a step."""

    number: int
    """Index of the batch of its prompt."""
    sample: Sample
    """The tokens of this step alone."""
    reward: float | None
    unfinished: Unfinished | None
    """How the sequence goes on; None if it has ended."""


@dataclass
class _Writer:
    """A slot in a step."""

    growing: Growing
    number: int
    began: int
    first: int
    """Index in the answer of its first token of this step."""
    left: int
    """Tokens that the slot may still write in this step."""
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class CarryOver:
    """Writes the sequences of each step."""

    prompts: PromptBatches
    generations_per_prompt: int
    num_slots: int
    tokens_per_step: int
    """At least `num_slots`."""
    max_age: int | None
    """Steps in which a sequence may be written, at most; None does not limit them."""
    worker: RolloutWorker
    _growing: dict[int, tuple[int, Growing]] = field(default_factory=dict)
    """By slot, the sequences that this process has begun and not finished, after their number."""

    def quota(self, slot: int) -> int:
        """Return the number of tokens that a slot writes in a step."""
        share, rest = divmod(self.tokens_per_step, self.num_slots)
        return share + (slot < rest)

    def prompt(self, slot: int, number: int) -> Prompt:
        return self.prompts.batch(number)[slot // self.generations_per_prompt]

    def seed(self, slot: int, number: int) -> int:
        return self.worker.responder.seed_of(step=number + 1, sequence=slot)

    def write(
        self, slots: Sequence[Slot], *, step: int, limit: int, early: EarlyScores | None = None
    ) -> tuple[SampledStep, tuple[Slot, ...]]:
        """Write a step's tokens, on all ranks. Call it inside `RolloutWorker.ready`. A collective.

        Args:
            slots: what each goes on with; empty before the first step.
            limit: greatest length of a turn.
            early: takes this rank's pieces as they end.

        Returns:
            The pieces, ordered by slot, and what each slot goes on with.
        """
        slots = slots or [Slot()] * self.num_slots
        kept = [self._kept(slot, step=step) for slot in slots]
        share = self.worker.share
        shares = [range(first, self.num_slots, share.num_engines) for first in range(share.num_engines)]
        mine = shares[share.index]
        by_slot = share.exchange(shares, self._write_own(mine, kept, step=step, limit=limit, early=early))
        rollouts, origins, places = list[Rollout](), list[tuple[int, int]](), list[int]()
        for index in range(self.num_slots):
            for place, piece in enumerate(by_slot[index]):
                prompt, carried = self.prompt(index, piece.number), kept[index].written if place == 0 else None
                if early is not None:
                    early.places[index, place] = len(rollouts)
                rollouts.append(Rollout(prompt, piece.sample, piece.reward, carried))
                origins.append((piece.number, index // self.generations_per_prompt))
                places.append(index)
        after = tuple(self._after(by_slot[index], kept[index]) for index in range(self.num_slots))
        self.prompts.forget(before=min(slot.number for slot in after))
        dropped = sum(slot.number != before.number for slot, before in zip(kept, slots, strict=True))
        metrics = {**ages(after, step=step), "rollout/dropped": float(dropped)}
        return SampledStep(tuple(rollouts), tuple(origins), tuple(places), metrics), after

    def _kept(self, slot: Slot, *, step: int) -> Slot:
        """Return the slot, which drops its sequence if that is too old."""
        too_old = slot.unfinished and self.max_age is not None and step - slot.unfinished.began >= self.max_age
        return Slot(slot.number + 1) if too_old else slot

    @staticmethod
    def _after(pieces: Sequence[Piece], before: Slot) -> Slot:
        """Return what a slot goes on with after it has written these pieces."""
        if not pieces:  # the engine was interrupted
            return before
        last = pieces[-1]
        if last.unfinished is None:
            return Slot(last.number + 1)
        whole = last.sample if len(pieces) > 1 or before.unfinished is None else before.unfinished.sample + last.sample
        return Slot(last.number, replace(last.unfinished, sample=whole))

    def _write_own(
        self, mine: Sequence[int], slots: Sequence[Slot], *, step: int, limit: int, early: EarlyScores | None
    ) -> list[list[Piece]]:
        """Write the pieces of this rank's slots with its engine."""
        writers = [self._writer(index, slots[index], step=step) for index in mine]

        def then(place: int, answer: Sample) -> Request | None:
            writer, index = writers[place], mine[place]
            writer.left -= len(answer.token_ids)
            writer.growing.take(answer)
            if writer.growing.is_over or writer.left <= 0:
                carried = slots[index].written if not writer.pieces else None
                piece = self._end_piece(writer)
                if early is not None:
                    prompt = self.prompt(index, piece.number)
                    early.add((index, len(writer.pieces) - 1), Rollout(prompt, piece.sample, carried=carried))
            if writer.left <= 0:
                if not writer.growing.is_over:
                    self._growing[index] = writer.number, writer.growing
                return None
            if writer.growing.is_over:
                self._begin_next(writer, index, step=step)
            return writer.growing.request(limit=limit, room=writer.left)

        requests = [writer.growing.request(limit=limit, room=writer.left) for writer in writers]
        sampling = self.worker.responder.sampling_up_to(limit)
        self.worker.sampler.sample_chains(requests, sampling=sampling, then=then)
        self._judge(writers, mine, slots)
        return [writer.pieces for writer in writers]

    def _writer(self, index: int, slot: Slot, *, step: int) -> _Writer:
        turns, seed = self.worker.responder.turns, self.seed(index, slot.number)
        prompt, before = self.prompt(index, slot.number), slot.unfinished
        number, known = self._growing.pop(index, (-1, None))
        if before is None:
            growing = Growing.begin(prompt, seed=seed, turns=turns)
        elif known is not None and number == slot.number:
            growing = known
        else:
            growing = Growing.resume(prompt, before, seed=seed, turns=turns)
        first, began = (0, step) if before is None else (len(before.sample.token_ids), before.began)
        return _Writer(growing, slot.number, began, first, self.quota(index))

    def _begin_next(self, writer: _Writer, index: int, *, step: int) -> None:
        writer.number, writer.began, writer.first = writer.number + 1, step, 0
        prompt, seed = self.prompt(index, writer.number), self.seed(index, writer.number)
        writer.growing = Growing.begin(prompt, seed=seed, turns=self.worker.responder.turns)

    @staticmethod
    def _end_piece(writer: _Writer) -> Piece:
        growing = writer.growing
        sample, unfinished = growing.sample.part(writer.first), None
        if not growing.is_over:
            # What earlier steps wrote is known to all ranks, and need not travel.
            unfinished = replace(growing.unfinished(began=writer.began), sample=Sample([], None, ""))
        piece = Piece(writer.number, sample, growing.reward if growing.is_over else None, unfinished)
        writer.pieces.append(piece)
        return piece

    def _judge(self, writers: Sequence[_Writer], mine: Sequence[int], slots: Sequence[Slot]) -> None:
        """Reward the pieces that end a sequence."""
        rollouts = []
        for writer, index in zip(writers, mine, strict=True):
            for place, piece in enumerate(writer.pieces):
                prompt, carried = self.prompt(index, piece.number), slots[index].written if place == 0 else None
                rollouts.append(Rollout(prompt, piece.sample, piece.reward, carried))
        judged = iter(self.worker.responder.judge(rollouts))
        for writer in writers:
            writer.pieces = [replace(piece, reward=next(judged).reward) for piece in writer.pieces]


def ages(slots: Sequence[Slot], *, step: int) -> dict[str, float]:
    """Return the number of sequences that go on after `step`, and their ages: steps in which they were written."""
    found = [step - slot.unfinished.began + 1 for slot in slots if slot.unfinished is not None]
    return {
        "rollout/carried": float(len(found)),
        "rollout/mean_age": fmean(found) if found else 0.0,
        "rollout/oldest": float(max(found, default=0)),
    }
