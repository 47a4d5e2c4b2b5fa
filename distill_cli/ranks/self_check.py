"""The comparisons of `distill check`: sampler, scorer, trainer, gradient and checkpoint on the real models.

The first teacher is the student itself, so that teacher and student are equal and every difference is a defect; then
comes the real teacher. Each question is answered by a number against a limit, and by a fix if the limit is exceeded.
Limits are those of the arithmetic: float32 throughout, or 16 bits somewhere.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from distill_cli.checkpoint import store
from distill_cli.checkpoint.saver import Saver, Trainable, load
from distill_cli.config.schema import Config, Dtype, Precision
from distill_cli.engines import handshake
from distill_cli.errors import DistillError
from distill_cli.losses.linear_divergence import HeadOutput
from distill_cli.parallel.mesh import Parallel
from distill_cli.ranks.build_student import build_loss, build_objective
from distill_cli.ranks.handshakes import head_error
from distill_cli.rollout.pack import MicroBatch
from distill_cli.rollout.workers import RolloutWorker, ScoringWorker
from distill_cli.student.adapters import B
from distill_cli.student.model import Student
from distill_cli.student.optimizer import StepResult, accumulate_gradient, count_response_tokens, optimizer_step
from distill_cli.student.teacher_head import TeacherHeads
from distill_cli.tokens.translation import Translation
from distill_cli.types import Prompt, Rollout, Target

AtTokens = Callable[[MicroBatch, HeadOutput], torch.Tensor]
"""Returns a value for each response token of a micro-batch, given the head's outputs: [N]."""
MASSES = (16, 64, 128)
"""Sizes of the teacher's top-k whose probability mass is reported."""
LOSS_SHIFTS = (0.05, 0.01, 0.002)
"""Shares of the loss by which weights are moved along the gradient to measure the loss's slope, one after another.

Some losses bend within the first, which 16 bits need to see any slope at all.
"""
SLOPE_AGREEMENT = 0.1
"""A slope is measured if a shorter move changes it by less than this share."""
SYNC_SHIFT = 0.2
"""Share by which all trained weights are reduced to check that the sampler follows."""

QUESTIONS = {
    "mass": ("top-k mass of the teacher", ""),
    "aligned": ("the student's tokens are the teacher's text", "see model.teacher.path={model.teacher.path}"),
    "sampler": ("sampler and trainer agree", "compare model.student.dtype, train.precision, engine.student.kwargs"),
    "own scorer": (
        "scorer and trainer agree on the student",
        "see loss.temperature={loss.temperature}, engine.teacher.kwargs",
    ),
    "zero": ("teacher = student: the loss is zero", "the two sides differ in loss, order of tokens or temperature"),
    "other": ("teacher != student: the loss is not zero", "the scores are not model.teacher.path={model.teacher.path}"),
    "same": ("the teacher is the student itself", ""),
    "scores": ("the teacher's scores say something", "it has no weights: see model.teacher.path={model.teacher.path}"),
    "top-k": ("the teacher's top-k is in order", "see engine.teacher.kwargs"),
    "position": ("the teacher scores the tokens it is given", "see engine.teacher.kwargs"),
    "temperature": (
        "the teacher scores at the loss's temperature",
        "see loss.temperature={loss.temperature}, engine.teacher.kwargs",
    ),
    "head": (
        "its hidden states and head give its scores",
        "see model.teacher.path={model.teacher.path} and engine.teacher.kwargs, or set loss.support=teacher",
    ),
    "scorer": (
        "scorer and trainer agree on the teacher",
        "see model.teacher.path={model.teacher.path}, model.teacher.dtype and engine.teacher.kwargs",
    ),
    "mean": ("the loss is the mean over all response tokens", "the loss depends on ranks, micro-batches or copies"),
    "slope": ("the gradient is the loss's slope", "gradients are summed or divided once too often over the mesh"),
    "step": ("a step of the optimizer is finite", "see the weights of model.student.path, and train.precision"),
    "checkpoint": ("a checkpoint brings everything back", "see the disk and the ranks' logs, or report it"),
    "sync": ("the sampler has the new weights after a sync", "the sync of weights does not reach the sampler's engine"),
}
"""By name: the question as it is printed, and the fix if the answer is bad. Braces hold keys of the config."""


