"""Every metric of metrics.jsonl, declared once: what it means, and where and how it is shown. No torch at import time.

The step line, the live panel, the report, the comparison of runs, checkpoint.metric and docs/metrics.md read these
declarations; MLflow gets every metric. A metric with a formula needs nothing but its declaration: training averages it
over the response tokens of each step. Any other is computed where its inputs are, in train/.

Shape letters: N response tokens of a micro-batch, K the teacher's top-k, C = K + 1 classes: the top-k, then the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from distill_cli.losses.divergence import forward, reverse

if TYPE_CHECKING:
    from torch import Tensor


SECTIONS = ("accuracy", "divergence", "time", "memory", "lengths")
"""The parts of the report's page that have figures of metrics."""


@dataclass(frozen=True)
class Tokens:
    """What both models say at each response token of a micro-batch, detached: what a formula reads."""

    teacher_logp_NC: Tensor
    student_logp_NC: Tensor
    topk_ids_NK: Tensor
    """The teacher's, the likeliest first."""
    argmax_N: Tensor
    """The student's likeliest token."""
    entropy_N: Tensor
    """The student's, over the whole vocabulary."""
    loss_N: Tensor


@dataclass(frozen=True)
class Figure:
    """A figure of the report: its metrics over the steps. The y axis is named after their unit."""

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
    """A part in angle brackets stands for what only a run knows: `val/<dataset>/accuracy`."""
    meaning: str
    unit: str = ""
    """A unit that begins with `share` is a number from 0 to 1; tables and figures show percent."""
    better: Literal["higher", "lower"] | None = None
    label: str = ""
    """What tables and figures call it."""
    number_format: str = ""
    """In tables; empty is one decimal of the percentage for a share, else four significant digits."""
    formula: Callable[[Tokens], Tensor] | None = None
    """Its value at each token, float [N]. Its mean over the step's response tokens is recorded."""
    step_line: str = ""
    """Its part of the line that is printed after each step."""
    panel: tuple[str, str] | None = None
    """Its row in the live panel, and its part of that row, made of its last `value`, its `first` and its `spark` line.
    Metrics with the same row share it."""
    figure: Figure | None = None
    series: str = ""
    """What a figure with several metrics calls it; empty is the label."""
    compared_in: tuple[Literal["terminal", "page", "heat map"], ...] = ()
    """Where its last value tells runs apart."""
    needs: str = ""
    """The config key without which it is never recorded, unless a replayed run has recorded it."""
    before_training_only: bool = False

    @property
    def is_share(self) -> bool:
        return self.unit.startswith("share")

    @property
    def ranks_checkpoints(self) -> bool:
        """Whether checkpoint.metric may name it: it is known when a step's checkpoint is written."""
        return self.name.startswith(("train/", "rollout/", "val/")) and not self.before_training_only

    def shown(self, value: float | None) -> str:
        """Return a value as tables show it; empty if there is none."""
        return "" if value is None else format(value, self.number_format or (".1%" if self.is_share else ".4g"))

    def covers(self, key: str) -> bool:
        """Whether a key of metrics.jsonl is this metric, or of this family."""
        return re.fullmatch(re.sub(r"<\w+>", ".+", self.name), key) is not None


@dataclass(frozen=True)
class Stage:
    """A part of a step that is timed, as `time/<stage>_s`."""

    meaning: str
    remedy: str = ""
    """The keys that change how long it takes."""
    within_step: bool = True
    """Whether all of it is part of time/step_s."""


# fmt: off
STAGES = {
    "read": Stage("reading a recorded step, in a replay"),
    "wake": Stage("engines give memory back and take it again",
        "engine.student.sleep=false and engine.teacher.sleep=false where all fits in memory together"),
    "sync": Stage("the student's weights go to its engine",
        "mesh.tensor and engine.student.tensor_parallel decide how much is gathered"),
    "sample": Stage("the student answers, and the verifier judges",
        "rollout.max_new_tokens and rollout.generations_per_prompt say how much is written; more ranks, or a larger "
        "engine.student.gpu_memory_utilization, write more at once"),
    "pack": Stage("sequences are laid out in micro-batches", "train.packing"),
    "score": Stage("the teacher scores the answers",
        "engine.teacher.gpu_memory_utilization gives the teacher room; engine.teacher.tensor_parallel splits it; "
        "model.teacher.quantization makes it smaller"),
    "train": Stage("forward and backward passes, and the optimizer",
        "train.micro_batch_tokens as large as memory allows; train.activation_checkpointing=selective or none computes "
        "less twice; train.compile=true on GPUs"),
    "record": Stage("metrics, recorded answers and scores", "eval.record_samples", within_step=False),
    "eval": Stage("validation", "eval.period, eval.max_samples and eval.max_new_tokens", within_step=False),
    "checkpoint": Stage("training waits for a checkpoint", "checkpoint.period; checkpoint.async_save=true",
        within_step=False),
}
"""In the order of a step."""

