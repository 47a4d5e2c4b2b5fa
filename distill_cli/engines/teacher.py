"""The teacher's vLLM engine in the rank's process."""

from collections.abc import Callable, Sequence

from distill_cli.engines.base import OnEnd, Teacher
from distill_cli.engines.scoring import Scoring
from distill_cli.engines.settings import EngineSettings, SamplingSettings
from distill_cli.types import Sample


class VllmTeacher(Scoring, Teacher):
    """Scores sequences with the teacher in this process.

    For example:
        teacher = VllmTeacher(settings, topk=64, temperature=1.0)
        scores = teacher.score(sequences, response_starts=[len(prompt) for prompt in prompts])
    """

    shown_as = "the teacher"
    """Its name in messages."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        topk: int,
        temperature: float = 1.0,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Load the teacher.

        Args:
            settings: `max_model_len` is the longest sequence that can be scored.
            topk: at least 1, at most the vocabulary's size, which is full support.
            temperature: above 0; logits are divided by it (`loss.temperature`).
            should_stop: see `VllmEngine`.
        """
        arguments = self.engine_arguments(settings, topk=topk)
        super().__init__(settings, role=self.shown_as, should_stop=should_stop, **arguments)
        self.prepare_scoring(topk=topk, temperature=temperature)

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        seeds: Sequence[int],
        sampling: SamplingSettings,
        on_end: OnEnd | None = None,
        vocab_size: int | None = None,
    ) -> list[Sample]:
        """Return one answer to each prompt, of ids below `vocab_size` if it is given. See `VllmEngine.sample`."""
        self.check_options([], temperature=None, vocab_size=vocab_size)
        self.check_token_ids(prompts, max_len=self.settings.max_model_len - 1, vocab_size=vocab_size)
        with self.changed_logits(temperature=1.0, vocab_size=vocab_size):
            return super().sample(prompts, seeds=seeds, sampling=sampling, on_end=on_end)
