"""Every metric of metrics.jsonl, declared once: its meaning, and where and how it is shown. No torch at import time.

The step line, the live panel, the report, the comparison of runs, checkpoint.metric and docs/metrics.md read these
declarations; trackers get every metric. A metric with a formula needs only its declaration: training averages it over
the response tokens of each step. The others are computed in train/.

Shape letters: N response tokens of a micro-batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


SECTIONS = ("accuracy", "divergence", "time", "memory", "lengths")
"""Sections of the report's page with figures of metrics."""
Place = Literal["terminal", "page", "heat map"]
"""A comparison of runs."""


@dataclass(frozen=True)
class Tokens:
    """The input of a formula: both models' predictions at each response token of a micro-batch, detached."""

    kl_forward_N: Tensor
    kl_reverse_N: Tensor
    teacher_mass_N: Tensor
    student_mass_N: Tensor
    """See `HeadOutput`."""
    argmax_N: Tensor
    teacher_argmax_N: Tensor
    """Each model's likeliest token."""
    entropy_N: Tensor
    """The student's entropy over the whole vocabulary."""
    teacher_entropy_N: Tensor
    """See `HeadOutput`."""


@dataclass(frozen=True)
class Figure:
    """A figure of the report: its metrics over the steps. Their unit is the title of the y axis."""

    id: str
    section: str
    """One of SECTIONS."""
    title: str
    log: bool = False
    from_0_to_1: bool = False
    wide: bool = False
    height: int = 180


@dataclass(frozen=True)
class Metric:
    """One key of metrics.jsonl, or a family of keys."""

    name: str
    """A part in angle brackets stands for any name: `val/<dataset>/accuracy`."""
    meaning: str
    unit: str = ""
    """A unit that begins with `share` means a number from 0 to 1, shown as percent."""
    better: Literal["higher", "lower"] | None = None
    formula: Callable[[Tokens], Tensor] | None = None
    """Its value at each token, float [N]; the mean over the step's response tokens is recorded."""
    label: str = ""
    """Its name in tables and figures."""
    number_format: str = ""
    """In tables; empty means one decimal of the percentage for a share, else four significant digits."""
    step_line: str = ""
    """Its part of the line printed after each step."""
    panel: tuple[str, str] | None = None
    """Its row in the live panel (several metrics may share one), and a format of its last `value`, its `first`, its
    `spark` line and, of one of a family, its `name`."""
    figure: Figure | None = None
    series: str = ""
    """Its name in a figure with several metrics; empty means the label."""
    compared_in: tuple[Place, ...] = ()
    """Where its last values are compared between runs."""
    is_total: bool = False
    """Compare its sum over the steps instead."""
    needs: str = ""
    """The config key that it needs to be recorded, unless a replayed run has recorded it."""
    before_training_only: bool = False

    @property
    def is_share(self) -> bool:
        return self.unit.startswith("share")

    @property
    def ranks_checkpoints(self) -> bool:
        """Return whether checkpoint.metric may name it: whether it is known when a step's checkpoint is written."""
        return self.name.startswith(("train/", "rollout/", "val/", "teacher/")) and not self.before_training_only

    def shown(self, value: float | None) -> str:
        """Return a value as tables show it; empty if there is none."""
        return "" if value is None else format(value, self.number_format or (".1%" if self.is_share else ".4g"))

    @property
    def is_family(self) -> bool:
        return "<" in self.name

    def name_in(self, key: str) -> str | None:
        """Return the name of a metric of this family that a key of metrics.jsonl has; None if it is no such key."""
        match = re.fullmatch(re.sub(r"<\w+>", "(.+)", self.name), key)
        return match[1] if match else None

    def covers(self, key: str) -> bool:
        """Return whether a key of metrics.jsonl is this metric, or one of this family."""
        return self.name_in(key) is not None if self.is_family else key == self.name

    def among(self, keys: Iterable[str]) -> list[Metric]:
        """Return this metric, or those of this family, whose keys are among these; a family's series are the names."""
        if not self.is_family:
            return [self] if self.name in keys else []
        names = {key: name for key in keys if (name := self.name_in(key))}
        return [replace(self, name=key, series=name) for key, name in names.items()]


@dataclass(frozen=True)
class Stage:
    """A timed part of a step, recorded as `time/<stage>_s`."""

    meaning: str
    remedy: str = ""
    """The config keys that change its duration."""
    within_step: bool = True
    """Whether time/step_s includes it."""


