"""Say in words what a run's metrics show: what holds it back, the number behind each sentence, and the key to turn.

Each rule reads the rows of metrics.jsonl and the config, and returns a sentence or None. A rule that finds no evidence
is silent: a level counts over RECENT steps, a trend only where it is clear (`trend`). The thresholds are this project's
choice; docs/report.md has them. Left out: what a single step shows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from statistics import median
from typing import Any

from distill_cli.metrics import gap_closed

Row = Mapping[str, Any]
"""A row of metrics.jsonl: numbers, or None."""
MIN_STEPS = 3
"""Fewer steps have no verdict."""
MOST_LINES = 4
RECENT = 5
"""Steps at the start or the end whose median is a level."""
WINDOW = 50
"""Last steps that a trend is taken over."""
CLEAR = 1.64
"""Standard deviations of Kendall's S for a clear trend: chance alone gives it in one of twenty series."""


@dataclass(frozen=True)
class Trend:
    """A straight line through a metric's last values."""

    start: float
    end: float
    """The line's values at the first and at the last of the steps."""
    num_steps: int
    is_clear: bool
    """Whether it rises or falls more than chance does."""

    @property
    def growth(self) -> float:
        """Change per step, as a share of the start."""
        return (self.end - self.start) / max(abs(self.start), 1e-12) / self.num_steps


@dataclass(frozen=True)
class Metrics:
    """The steps of a run and its config."""

    rows: Sequence[Row]
    """Without step 0, which comes before training."""
    before: Row
    """Step 0; empty if nothing was measured."""
    config: Mapping[str, Any]
    """Dotted keys."""

    def values(self, key: str) -> list[tuple[int, float]]:
        """Return a metric's values with their steps, where it was recorded."""
        return [(int(row["step"]), float(row[key])) for row in self.rows if row.get(key) is not None]

    def first(self, key: str) -> float | None:
        """Return the median of a metric's first values."""
        found = [value for _, value in self.values(key)[:RECENT]]
        return median(found) if found else None

    def last(self, key: str) -> float | None:
        """Return the median of a metric's last values."""
        found = [value for _, value in self.values(key)[-RECENT:]]
        return median(found) if found else None

    def trend(self, key: str) -> Trend | None:
        """Return the trend of a metric's last WINDOW values; None if there are fewer than MIN_STEPS."""
        return trend(self.values(key)[-WINDOW:])

    @property
    def divergence(self) -> str:
        """The KL that training minimises: `kl_forward`, or `kl_reverse` if the loss has no forward part."""
        return "kl_reverse" if "reverse" in str(self.config.get("loss.kl_type")) else "kl_forward"

    @property
    def samples(self) -> bool:
        """Whether the student's answers are sampled in this run, and not recorded by another."""
        return self.config.get("rollout.replay") is None

    @property
    def length_keys(self) -> str:
        """What to do about long answers: the limit, and the length guard."""
        limit = f"raise rollout.max_new_tokens={self.config.get('rollout.max_new_tokens')}"
        if self.config.get("rollout.environment") is not None:
            return limit
        if (above := self.config.get("rollout.guard_above")) is not None:
            share = self.config.get("rollout.guard_share")
            return f"{limit}, or lower rollout.guard_above={above:g}, or raise rollout.guard_share={share:g}"
        return f"{limit}, or set rollout.guard_above (the teacher then writes a share of the answers)"


def trend(points: Sequence[tuple[int, float]]) -> Trend | None:
    """Return the line with the median slope of all pairs (Theil and Sen); outliers move it little.

    It is clear if Kendall's S, the number of rising pairs less that of falling ones, is CLEAR standard deviations from
    the 0 that it has on average without a trend.
    """
    if len(points) < MIN_STEPS:
        return None
    pairs = [(y - x, b - a) for (x, a), (y, b) in combinations(points, 2)]
    slope = median(rise / run for run, rise in pairs)
    level = median(value - slope * step for step, value in points)
    sign = sum((rise > 0) - (rise < 0) for _, rise in pairs)
    number, (first, last) = len(points), (points[0][0], points[-1][0])
    deviation = sqrt(number * (number - 1) * (2 * number + 5) / 18)
    is_clear = abs(sign) - 1 >= CLEAR * deviation
    return Trend(level + slope * first, level + slope * last, last - first, is_clear)


