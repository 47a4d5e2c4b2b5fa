"""The engine of `distill chat`: answers a token at a time, so that its caller shows each, and may stop in between."""

from dataclasses import dataclass

from distill_cli.engines import vllm_patches
from distill_cli.engines.base import Request
from distill_cli.engines.engine import reason
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.teacher import VllmTeacher
from distill_cli.errors import DistillError


@dataclass(frozen=True)
class Piece:
    """What one step adds to an answer."""

    token_ids: list[int]
    logp: list[float]
    """See `Sample.logp`."""
    finish_reason: str | None
    """`stop` or `length` at the end of the answer, else None."""


class StepwiseTeacher(VllmTeacher):
    """Answers one prompt at a time, driven by its caller, and scores.

    Ranks that share the engine are called in the same order, so that they stop after the same token.
    """

    shown_as = "the engine"
    _num_read = 0

    def begin(self, prompt: list[int], *, seed: int, sampling: SamplingSettings) -> None:
        """Begin an answer; one that was not finished is dropped. Raises DistillError for a bad request."""
        self.stop()
        params = self._params_of([Request(prompt, seed)], sampling)
        self._steps.watch(None)
        self.enqueue([prompt], params)
        vllm_patches.show_each_token(self.llm)
        self._num_read = 0

    def advance(self) -> Piece:
        """Return what the next step of the engine adds to the answer. Raises DistillError if the engine fails."""
        try:
            outputs = self.llm.llm_engine.step()
        except Exception as error:
            self.stop()
            raise DistillError(f"{self.settings.path}: the engine failed: {reason(error)}") from error
        if not outputs:
            return Piece([], [], None)
        completion, done = outputs[-1].outputs[0], self._num_read
        self._num_read = len(completion.token_ids)
        return Piece(list(completion.token_ids[done:]), list(completion.logprobs[done:]), completion.finish_reason)

    def stop(self) -> None:
        """Drop the answer; does nothing without one."""
        vllm_patches.abort_requests(self.llm)