@dataclass(frozen=True)
class Finding:
    """The answer to one question."""

    what: str
    is_good: bool | None
    """None: not checked, or for the user to judge."""
    answer: str
    fix: str


class Limits(NamedTuple):
    """Largest differences that rounding explains."""

    logp: float
    """Mean absolute difference between two computations of log-probabilities."""
    loss: float
    """Loss of a student against itself."""


EXACT, ROUNDED = Limits(logp=1e-4, loss=1e-6), Limits(logp=2e-2, loss=1e-3)
"""With float32 throughout, and otherwise."""


Findings = Iterator[Finding]


@dataclass(frozen=True)
class SelfCheck:
    """One rank's side of the check. All methods but `answer` and `within` are collectives."""

    config: Config
    parallel: Parallel
    prompts: Sequence[Prompt]
    """One for each sequence of a global batch."""
    worker: RolloutWorker
    own_scoring: ScoringWorker
    """Scores with the student's own weights, MASSES[-1] tokens if the vocabulary has as many."""
    make_scoring: Callable[[], ScoringWorker]
    """Builds the real teacher with the same top-k, once the first one is closed. A collective."""
    student: Student
    trainable: Trainable
    load_teacher: Callable[[], Student]
    """Loads the teacher into the trainer's own code; raises DistillError if that is impossible. A collective."""
    saver: Saver
    checkpoints: Path
    """The saver's folder."""
    vocab_size: int
    """Ids that are scored."""
    heads: TeacherHeads | None = None
    """Takes the teacher's head, if the run needs its hidden states."""
    name: str = ""
    """The teacher's, if there are several."""
    translation: Translation | None = None
    """To the teacher's tokens, if its tokenizer is its own."""
    targets: Sequence[tuple[Target, ...]] | None = None
    """The teacher with its own versions of `prompts`; None if it reads the student's."""

    def run(self) -> Findings:
        """Answer every question in turn, the same on every rank."""
        self.student.objective, self.student.has_advantages = self.student.objective.plain, False
        rollouts = self.sample(version=0)
        own, _ = self.score(rollouts, self.own_scoring)
        yield from self.check_student_against_itself(own)
        self.own_scoring.teachers[0].close()
        scoring = self.make_scoring()
        batches = yield from self.check_scores(rollouts, scoring)
        yield from self.check_gradient(batches)
        yield self.check_step(batches)
        yield from self.check_sync_and_checkpoint(scoring)
        scoring.teachers[0].close()

    def run_other_teacher(self) -> Findings:
        """Answer the questions about one more teacher of the run, after `run` has ended; the loss is this one's."""
        self.student.objective = build_objective(self.config).plain
        scoring = self.make_scoring()
        yield from self.check_scores(self.sample(version=2), scoring)
        scoring.teachers[0].close()

    @property
    def limits(self) -> Limits:
        """The limits of the arithmetic; vLLM's attention multiplies in TF32 on GPUs."""
        model, train = self.config.model, self.config.train
        is_exact = self.parallel.device.type == "cpu" and train.precision is Precision.fp32
        return EXACT if is_exact and {model.student.dtype, model.teacher.dtype} == {Dtype.float32} else ROUNDED

    def answer(self, question: str, is_good: bool | None, text: str) -> Finding:
        """Return the answer to one of QUESTIONS."""
        what, fix = QUESTIONS[question]
        what = f"{self.name}: {what}" if self.name else what
        return Finding(what, is_good, text, fix.format(model=self.config.model, loss=self.config.loss))

    def within(self, question: str, value: float, limit: float) -> Finding:
        """Return whether a value is within its limit."""
        return self.answer(question, value <= limit, f"{value:.2g} (limit {limit:g})")

    def sample(self, *, version: int) -> list[Rollout]:
        """Sample with the student's current weights; `version` differs for different weights."""
        worker = replace(self.worker, version=lambda: version)
        with worker.ready():
            return worker.sample(self.prompts, step=1)

    def score(self, rollouts: Sequence[Rollout], scoring: ScoringWorker) -> tuple[list[MicroBatch], dict[int, float]]:
        """Return scored micro-batches, and the teacher's probability mass by size of its top-k."""
        batch, topk = scoring.score(rollouts), self.config.loss.topk
        sums = torch.zeros(len(MASSES) + 1, device=self.parallel.device)
        for scores in batch.scores.values():
            mass = [scores.topk_logp[:, :k].exp().sum() for k in MASSES]
            sums += torch.tensor([*mass, float(len(scores.sampled_logp))], device=sums.device)
        *masses, number = self.parallel.all_sum(sums).tolist()
        cut = replace(batch, scores={place: scores.first(topk) for place, scores in batch.scores.items()})
        return cut.micro_batches(self.parallel), {k: m / max(number, 1) for k, m in zip(MASSES, masses, strict=True)}

    def evaluate(self, student: Student, batches: Sequence[MicroBatch]) -> tuple[float, list[HeadOutput]]:
        """Return the loss of the global batch, and the head's outputs on this rank's micro-batches."""
        total = count_response_tokens(batches, parallel=self.parallel)
        outputs = student.evaluate(batches, num_loss_tokens=total.clamp(min=1), with_classes=True)
        loss = torch.zeros((), device=self.parallel.device)
        for output in outputs:
            loss += output.loss
        return float(self.parallel.all_sum(loss)), outputs

    def mean(self, batches: Sequence[MicroBatch], outputs: Sequence[HeadOutput], at_tokens: AtTokens) -> float:
        """Return the mean of `at_tokens` over the response tokens of all ranks, in float64."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.parallel.device)
        for batch, output in zip(batches, outputs, strict=True):
            values_N = at_tokens(batch.to(self.parallel.device), output)
            sums += torch.stack([values_N.double().sum(), torch.tensor(values_N.numel()).to(sums)])
        total, number = self.parallel.all_sum(sums).tolist()
        return total / max(number, 1)

    def sampler_difference(self, batches: Sequence[MicroBatch], outputs: Sequence[HeadOutput]) -> float:
        """Return the mean absolute difference of sampler and trainer in the sampled tokens' log-probabilities."""
        return self.mean(batches, outputs, lambda batch, out: (batch.sampler_logp - out.sampled_logp_N).abs())

    def scorer_difference(self, batches: Sequence[MicroBatch], outputs: Sequence[HeadOutput]) -> float:
        """Return the mean absolute difference of scorer and trainer in the top-k, weighted by its probabilities."""

        def at_tokens(batch: MicroBatch, output: HeadOutput) -> torch.Tensor:
            difference_NK = (batch.scores.topk_logp - output.student_logp_NC[:, :-1]).abs()
            return (batch.scores.topk_logp.exp() * difference_NK).sum(-1)

        return self.mean(batches, outputs, at_tokens)

    def check_student_against_itself(self, batches: Sequence[MicroBatch]) -> Findings:
        """Compare the student in trainer, sampler and scorer."""
        loss, outputs = self.evaluate(self.student, batches)
        yield self.within("sampler", self.sampler_difference(batches, outputs), self.limits.logp)
        yield self.within("own scorer", self.scorer_difference(batches, outputs), self.limits.logp)
        yield self.within("zero", loss, self.limits.loss)

    def check_scores(
        self, rollouts: Sequence[Rollout], scoring: ScoringWorker
    ) -> Generator[Finding, None, list[MicroBatch]]:
        """Check the teacher on these answers; return the scored micro-batches."""
        yield from self.shake_hands(scoring)
        self.student.groups = {} if self.translation is None else {0: self.translation.groups}
        if self.heads is not None:
            self.heads.firsts = {} if self.translation is None else {0: self.translation.firsts}
        if self.targets is not None:
            pairs = zip(rollouts, self.targets, strict=True)
            rollouts = [replace(one, prompt=replace(one.prompt, targets=targets)) for one, targets in pairs]
        batches, masses = self.score(rollouts, scoring)
        if self.translation is not None:
            yield self.check_alignment(batches, rollouts)
        yield self.answer("mass", None, ", ".join(f"{mass:.4f} at {k}" for k, mass in masses.items()))
        yield from self.check_teacher(batches)
        return batches

    def check_alignment(self, batches: Sequence[MicroBatch], rollouts: Sequence[Rollout]) -> Finding:
        """Say how the tokens of the answers align with the teacher's own; most must be compared."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.parallel.device)
        for batch in batches:
            aligned = batch.scores.alignment[:, :1]  # a row without sequences has no columns
            sums += torch.stack([aligned.double().sum(), torch.tensor(aligned.numel()).double()]).to(sums)
        aligned, number = self.parallel.all_sum(sums).tolist()
        written = max(sum(rollout.sample.num_trained for rollout in rollouts), 1)
        text = f"{aligned / written:.1%} begin where its own do, {1 - number / written:.1%} are left out"
        return self.answer("aligned", number > written / 2, text)

    def shake_hands(self, scoring: ScoringWorker) -> Findings:
        """Answer the questions of the handshake, as a run does before its first step."""
        (teacher,), stages = scoring.teachers, scoring.stages
        with stages.awake(teacher), stages("handshake"):
            targets = self.targets or [prompt.targets for prompt in self.prompts]
            pairs = zip(self.prompts, targets, strict=True)
            probe = handshake.make_probe(teacher, [prompt.ids_for(of_teacher[0]) for prompt, of_teacher in pairs])
        number = probe.scores[0].topk_ids.shape[1]  # more than loss.topk: see MASSES
        limit = handshake.EXACT if self.limits is EXACT else handshake.ROUNDED
        size, temperature = self.vocab_size, self.config.loss.temperature
        for one in handshake.answers(probe, topk=number, vocab_size=size, temperature=temperature, limit=limit):
            yield self.answer(one.what, one.problem is None, one.text)
        if self.heads is None:
            return
        with stages.awake(teacher), stages("handshake"):
            self.heads.read(0, teacher.head)
            error = head_error(self.heads, 0, teacher, probe, temperature=temperature)
        if error is not None:
            yield self.within("head", error, limit)

    def check_teacher(self, batches: Sequence[MicroBatch]) -> Findings:
        """Check that the teacher is another model, if the config says so, and compare it in scorer and trainer."""
        loss, _ = self.evaluate(self.student, batches)
        model = self.config.model
        is_other = (model.teacher.path, model.teacher.revision) != (model.student.path, model.student.revision)
        if is_other and not model.teacher.is_student:
            yield self.answer("other", self.differs(loss), f"loss {loss:.3g}")
        else:
            yield self.answer("same", None, f"loss {loss:.3g}")
        try:
            teacher = self.load_teacher()
        except DistillError as error:
            yield self.answer("scorer", None, f"not checked: {error}")
        else:
            _, outputs = self.evaluate(teacher, batches)
            yield self.within("scorer", self.scorer_difference(batches, outputs), self.limits.logp)

    def differs(self, loss: float) -> bool:
        """Return whether the loss is that of two different models."""
        return loss > 10 * self.limits.loss

    def check_gradient(self, batches: Sequence[MicroBatch]) -> Findings:
        """Check that the loss is the mean over response tokens, and its gradient the slope by central differences."""
        _, outputs = self.evaluate(self.student, batches)
        result = accumulate_gradient(self.student, batches, max_grad_norm=float("inf"), parallel=self.parallel)
        token_loss = build_loss(self.config)

        def at_tokens(batch: MicroBatch, output: HeadOutput) -> torch.Tensor:
            return token_loss(batch.scores.topk_logp, output.student_logp_NC, output.entropy_N)

        expected = self.mean(batches, outputs, at_tokens)
        is_mean = abs(result.loss - expected) <= 1e-3 * abs(expected) + self.limits.loss
        yield self.answer("mean", is_mean, f"{result.loss:.6g}, and {expected:.6g} token by token")
        if self.differs(result.loss) and result.is_finite and result.grad_norm > 0:
            slope = self.converged_slope(batches, result)
            text = f"norm {result.grad_norm:.4g}, slope {slope:.4g}"
            # Part of what a new adapter adds to a layer's bfloat16 output is too small to change it.
            if self.config.model.student.lora.is_on and self.config.train.precision is Precision.bf16:
                yield self.answer("slope", None, f"{text}: bf16 rounds small steps of adapters away")
            else:
                yield self.answer("slope", 0.7 <= slope / result.grad_norm <= 1.4, text)
        self.trainable.optimizer.zero_grad(set_to_none=True)

    def converged_slope(self, batches: Sequence[MicroBatch], result: StepResult) -> float:
        """Return the loss's slope along its gradient, measured over ever shorter moves until they agree."""
        shifts = LOSS_SHIFTS if self.limits is EXACT else LOSS_SHIFTS[:1]
        slope = self.slope(batches, result, shift=shifts[0])
        for shift in shifts[1:]:
            longer, slope = slope, self.slope(batches, result, shift=shift)
            if abs(slope - longer) <= SLOPE_AGREEMENT * abs(slope):
                break
        return slope

    @torch.no_grad()
    def slope(self, batches: Sequence[MicroBatch], result: StepResult, *, shift: float) -> float:
        """Return the loss's slope along its gradient, from a move either way that changes it by about `shift`."""
        params = [(param, param.grad) for param in self.student.parameters() if param.grad is not None]
        length, losses = shift * result.loss / result.grad_norm, []
        for sign in (1.0, -1.0):
            factor = sign * length / result.grad_norm
            for param, gradient in params:
                param.sub_(gradient, alpha=factor)
            losses.append(self.evaluate(self.student, batches)[0])
            for param, gradient in params:
                param.add_(gradient, alpha=factor)
        return (losses[1] - losses[0]) / (2 * length)

    def check_step(self, batches: Sequence[MicroBatch]) -> Finding:
        """Check that an optimizer update is finite."""
        optimizer, schedule, limit = self.trainable.optimizer, self.trainable.schedule, self.config.train.max_grad_norm
        result = optimizer_step(self.student, optimizer, schedule, batches, max_grad_norm=limit, parallel=self.parallel)
        return self.answer("step", result.is_finite, f"loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}")

    def check_sync_and_checkpoint(self, scoring: ScoringWorker) -> Findings:
        """Check that the sampler follows changed weights, and that a checkpoint restores the old ones bit for bit."""
        before = [tensor.clone() for tensor in self.local_tensors()]
        self.saver.save(1, {"metrics": {}})
        self.saver.finish()
        with torch.no_grad():
            for name, param in self.trainable.parameters():
                # An adapter's B begins at 0, which a factor would not change.
                param.add_(SYNC_SHIFT / param.shape[1]) if name.endswith(B) else param.mul_(1 - SYNC_SHIFT)
        batches, _ = self.score(self.sample(version=1), scoring)
        _, outputs = self.evaluate(self.student, batches)
        to_new, warnings = self.sampler_difference(batches, outputs), list[str]()
        saved = store.newest_whole(self.checkpoints, warn=warnings.append)
        if saved is None:
            yield self.answer("checkpoint", False, "; ".join(warnings) or "none was written")
            return
        load(saved.path, self.trainable)
        equal = [old.equal(new) for old, new in zip(before, self.local_tensors(), strict=True)]
        num_differing = self.parallel.all_max(float(equal.count(False)))
        yield self.answer("checkpoint", num_differing == 0, f"{len(equal)} tensors, {num_differing:.0f} of them differ")
        _, outputs = self.evaluate(self.student, batches)
        to_old, limit = self.sampler_difference(batches, outputs), self.limits.logp
        text = f"{to_new:.2g} from the new (limit {limit:g}), {to_old:.2g} from the old"
        yield self.answer("sync", to_new <= limit and to_new < to_old / 2, text)

    def local_tensors(self) -> list[torch.Tensor]:
        """Return this rank's parts of weights and optimizer state."""
        tensors = self.trainable.tensors(with_optimizer=True).values()
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