def verdict(rows: Sequence[Row], config: Mapping[str, Any]) -> list[str]:
    """Return at most MOST_LINES sentences, the most important first; none before MIN_STEPS steps.

    Args:
        rows: of metrics.jsonl.
        config: dotted keys.
    """
    before = next((row for row in rows if row["step"] == 0), {})
    metrics = Metrics([row for row in rows if row["step"] > 0], before, config)
    if len(metrics.rows) < MIN_STEPS:
        return []
    problems = [sentence for rule in RULES if (sentence := rule(metrics)) is not None]
    gain = expected_gain(metrics)
    if not problems:
        problems = [f"Nothing looks wrong in these {len(metrics.rows)} steps."]
    return [*problems, *([gain] if gain else [])][:MOST_LINES]


def truncation(metrics: Metrics) -> str | None:
    """Answers are cut off: ever more of them, or many all along."""
    found, now = metrics.trend("rollout/truncated_rate"), metrics.last("rollout/truncated_rate")
    if found is None or now is None or not metrics.samples:
        return None
    if found.is_clear and found.end >= 0.05 and found.end - found.start >= 0.05:
        rise = f"from {max(found.start, 0):.0%} to {found.end:.0%} in {found.num_steps} steps"
        return f"Answers cut off at their length limit rise {rise}: {metrics.length_keys}."
    if now >= 0.3:
        return f"{now:.0%} of answers are cut off at their length limit: {metrics.length_keys}."
    return None


def growth(metrics: Metrics) -> str | None:
    """Answers grow, and are not cut off yet."""
    found = metrics.trend("rollout/mean_length")
    if found is None or not found.is_clear or not metrics.samples or truncation(metrics):
        return None
    if found.end < 1.1 * found.start:
        return None
    rise = f"{found.growth:.1%} a step, from {found.start:.0f} to {found.end:.0f} tokens in {found.num_steps} steps"
    return f"Answers grow {rise}: {metrics.length_keys}."


def collapse(metrics: Metrics) -> str | None:
    """The student's entropy has fallen far, below the teacher's, and KL does not fall any more."""
    first, now = metrics.first("train/entropy"), metrics.last("train/entropy")
    teacher, kl = metrics.last("train/teacher_entropy"), metrics.trend(f"train/{metrics.divergence}")
    if first is None or now is None or kl is None or len(metrics.rows) < 2 * RECENT:
        return None
    if now > 0.2 * first or (teacher is not None and now > 0.5 * teacher) or (kl.is_clear and kl.end < kl.start):
        return None
    against = "" if teacher is None else f", the teacher has {teacher:.2g}"
    fix = "add a forward term (loss=mixed with a larger loss.kl_weight, or loss=forward), or sample hotter "
    fix += f"(rollout.temperature={metrics.config.get('rollout.temperature')})"
    return f"The student's entropy fell from {first:.2g} to {now:.2g} nats{against}, and KL does not fall: {fix}."


def outside(metrics: Metrics) -> str | None:
    """Much of the student's probability is outside the tokens that the loss compares."""
    mass, support = metrics.last("train/student_topk_mass"), metrics.config.get("loss.support", "teacher")
    if mass is None or mass >= 0.9:
        return None
    topk = f"a larger loss.topk={metrics.config.get('loss.topk')}"
    fix = f"loss.support=union or full, or {topk}" if support in ("teacher", "student") else topk
    if metrics.config.get("loss.tail") == "renormalize":  # docs/findings.md: it lets the rest grow
        fix = f"loss.tail=bucket, {fix}"
    what = f"{1 - mass:.0%} of the student's probability is outside the tokens that loss.support={support} compares"
    return f"{what}: set {fix}."


def unread(metrics: Metrics) -> str | None:
    """A teacher with a tokenizer of its own says nothing of many tokens."""
    found = metrics.last("train/left_out_rate")
    if found is None or found < 0.05:
        return None
    what = f"{found:.0%} of sampled tokens have no loss: the teacher lacks tokens for them, or reads no further"
    return f"{what}; raise engine.teacher.max_model_len, or choose another teacher (docs/cross_tokenizer.md)."


