"""`distill check`, on the ranks: is what is measured what is meant? Small, on the real models, mesh and engines.

The first teacher is the student itself, so that teacher and student are equal and every difference is a defect; then
comes the real one. Each question is answered by a number against a limit, and by a fix if it is not met. Limits are
those of the arithmetic: float32 throughout, or anything with 16 bits in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from distill_cli.checkpoint import store
from distill_cli.checkpoint.saver import Saver, Trainable, load
from distill_cli.config.schema import Config, Precision
from distill_cli.errors import DistillError
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.linear_topk import HeadOutput
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.pack import MicroBatch, micro_batches
from distill_cli.rollout.workers import RolloutWorker, ScoringWorker
from distill_cli.student.adapters import B
from distill_cli.student.model import Student
from distill_cli.student.optimizer import StepResult, accumulate_gradient, count_response_tokens, optimizer_step
from distill_cli.types import Prompt, Rollout

MASSES = (16, 64, 128)
"""Sizes of the teacher's top-k whose probability is reported."""
LOSS_SHIFT = 0.05
"""Share of the loss by which weights are moved along the gradient to see whether it is the slope."""
SYNC_SHIFT = 0.2
"""Share by which all trained weights are made smaller to see whether the sampler follows."""


@dataclass(frozen=True)
class Finding:
    """The answer to one question."""

    what: str
    is_good: bool | None
    """None: it could not be looked at, or is for the user to judge."""
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Limits:
    logp: float
    """Mean absolute difference of log-probabilities that two computations may have."""
    loss: float
    """Of a student against itself."""

    @classmethod
    def of(cls, *, exact: bool) -> Limits:
        return cls(logp=1e-4, loss=1e-6) if exact else cls(logp=2e-2, loss=1e-3)