ACCURACY = Figure("accuracy", "accuracy", "Right answers", from_0_to_1=True, wide=True, height=260)
KL = Figure("kl", "divergence", "KL a token", log=True)
MASS = Figure("mass", "divergence", "Mass on the teacher's top-k")
LENGTH = Figure("length", "lengths", "Tokens of an answer")
TRUNCATED = Figure("truncated", "lengths", "Answers cut off at their length limit", from_0_to_1=True)
SAMPLED, HELD_OUT = "sampled in training", "held out"
EVERYWHERE = ("terminal", "page", "heat map")

METRICS = (
    Metric("val/accuracy", "held-out answers that the verifier calls right, at the steps of eval.period",
        "share of answers", "higher", label="accuracy", step_line="val={:.3f}",
        panel=("accuracy", "{value:.1%} held out, {first:.1%} at the start"),
        figure=ACCURACY, series=HELD_OUT, compared_in=EVERYWHERE),
    Metric("val/<dataset>/accuracy", "the same of one dataset, if there are several", "share of answers", "higher",
        needs="data.validation"),
    Metric("val/teacher_accuracy", "the teacher's, measured once before training (eval.teacher)",
        "share of answers", "higher", panel=("accuracy", "{value:.1%} the teacher"), before_training_only=True),
    Metric("val/mean_length", "mean length of a held-out answer", "tokens", figure=LENGTH, series=HELD_OUT,
        needs="data.validation"),
    Metric("val/truncated_rate", "held-out answers cut off at their length limit",
        "share of answers", "lower", figure=TRUNCATED, series=HELD_OUT, needs="data.validation"),

    Metric("train/kl_forward", "KL(teacher || student) a token; all tokens outside the teacher's top-k are one class",
        "nats", "lower", formula=lambda tokens: forward(tokens.teacher_logp_NC, tokens.student_logp_NC).sum(-1),
        label="KL forward", panel=("KL", "{value:.4f} forward"),
        figure=KL, series="forward KL(teacher || student)", compared_in=EVERYWHERE),
    Metric("train/kl_reverse", "KL(student || teacher) a token, likewise",
        "nats", "lower", formula=lambda tokens: reverse(tokens.teacher_logp_NC, tokens.student_logp_NC).sum(-1),
        label="KL reverse", panel=("KL", "{value:.4f} reverse"),
        figure=KL, series="reverse KL(student || teacher)", compared_in=EVERYWHERE),
    Metric("train/loss", "the divergence of loss.kl_type, a mean over the step's response tokens",
        "nats", "lower", label="loss", step_line="loss={:.4f}", panel=("loss", "{value:.4f}  {spark}"),
        figure=Figure("loss", "divergence", "Loss", log=True), compared_in=("terminal", "page")),
    Metric("train/entropy", "the student's entropy a token, over the whole vocabulary",
        "nats", formula=lambda tokens: tokens.entropy_N,
        label="entropy", figure=Figure("entropy", "divergence", "Entropy of the student")),
    Metric("train/teacher_topk_mass", "the teacher's probability of its own loss.topk likeliest tokens",
        "probability", "higher", formula=lambda tokens: tokens.teacher_logp_NC[:, :-1].exp().sum(-1),
        figure=MASS, series="teacher"),
    Metric("train/student_topk_mass", "the student's probability of those tokens",
        "probability", "higher", formula=lambda tokens: tokens.student_logp_NC[:, :-1].exp().sum(-1),
        figure=MASS, series="student"),
    Metric("train/top1_agreement", "tokens at which both models' likeliest is the same",
        "share of tokens", "higher", formula=lambda tokens: (tokens.argmax_N == tokens.topk_ids_NK[:, 0]).float(),
        label="agreement",
        figure=Figure("agreement", "divergence", "Tokens at which both models' likeliest is the same")),
    Metric("train/grad_norm", "the gradient's norm before it is clipped, a mean over the step's updates",
        "norm", label="norm", step_line="gnorm={:.2f}",
        figure=Figure("grad_norm", "divergence", "Gradient norm, before clipping")),
    Metric("train/lr", "the learning rate of the step's last update"),
    Metric("train/response_tokens", "tokens with a loss", "tokens"),
    Metric("train/skipped_updates", "updates left out since loss or gradient were not finite", "updates", "lower"),

    Metric("rollout/accuracy", "the step's sampled answers that the verifier calls right",
        "share of answers", "higher", step_line="acc={:.3f}", panel=("accuracy", "{value:.1%} sampled"),
        figure=ACCURACY, series=SAMPLED, needs="data.verifier"),
    Metric("rollout/mean_length", "mean length of a sampled answer",
        "tokens", step_line="len={:.0f}", figure=LENGTH, series=SAMPLED),
    Metric("rollout/truncated_rate", "sampled answers cut off at their length limit",
        "share of answers", "lower", figure=TRUNCATED, series=SAMPLED),
    Metric("rollout/engine_mismatch", "mean difference between the sampler's and the trainer's log-probability of the "
        "sampled tokens: about 1e-7 in float32, 1e-3 in bfloat16. If it grows, the engine does not have the trainer's "
        "weights", "nats", "lower", step_line="mismatch={:.1e}"),
    Metric("rollout/drift", "the same in a replay: how far the student is from the one that was recorded", "nats",
        needs="rollout.replay"),
    Metric("rollout/on_policy_fraction", "sequences that the student wrote, with rollout.on_policy_fraction below 1",
        "share of sequences"),
    Metric("rollout/mean_turns", "mean number of the student's turns", "turns", needs="rollout.environment"),
    Metric("rollout/turn_limit_rate", "sequences ended by rollout.max_turns", "share of sequences", "lower",
        needs="rollout.environment"),
    Metric("rollout/verifier_errors", "answers that the verifier could not judge", "answers", "lower",
        needs="data.verifier"),
    Metric("rollout/environment_errors", "sequences whose environment failed", "sequences", "lower",
        needs="rollout.environment"),

    Metric("perf/tokens_per_s", "response tokens a second",
        "tokens/s", "higher", label="tokens/s", number_format=",.0f",
        step_line="tok/s={:.0f}", panel=("speed", "{value:,.0f} tokens/s"),
        figure=Figure("speed", "time", "Response tokens a second", wide=True, height=130), compared_in=("page",)),
    Metric("perf/packing_efficiency", "real tokens over those that the ranks could have computed meanwhile",
        "share of tokens", "higher", step_line="packed={:.0%}"),
    Metric("perf/peak_mem_gib", "the largest memory of a rank so far: what torch has allocated on a GPU, the process' "
        "resident memory on a CPU", "GiB", "lower", label="peak", panel=("memory", "{value:.2f} GiB of a rank at most"),
        figure=Figure("peak", "memory", "Measured peak of a rank", height=150)),
    Metric("perf/mfu", "model FLOPs of training over the device's peak, if that is known", "share of peak", "higher"),

    Metric("time/step_s", "seconds of the step, without validation and checkpoint",
        "s", "lower", step_line="s={:.2f}", panel=("speed", "{value:.2f} s a step")),
    *(Metric(f"time/{name}_s", f"seconds: {stage.meaning}", "s", "lower") for name, stage in STAGES.items()),
)
# fmt: on

_BY_NAME = {metric.name: metric for metric in METRICS}


def gap_closed(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """Return the share of the way from the student's start to the teacher; None if there was no gap to close."""
    if before is None or after is None or teacher is None or teacher <= before:
        return None
    return (after - before) / (teacher - before)


def find(key: str) -> Metric | None:
    """Return the metric that a key of metrics.jsonl belongs to."""
    return _BY_NAME.get(key) or next((metric for metric in METRICS if "<" in metric.name and metric.covers(key)), None)
