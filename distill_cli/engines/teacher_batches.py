"""The teacher of a scoring server's companion: the sequences of several requests in one call, arrays in and out."""

from collections.abc import Sequence
from itertools import islice

import numpy
import torch.distributed as dist

from distill_cli.engines import wire
from distill_cli.engines.teacher import VllmTeacher
from distill_cli.engines.wire import Arrays, SampleRequest, ScoreRequest
from distill_cli.engines.wire_tensors import head_arrays, named_array
from distill_cli.types import ModelHead, Sample, TeacherScores


class BatchTeacher(VllmTeacher):
    """Answers the requests of a batch together. Ranks other than an engine's first return None."""

    _whole_head: ModelHead | None = None
    """Kept for further requests: each reader of it takes the whole."""

    def score_batch(self, requests: Sequence[ScoreRequest]) -> list[Arrays] | None:
        """Return the answer to each request; temperature and vocab_size are the same in all of them.

        Either all ask for hidden states or none does.
        """
        is_hidden = requests[0].topk == 0
        sequences = [ids for request in requests for ids in wire.split(request.token_ids, request.lengths)]
        scores = self.score(
            sequences,
            response_starts=[start for request in requests for start in request.response_starts.tolist()],
            topk=None if is_hidden else [request.topk for request in requests for _ in request.lengths],
            temperature=requests[0].temperature,
            vocab_size=requests[0].vocab_size,
            hidden=is_hidden,
        )
        if dist.get_rank():
            return None
        rest = iter(scores)
        return [score_arrays(list(islice(rest, len(request.lengths)))) for request in requests]

    def head_rows(self, begin: int, end: int) -> tuple[Arrays, dict[str, str]] | None:
        """Return the answer to a request of rows of the head."""
        if self._whole_head is None:
            self._whole_head = self.head()
        return None if dist.get_rank() else head_arrays(self._whole_head.part((begin, end)))

    def sample_batch(self, requests: Sequence[SampleRequest]) -> list[Arrays] | None:
        """Return the answer to each request; sampling and vocab_size are the same in all of them."""
        samples = self.sample(
            [ids for request in requests for ids in wire.split(request.token_ids, request.lengths)],
            seeds=[seed for request in requests for seed in request.seeds.tolist()],
            sampling=requests[0].sampling,
            vocab_size=requests[0].vocab_size,
        )
        if dist.get_rank():
            return None
        rest = iter(samples)
        return [sample_arrays(list(islice(rest, len(request.lengths)))) for request in requests]


def score_arrays(scores: Sequence[TeacherScores]) -> Arrays:
    """Return the tensors of an answer of /score."""
    whole = TeacherScores.cat(scores)
    if whole.hidden.shape[1]:
        return named_array("hidden", whole.hidden)
    names = ("topk_ids", "topk_logp", "sampled_logp")
    return {name: getattr(whole, name).numpy() for name in names}


def sample_arrays(samples: Sequence[Sample]) -> Arrays:
    """Return the tensors of an answer of /sample."""
    tokens, lengths = wire.end_to_end([sample.token_ids for sample in samples])
    stopped = numpy.array([sample.finish_reason == "stop" for sample in samples], dtype=numpy.uint8)
    logp = [value for sample in samples for value in sample.logp or ()]
    has_logp = samples[0].logp is not None
    return {"token_ids": tokens, "lengths": lengths, "stopped": stopped} | (
        {"logp": numpy.array(logp, dtype=numpy.float32)} if has_logp else {}
    )