@dataclass
class SelfCheck:
    """One rank's side; every rank runs it. `run` enters the same collectives on all."""

    config: Config
    parallel: Parallel
    prompts: Sequence[Prompt]
    """One for each sequence of a global batch."""
    worker: RolloutWorker
    own_scoring: ScoringWorker
    """By a teacher that holds the student's own weights, for MASSES[-1] tokens if there are as many."""
    make_scoring: Callable[[], ScoringWorker]
    """Builds the real teacher, once the first one is closed, to score as many. A collective."""
    student: Student
    trainable: Trainable
    loss: DistillLoss
    """As the config says, apart from the student's."""
    load_teacher: Callable[[], Student]
    """Loads the teacher into the trainer's own code. Raises DistillError if it cannot be. A collective."""
    saver: Saver
    checkpoints: Path
    """Where the saver writes."""
    limits: Limits
    report: Callable[[Finding], None]
    """Called on every rank, with the same findings."""
    findings: list[Finding] = field(default_factory=list)
    num_changes: int = 0
    """How often the student's weights were changed: their version, for the sampler."""

    def __post_init__(self) -> None:
        self.worker = replace(self.worker, version=lambda: self.num_changes)

    def run(self) -> bool:
        """Answer every question in turn, and return whether none was answered badly."""
        rollouts = self.sample()
        own, _ = self.score(rollouts, self.own_scoring)
        self.check_student_against_itself(own)
        self.own_scoring.teacher.close()
        scoring = self.make_scoring()
        batches, masses = self.score(rollouts, scoring)
        self.say("top-k mass of the teacher", None, ", ".join(f"{mass:.4f} at {k}" for k, mass in masses.items()))
        differs = self.check_teacher(batches)
        self.check_teachers_scores(batches)
        self.check_gradient(batches, worth_it=differs)
        self.check_step(batches)
        self.check_sync_and_checkpoint(scoring)
        scoring.teacher.close()
        return all(finding.is_good is not False for finding in self.findings)

    def say(self, what: str, is_good: bool | None, found: str, fix: str = "") -> None:
        finding = Finding(what, is_good, found, fix)
        self.findings.append(finding)
        self.report(finding)

    # what is compared

    def sample(self) -> list[Rollout]:
        """Sample with the student's weights as they are now. A collective."""
        with self.worker.ready():
            return self.worker.sample(self.prompts, step=1)

    def score(self, rollouts: Sequence[Rollout], scoring: ScoringWorker) -> tuple[list[MicroBatch], dict[int, float]]:
        """Return scored micro-batches, and the teacher's mass by size of its top-k. A collective."""
        scored = scoring.score(rollouts)
        sums = torch.zeros(len(MASSES) + 1, device=self.parallel.device)
        for scores in scored.scores.values():
            mass = [scores.topk_logp[:, :k].exp().sum() for k in MASSES]
            sums += torch.tensor([*mass, float(len(scores.sampled_logp))], device=sums.device)
        *masses, number = self.parallel.all_sum(sums).tolist()
        scores = {place: scores.first(self.config.loss.topk) for place, scores in scored.scores.items()}
        batches = [
            batch for plan in scored.plans for batch in micro_batches(plan, rollouts, scores, parallel=self.parallel)
        ]
        return batches, {k: mass / max(number, 1) for k, mass in zip(MASSES, masses, strict=True)}

    def outputs(self, student: Student, batches: Sequence[MicroBatch]) -> tuple[float, list[HeadOutput]]:
        """Return the loss of the global batch, and what the head says. A collective."""
        total = count_response_tokens(batches, parallel=self.parallel)
        outputs = student.evaluate(batches, num_loss_tokens=total.clamp(min=1))
        loss = torch.zeros((), device=self.parallel.device)
        for output in outputs:
            loss += output.loss
        return float(self.parallel.all_sum(loss)), outputs

    def mean(
        self,
        batches: Sequence[MicroBatch],
        outputs: Sequence[HeadOutput],
        of_tokens: Callable[[MicroBatch, HeadOutput], torch.Tensor],
    ) -> float:
        """Over the response tokens of all ranks, in float64. A collective."""
        parallel = self.parallel
        sums = torch.zeros(2, dtype=torch.float64, device=parallel.device)
        for batch, output in zip(batches, outputs, strict=True):
            values_N = of_tokens(batch.to(parallel.device), output)
            sums += torch.stack([values_N.double().sum(), torch.tensor(values_N.numel()).to(sums)])
        total, number = parallel.all_sum(sums).tolist()
        return total / max(number, 1)

    def sampler_difference(self, batches: Sequence[MicroBatch], outputs: Sequence[HeadOutput]) -> float:
        return self.mean(batches, outputs, lambda batch, out: (batch.sampler_logp - out.sampled_logp_N).abs())

    def scorer_difference(self, batches: Sequence[MicroBatch], outputs: Sequence[HeadOutput]) -> float:
        """Of the top-k's log-probabilities, each weighted by its probability."""

        def of_tokens(batch: MicroBatch, output: HeadOutput) -> torch.Tensor:
            difference_NK = (batch.scores.topk_logp - output.student_logp_NC[:, :-1]).abs()
            return (batch.scores.topk_logp.exp() * difference_NK).sum(-1)

        return self.mean(batches, outputs, of_tokens)

    # the questions

    def check_student_against_itself(self, batches: Sequence[MicroBatch]) -> None:
        loss, outputs = self.outputs(self.student, batches)
        self.within(
            "sampler and trainer agree",
            self.sampler_difference(batches, outputs),
            self.limits.logp,
            "the sampler's engine computes another model than the trainer: compare model.student.dtype and "
            "train.precision, and engine.student.kwargs",
        )
        self.within(
            "scorer and trainer agree on the student",
            self.scorer_difference(batches, outputs),
            self.limits.logp,
            f"the scorer's log-probabilities are not those of the same model: is loss.temperature="
            f"{self.config.loss.temperature} applied on both sides? see engine.teacher.kwargs",
        )
        self.within(
            "teacher = student: the loss is zero",
            loss,
            self.limits.loss,
            "a student that equals its teacher has nothing to learn: the loss, the order of tokens or the temperature "
            "differs between the two sides",
        )

    def check_teacher(self, batches: Sequence[MicroBatch]) -> bool:
        """Whether the teacher is another model."""
        loss, _ = self.outputs(self.student, batches)
        model, differs = self.config.model, loss > 10 * self.limits.loss
        expected = (model.teacher.path, model.teacher.revision) != (model.student.path, model.student.revision)
        self.say(
            "teacher != student: the loss is not zero" if expected else "the teacher is the student itself",
            differs if expected else None,
            f"loss {loss:.3g}",
            f"the scores are the student's own: what is loaded is not model.teacher.path={model.teacher.path}",
        )
        return differs

    def check_teachers_scores(self, batches: Sequence[MicroBatch]) -> None:
        what = "scorer and trainer agree on the teacher"
        try:
            teacher = self.load_teacher()
        except DistillError as error:
            self.say(what, None, f"not looked at: {error}")
            return
        _, outputs = self.outputs(teacher, batches)
        self.within(
            what,
            self.scorer_difference(batches, outputs),
            self.limits.logp,
            f"the scorer has not the weights of model.teacher.path={self.config.model.teacher.path}, or "
            "computes them differently: see model.teacher.dtype and engine.teacher.kwargs",
        )

    def check_gradient(self, batches: Sequence[MicroBatch], *, worth_it: bool) -> None:
        """The loss is the mean over response tokens; its gradient is its slope, by central differences."""
        result = accumulate_gradient(self.student, batches, max_grad_norm=float("inf"), parallel=self.parallel)

        def of_tokens(batch: MicroBatch, output: HeadOutput) -> torch.Tensor:
            return self.loss(batch.scores.topk_logp, output.student_logp_NC, output.entropy_N)

        expected = self.mean(batches, result.outputs, of_tokens)
        self.say(
            "the loss is the mean over all response tokens",
            abs(result.loss - expected) <= 1e-3 * abs(expected) + self.limits.loss,
            f"{result.loss:.6g}, and {expected:.6g} token by token",
            "the loss is scaled by how the work is cut up: by ranks, micro-batches or copies",
        )
        if worth_it and result.is_finite and result.grad_norm > 0:
            slope = self.slope(batches, result)
            found = f"norm {result.grad_norm:.4g}, slope {slope:.4g}"
            # What a new adapter adds to a layer's bfloat16 output is in part less than that can show.
            is_rounded = self.config.model.student.lora.is_on and self.config.train.precision is Precision.bf16
            self.say(
                "the gradient is the loss's slope",
                None if is_rounded else 0.7 <= slope / result.grad_norm <= 1.4,
                f"{found}: small steps of adapters are rounded away in bf16" if is_rounded else found,
                "gradients are summed or divided once too often over the mesh's ranks",
            )
        self.trainable.optimizer.zero_grad(set_to_none=True)

    def slope(self, batches: Sequence[MicroBatch], result: StepResult) -> float:
        """How fast the loss falls along its gradient, in a step either way of about LOSS_SHIFT of itself."""
        student, length = self.student, LOSS_SHIFT * result.loss / result.grad_norm
        losses = []
        for sign in (1.0, -1.0):
            with self.moved(student, sign * length / result.grad_norm):
                losses.append(self.outputs(student, batches)[0])
        return (losses[1] - losses[0]) / (2 * length)

    @contextmanager
    def moved(self, student: Student, factor: float) -> Iterator[None]:
        """Parameters less `factor` times their gradients, within."""
        params = [param for param in student.parameters() if param.grad is not None]
        with torch.no_grad():
            for param in params:
                param.sub_(param.grad, alpha=factor)
            yield
            for param in params:
                param.add_(param.grad, alpha=factor)

    def check_step(self, batches: Sequence[MicroBatch]) -> None:
        result = optimizer_step(
            self.student,
            self.trainable.optimizer,
            self.trainable.schedule,
            batches,
            max_grad_norm=self.config.train.max_grad_norm,
            parallel=self.parallel,
        )
        self.say(
            "a step of the optimizer is finite",
            result.is_finite,
            f"loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}",
            "look at the weights of model.student.path, and at train.precision",
        )

    def check_sync_and_checkpoint(self, scoring: ScoringWorker) -> None:
        """The sampler follows when trained weights change; a checkpoint brings back, bit for bit, what they were."""
        before = [_local(tensor).clone() for tensor in self.trainable.tensors(with_optimizer=True).values()]
        self.saver.save(1, {"metrics": {}})
        self.saver.finish()
        with torch.no_grad():
            for name, param in self.trainable.parameters():
                # An adapter's B begins at 0, where a factor would change nothing.
                param.add_(SYNC_SHIFT / param.shape[1]) if name.endswith(B) else param.mul_(1 - SYNC_SHIFT)
        self.num_changes += 1
        batches, _ = self.score(self.sample(), scoring)
        _, new = self.outputs(self.student, batches)
        what, warnings = "a checkpoint brings everything back", list[str]()
        saved = store.newest_whole(self.checkpoints, warn=warnings.append)
        if saved is None:
            self.say(what, False, "; ".join(warnings) or "none was written", "see the disk, and the ranks' logs")
            return
        load(saved.path, self.trainable)
        after = [_local(tensor) for tensor in self.trainable.tensors(with_optimizer=True).values()]
        equal = [x.equal(y) for x, y in zip(before, after, strict=True)]
        differing = self.parallel.all_max(float(equal.count(False)))
        found = f"{len(equal)} tensors, {differing:.0f} of them differ"
        self.say(what, differing == 0, found, "the run could not go on where it was: report this")
        _, old = self.outputs(self.student, batches)
        self.check_sync(batches, new, old)

    def check_sync(self, batches: Sequence[MicroBatch], new: Sequence[HeadOutput], old: Sequence[HeadOutput]) -> None:
        """The sampler's log-probabilities are those of the weights that it was given last."""
        to_new, to_old = self.sampler_difference(batches, new), self.sampler_difference(batches, old)
        self.say(
            "the sampler has the new weights after a sync",
            to_new <= self.limits.logp and to_new < to_old / 2,
            f"{to_new:.2g} from the new (limit {self.limits.logp:g}), {to_old:.2g} from the old",
            "the sampler answers with old weights: the sync does not reach its engine",
        )

    def within(self, what: str, value: float, limit: float, fix: str) -> None:
        self.say(what, value <= limit, f"{value:.2g} (limit {limit:g})", fix)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