SAMPLE_S = "roles/sample_s"


# fmt: off
STAGES = {
    "read": Stage("reading a recorded step, in a replay"),
    "wake": Stage("engines free their memory and allocate it again", "engine.student.sleep=false and "
        "engine.teacher.sleep=false, if everything fits into memory together"),
    "sync": Stage("copying the student's weights to its engine",
        "mesh.tensor and engine.student.tensor_parallel set how much is gathered"),
    "sample": Stage("the student samples answers, and the verifier judges them", "rollout.max_new_tokens and "
        "rollout.generations_per_prompt set how much is sampled; more ranks or a larger "
        "engine.student.gpu_memory_utilization sample more at once"),
    "pack": Stage("packing sequences into micro-batches", "train.packing"),
    "score": Stage("the teacher scores the answers, or those that are left when all have ended "
        "(rollout.score_while_sampling)", "engine.teacher.gpu_memory_utilization gives the teacher memory; "
        "engine.teacher.tensor_parallel splits it; model.teacher.quantization makes it smaller"),
    "train": Stage("forward and backward passes, and the optimizer", "train.micro_batch_tokens as large as memory "
        "allows; train.activation_checkpointing=selective or none recomputes less; train.compile=true on GPUs"),
    "handshake": Stage("checking the teachers before the first step", within_step=False),
    "record": Stage("writing metrics, recorded answers and scores", "eval.record_samples", within_step=False),
    "eval": Stage("validation", "eval.period, eval.max_samples and eval.max_new_tokens", within_step=False),
    "checkpoint": Stage("waiting for a checkpoint", "checkpoint.period; checkpoint.async_save=true", within_step=False),
}
"""In the order of a step."""

ACCURACY = Figure("accuracy", "accuracy", "Right answers", from_0_to_1=True, wide=True, height=260)
KL = Figure("kl", "divergence", "KL per token", log=True)
LOSS = Figure("loss", "divergence", "Loss", log=True)
ENTROPY = Figure("entropy", "divergence", "Entropy of both models")
MASS = Figure("mass", "divergence", "Mass on the tokens that are compared")
AGREEMENT = Figure("agreement", "divergence", "Tokens at which both models agree on the likeliest token")
PROBE_KL = Figure("probe_kl", "divergence", "KL per token, always at the same prompts", log=True)
PROBE_OVERLAP = Figure("probe_overlap", "divergence", "Likeliest tokens that both models share, at the same prompts")
TEACHABILITY = Figure("teachability", "divergence", "The teacher's probability of the student's top-k")
TEACHERS_KL = Figure("teachers_kl", "divergence", "KL forward per token, by teacher", log=True)
TEACHERS_AGREEMENT = Figure("teachers_agreement", "divergence", "Agreement on the likeliest token, by teacher")
TEACHERS_ACCURACY = Figure("teachers_accuracy", "accuracy", "Right answers sampled in training, by teacher",
    from_0_to_1=True, wide=True)
ALIGNMENT = Figure("alignment", "divergence", "Tokens that align with the teacher's own", from_0_to_1=True)
GRAD_NORM = Figure("grad_norm", "divergence", "Gradient norm, before clipping")
GRAD_TERMS = Figure("grad_terms", "divergence", "Gradient norm of each term of the loss", log=True)
SIGNALS = Figure("signals", "divergence", "Tokens that weights and clip leave", from_0_to_1=True)
SIGNALS_LOSS = Figure("signals_loss", "divergence", "Divergence that weights and clip leave", from_0_to_1=True)
LENGTH = Figure("length", "lengths", "Tokens per answer")
TRUNCATED = Figure("truncated", "lengths", "Answers cut off at their length limit", from_0_to_1=True)
GUARD = Figure("guard", "lengths", "Answers that the length guard gives to the teacher", from_0_to_1=True)
AGES = Figure("ages", "lengths", "Steps in which answers were written that go on")
SPEED = Figure("speed", "time", "Response tokens per second", wide=True, height=130)
PEAK = Figure("peak", "memory", "Measured peak of a rank", height=150)
SAMPLED, HELD_OUT = "sampled in training", "held out"
ANSWERS, TOKENS, SEQUENCES = "share of answers", "share of tokens", "share of sequences"
EVERYWHERE: tuple[Place, ...] = ("terminal", "page", "heat map")
BY_TEACHER: dict[str, tuple[str, Literal["higher", "lower"]]] = {
    "loss": ("nats", "lower"), "kl_forward": ("nats", "lower"), "kl_reverse": ("nats", "lower"),
    "teacher_topk_mass": ("probability", "higher"), "top1_agreement": (TOKENS, "higher"),
}
"""Metrics train/<name> that are recorded by teacher too, if there are several: unit, and the better direction."""
SHOWN_BY_TEACHER: dict[str, dict[str, Any]] = {
    "kl_forward": {"panel": ("teachers", "{name} {value:.4f}"), "figure": TEACHERS_KL, "label": "KL forward"},
    "top1_agreement": {"figure": TEACHERS_AGREEMENT, "label": "agreement"},
}
"""Where those are shown."""