def unteachable(metrics: Metrics) -> str | None:
    """The teacher wants tokens that the student hardly considers."""
    found = metrics.last("probe/teachability")
    if found is None or found >= 0.8:
        return None
    what = f"The teacher gives the student's top-{metrics.config.get('loss.topk')} only {found:.0%} of its probability"
    overlap = metrics.last("probe/topk_overlap")
    what += "" if overlap is None else f" ({overlap:.0%} of both top-k overlap)"
    fix = "warm up on the teacher's answers (rollout.on_policy_fraction=0.5 rollout.off_policy=teacher)"
    return f"{what}: {fix}, or choose a teacher closer to the student (model.teacher.path)."


def agreed(metrics: Metrics) -> str | None:
    """Both models agreed in the first steps, and the teacher is no better where that is measured."""
    agreement, kl = metrics.first("train/top1_agreement"), metrics.first(f"train/{metrics.divergence}")
    if agreement is None or kl is None or agreement < 0.97 or kl > 0.05:
        return None
    student, teacher = metrics.before.get("val/accuracy"), metrics.before.get("val/teacher_accuracy")
    if student is not None and teacher is not None and teacher > student + 0.02:
        return None
    what = f"The student agreed on {agreement:.1%} of tokens from the start (KL {kl:.2g} nats): little to learn"
    return f"{what}; choose a stronger teacher (model.teacher.path) or harder prompts (data.train)."


def clipped(metrics: Metrics) -> str | None:
    """Nearly every gradient is clipped: the length of updates is the clip's, not the gradient's."""
    limit, norms = metrics.config.get("train.max_grad_norm"), [norm for _, norm in metrics.values("train/grad_norm")]
    if limit is None or len(norms) < 2 * RECENT:
        return None
    number = sum(norm > limit for norm in norms)
    if number < 0.9 * len(norms):
        return None
    what = f"The gradient is clipped in {number} of {len(norms)} steps (norm {median(norms):.2g}, train.max_grad_norm"
    return f"{what}={limit:g}): raise train.max_grad_norm, or lower train.lr={metrics.config.get('train.lr'):g}."


def expected_gain(metrics: Metrics) -> str | None:
    """What can be said of the gain: the share of the KL that is gone, and of the gap in accuracy if it is measured.

    The gap before training alone predicts nothing for a teacher that is another model (arXiv 2604.13016), although it
    does in self-distillation (arXiv 2605.30070).
    """
    name, source = metrics.divergence, "of the recorded prompts"
    before, now = metrics.before.get(f"probe/{name}"), metrics.last(f"probe/{name}")
    if before is None or now is None:
        source = "of the sampled answers"
        before, now = metrics.first(f"train/{name}"), metrics.last(f"train/{name}")
    else:
        now = metrics.values(f"probe/{name}")[-1][1]
    found = metrics.trend(f"train/{name}")
    if before is None or now is None or found is None or before <= 0:
        return None
    falls, rises = found.is_clear and found.end < found.start, found.is_clear and found.end > found.start
    fell, numbers = 1 - now / before, f"{name.removeprefix('kl_')} KL {source}: {before:.2g} to {now:.2g} nats"
    if fell < 0.1 and not falls:
        fix = "lower train.lr" if rises else "train on (train.max_steps), or raise train.lr"
        return f"No evidence of a gain yet ({numbers}): {fix}."
    still = ", and it still falls" if falls else ""
    student, teacher = metrics.before.get("val/accuracy"), metrics.before.get("val/teacher_accuracy")
    after = metrics.values("val/accuracy")
    measured = gap_closed(student, after[-1][1] if after else None, teacher)
    if measured is not None:
        done = f"; {measured:.0%} of the gap in accuracy is closed"
    elif student is not None and teacher is not None and teacher > student:
        share = student + max(fell, 0) * (teacher - student)
        done = f"; accuracy {share:.0%} if it follows the KL ({student:.0%} before, the teacher {teacher:.0%})"
    else:
        done = "; what that gains is not measured (data.validation, eval.teacher)"
    return f"{max(fell, 0):.0%} of the KL is gone ({numbers}){still}{done}."


RULES: Sequence[Callable[[Metrics], str | None]] = (
    truncation, growth, collapse, outside, unread, unteachable, agreed, clipped
)  # fmt: skip
"""In the order of importance."""