METRICS = (
    Metric("val/accuracy", "held-out answers that the verifier accepts, at the steps of eval.period",
        ANSWERS, "higher", label="accuracy", step_line="val={:.3f}", figure=ACCURACY, series=HELD_OUT,
        panel=("accuracy", "{value:.1%} held out, {first:.1%} at the start"), compared_in=EVERYWHERE),
    Metric("val/<dataset>/accuracy", "the same for one dataset, if there are several", ANSWERS, "higher",
        needs="data.validation"),
    Metric("val/teacher_accuracy", "the teacher's, measured once before training (eval.teacher)", ANSWERS, "higher",
        panel=("accuracy", "{value:.1%} the teacher"), before_training_only=True),
    Metric("val/mean_length", "mean length of a held-out answer", "tokens", figure=LENGTH, series=HELD_OUT,
        needs="data.validation"),
    Metric("val/truncated_rate", "held-out answers cut off at their length limit", ANSWERS, "lower",
        figure=TRUNCATED, series=HELD_OUT, needs="data.validation"),

    Metric("train/kl_forward", "KL(teacher || student) per token; all tokens outside loss.support are one class",
        "nats", "lower", lambda tokens: tokens.kl_forward_N, "KL forward",
        panel=("KL", "{value:.4f} forward"), figure=KL, series="forward KL(teacher || student)",
        compared_in=EVERYWHERE),
    Metric("train/kl_reverse", "KL(student || teacher) per token, likewise",
        "nats", "lower", lambda tokens: tokens.kl_reverse_N, "KL reverse",
        panel=("KL", "{value:.4f} reverse"), figure=KL, series="reverse KL(student || teacher)",
        compared_in=EVERYWHERE),
    Metric("train/loss", "the loss, by default the divergence of loss.kl_type, a mean over the step's response tokens",
        "nats", "lower",
        label="loss", step_line="loss={:.4f}", panel=("loss", "{value:.4f}  {spark}"), figure=LOSS,
        compared_in=("terminal", "page")),
    Metric("train/entropy", "the student's entropy per token, over the whole vocabulary", "nats",
        formula=lambda tokens: tokens.entropy_N, label="entropy", figure=ENTROPY, series="student",
        compared_in=("terminal", "page")),
    Metric("train/teacher_entropy", "the teacher's entropy per token; where its engine returns only a top-k "
        "(loss.support=teacher), that of the top-k and the rest as one class", "nats",
        formula=lambda tokens: tokens.teacher_entropy_N, figure=ENTROPY, series="teacher"),
    Metric("train/teacher_topk_mass", "the teacher's probability of the tokens of loss.support: by default its own "
        "likeliest", "probability",
        "higher", lambda tokens: tokens.teacher_mass_N, figure=MASS, series="teacher"),
    Metric("train/student_topk_mass", "the student's probability of those tokens", "probability",
        "higher", lambda tokens: tokens.student_mass_N, figure=MASS, series="student"),
    Metric("train/top1_agreement", "tokens at which both models have the same likeliest token", TOKENS, "higher",
        lambda tokens: (tokens.argmax_N == tokens.teacher_argmax_N).float(), "agreement", figure=AGREEMENT),
    Metric("train/grad_norm", "the gradient's norm before clipping, a mean over the step's updates", "norm",
        label="norm", step_line="gnorm={:.2f}", figure=GRAD_NORM),
    Metric("train/grad_norm_divergence", "the gradient's norm of the loss's terms that depend on the teacher, "
        "alone: at the first step and where the run validates, over one update", "norm", needs="loss.reward",
        figure=GRAD_TERMS, series="divergence"),
    Metric("train/grad_norm_advantage", "likewise of those that do not: rewards, penalties", "norm",
        needs="loss.reward", figure=GRAD_TERMS, series="reward and penalty"),
    Metric("train/weighted_tokens", "tokens whose loss.token_weight is above 0", TOKENS, needs="loss.token_weight",
        figure=SIGNALS, series="with a weight"),
    Metric("train/weighted_loss", "what the weights leave of the divergence's sum", "share of the loss",
        needs="loss.token_weight", figure=SIGNALS_LOSS, series="weights"),
    Metric("train/unclipped_tokens", "tokens whose divergence is at most loss.token_clip", TOKENS,
        needs="loss.token_clip", figure=SIGNALS, series="below the clip"),
    Metric("train/unclipped_loss", "what the clip leaves of the divergence's sum", "share of the loss",
        needs="loss.token_clip", figure=SIGNALS_LOSS, series="clip"),
    Metric("train/near_tokens", "sampled tokens whose importance ratio is within loss.max_ratio; the others have no "
        "policy gradient", TOKENS, "higher", needs="loss.policy_gradient"),
    Metric("train/lr", "the learning rate of the step's last update"),
    Metric("train/response_tokens", "tokens with a loss", "tokens", label="tokens", number_format=",.0f",
        compared_in=("terminal", "page"), is_total=True),
    Metric("train/skipped_updates", "updates skipped because loss or gradient were not finite", "updates", "lower"),

    Metric("train/mixture_uncertainty", "probability that may lie in the rest instead of at a token where a row's "
        "teachers are mixed: theirs outside their top-k (teachers.md)", "probability", "lower", needs="model.teachers"),

    Metric("train/aligned_rate", "compared tokens that begin where a token of a teacher with a tokenizer of its own "
        "does; the others begin inside one (cross_tokenizer.md)", TOKENS, "higher", needs="model.teacher.tokenizer",
        label="aligned", figure=ALIGNMENT, series="aligned"),
    Metric("train/residual_mass", "probability of that teacher's likeliest tokens that is no token of the student's: "
        "in the loss's rest class", "probability", "lower", needs="model.teacher.tokenizer", label="residue",
        figure=MASS, series="the teacher's residue"),
    Metric("train/left_out_rate", "sampled tokens of which that teacher says nothing: without loss", TOKENS, "lower",
        needs="model.teacher.tokenizer", label="left out", figure=ALIGNMENT, series="left out"),

    Metric("probe/kl_forward", "train/kl_forward at the prompts of eval.record_samples, which are the same each time",
        "nats", "lower", figure=PROBE_KL, series="forward", needs="eval.record_samples"),
    Metric("probe/kl_reverse", "train/kl_reverse there", "nats", "lower", figure=PROBE_KL, series="reverse",
        needs="eval.record_samples"),
    Metric("probe/entropy", "train/entropy there", "nats", needs="eval.record_samples"),
    Metric("probe/teacher_entropy", "train/teacher_entropy there", "nats", needs="eval.record_samples"),
    Metric("probe/top1_agreement", "train/top1_agreement there", TOKENS, "higher", figure=PROBE_OVERLAP,
        series="likeliest token", needs="eval.record_samples"),
    Metric("probe/topk_overlap", "tokens of the teacher's top-k that are in the student's top-k, there; k is loss.topk "
        "(arXiv 2604.13016)", TOKENS, "higher", figure=PROBE_OVERLAP, series="top-k", needs="eval.record_samples"),
    Metric("probe/teachability", "the teacher's probability of the student's top-k, there; where its engine returns "
        "only a top-k (loss.support=teacher), of the tokens in both, which is at most 1 - train/teacher_topk_mass less "
        "(arXiv 2605.26844)", "probability", "higher", label="teachability", figure=TEACHABILITY,
        needs="eval.record_samples"),

    *(Metric(f"teacher/<name>/{name}", f"train/{name} over the tokens of one of several teachers, or of a mixture of "
        "them (`a+b`)", unit, better, needs="model.teachers", **SHOWN_BY_TEACHER.get(name, {}))
        for name, (unit, better) in BY_TEACHER.items()),
    Metric("teacher/<name>/token_share", "its share of the step's response tokens", TOKENS, needs="model.teachers"),
    Metric("teacher/<name>/rollout_accuracy", "rollout/accuracy of its rows", ANSWERS, "higher",
        label="accuracy", figure=TEACHERS_ACCURACY, needs="model.teachers"),
    Metric("teacher/<name>/val_accuracy", "its accuracy on its held-out rows, measured once before training "
        "(eval.teacher)", ANSWERS, "higher", before_training_only=True, needs="model.teachers"),

    Metric("rollout/accuracy", "the step's sampled answers that the verifier accepts; with rollout.carry_over, as the "
        "next two, of the answers that ended in the step", ANSWERS, "higher",
        step_line="acc={:.3f}", panel=("accuracy", "{value:.1%} sampled"), figure=ACCURACY, series=SAMPLED,
        needs="data.verifier"),
    Metric("rollout/mean_length", "mean length of a sampled answer", "tokens", step_line="len={:.0f}",
        figure=LENGTH, series=SAMPLED),
    Metric("rollout/truncated_rate", "sampled answers cut off at their length limit", ANSWERS, "lower",
        figure=TRUNCATED, series=SAMPLED),
    Metric("rollout/engine_mismatch", "mean difference between the sampler's and the trainer's log-probability of the "
        "sampled tokens: about 1e-7 in float32, 1e-3 in bfloat16. If it grows, the engine does not have the trainer's "
        "weights", "nats", "lower", step_line="mismatch={:.1e}"),
    Metric("rollout/drift", "the same where the student has moved on since it sampled: in a replay, and with "
        "rollout.staleness", "nats", needs="rollout.replay or rollout.staleness"),
    Metric("rollout/carried", "answers that go on in the next step", "answers", needs="rollout.carry_over"),
    Metric("rollout/mean_age", "steps in which they were written so far, on average", "steps",
        figure=AGES, series="mean", needs="rollout.carry_over"),
    Metric("rollout/oldest", "steps in which the oldest of them was written so far", "steps",
        figure=AGES, series="oldest", needs="rollout.carry_over"),
    Metric("rollout/dropped", "answers that were dropped at the beginning of the step, as they had been written in "
        "rollout.max_age steps", "answers", "lower", needs="rollout.max_age"),
    Metric("rollout/on_policy_fraction", "sequences sampled from the student, with rollout.on_policy_fraction below 1",
        SEQUENCES),
    Metric("rollout/guard_share", "answers that the teacher writes for the length guard", ANSWERS,
        label="by the teacher", figure=GUARD, needs="rollout.guard_above"),
    Metric("rollout/mean_turns", "mean number of the student's turns", "turns", needs="rollout.environment"),
    Metric("rollout/turn_limit_rate", "sequences ended by rollout.max_turns", SEQUENCES, "lower",
        needs="rollout.environment"),
    Metric("rollout/verifier_errors", "answers that the verifier could not judge", "answers", "lower",
        needs="data.verifier"),
    Metric("rollout/environment_errors", "sequences whose environment failed", "sequences", "lower",
        needs="rollout.environment"),

    Metric(SAMPLE_S, "seconds in which the ranks that sample wrote the step's sequences", "s", "lower",
        needs="cluster.roles"),
    Metric("perf/tokens_per_s", "response tokens per second", "tokens/s", "higher", label="tokens/s",
        number_format=",.0f", step_line="tok/s={:.0f}", panel=("speed", "{value:,.0f} tokens/s"), figure=SPEED,
        compared_in=("page",)),
    Metric("perf/packing_efficiency", "real tokens over the token slots of the step's micro-batches on all ranks",
        TOKENS, "higher", step_line="packed={:.0%}"),
    Metric("perf/peak_mem_gib", "the largest memory of a rank so far: on a GPU what torch has allocated, on a CPU the "
        "process' resident memory", "GiB", "lower", label="peak", panel=("memory", "{value:.2f} GiB peak of a rank"),
        figure=PEAK),
    Metric("perf/mfu", "model FLOPs of training over the device's peak, if that is known", "share of peak", "higher"),

    Metric("time/step_s", "seconds per step, without validation and checkpoint", "s", "lower", step_line="s={:.2f}",
        panel=("speed", "{value:.2f} s per step")),
    *(Metric(f"time/{name}_s", f"seconds: {stage.meaning}", "s", "lower") for name, stage in STAGES.items()),
)
# fmt: on


def gap_closed(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """Return the share of the way from the student's start to the teacher; None if there was no gap to close."""
    if before is None or after is None or teacher is None or teacher <= before:
        return None
    return (after - before) / (teacher - before)


@cache
def find(key: str) -> Metric | None:
    """Return the metric that a key of metrics.jsonl belongs to."""
    return next((metric for metric in METRICS if metric.covers(key)), None)
