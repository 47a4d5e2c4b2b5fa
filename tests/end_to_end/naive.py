"""Compute a run's numbers again from its folder: its config, the tokens that it recorded, and the two models.

Plain transformers in float64, one sequence at a time, softmax over the whole vocabulary, AdamW by hand: nothing here
packs, shards, chunks, or calls an engine. The mathematics is docs/losses.md's, for `loss=mixed` and the `bucket` tail.

Shape letters: R response tokens of one sequence, K the teacher's top-k, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill_cli.config.schema import Config, LossConfig
from distill_cli.config.teachers import teacher_configs
from distill_cli.config.variation import load_config
from distill_cli.folders.run_dir import RunDir
from distill_cli.models.model_files import locate
from distill_cli.rollout.score_files import read_scores, read_sequences
from distill_cli.types import Rollout, Target, TeacherScores
from tests.end_to_end.conftest import Finished

Reader = Callable[[list[int]], list[int]]
ABSENT = -1e4
"""Log-probability of what cannot be."""


def check_numbers(finished: Finished, *, steps: int, read_by_teacher: Reader | dict[str, Reader] = list) -> None:
    """Assert that the first steps' metrics, and the engines' log-probabilities, are those of the reference.

    Args:
        read_by_teacher: makes the teacher's prompt of the student's; of several teachers one for each name.
    """
    rows = [row for row in finished.metrics if row["step"] > 0]
    reference = Reference(finished.run, read_by_teacher)
    looked_at = list(zip(rows[:steps], islice(reference.steps(), steps), strict=True))
    assert len(looked_at) == steps
    for row, (expected, differences) in looked_at:
        assert max(differences.values()) < 5e-4, (row["step"], differences)
        for name, value in expected.items():
            assert math.isclose(row[name], value, rel_tol=2e-4, abs_tol=2e-6), (row["step"], name, row[name], value)
        assert math.isclose(row["perf/tokens_per_s"] * row["time/step_s"], row["train/response_tokens"], rel_tol=1e-6)
        assert ("rollout/engine_mismatch" in row) == ("sampler" in differences)
        assert row.get("rollout/engine_mismatch", 0.0) < 1e-5
    if steps == len(rows):
        assert reference.distance(finished.run.student) < 1e-5


class Reference:
    """The student as it should be, from one step to the next."""

    def __init__(self, run: RunDir, read_by_teacher: Reader | dict[str, Reader]) -> None:
        self.run, self.config = run, load_config(run.config)
        self.student, self.alone = load(self.config.model.student.path), teacher_configs(self.config)
        self.teachers = [load(one.model.teacher.path) for one in self.alone.values()]
        readers = read_by_teacher if isinstance(read_by_teacher, dict) else dict.fromkeys(self.alone, read_by_teacher)
        self.readers = [readers[name] for name in self.alone]
        self.ends = json.loads((run.scores / "recording.json").read_text())["merged_eos_ids"]
        self.moments = {name: (0.0, 0.0) for name, _ in self.student.named_parameters()}
        self.updates = 0

    def steps(self) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
        """Yield each step's metrics, and the largest differences of recorded log-probabilities from both models'."""
        size, step = self.config.train.global_batch_size, 1
        while (folder := self.run.scores / f"step_{step}").is_dir():
            rollouts, scores = recorded(folder)
            differences = self.differences(rollouts, scores)
            sums, norms = Counter(), []
            for begin in range(0, len(rollouts), size):
                lr = self.config.train.lr * lr_factor(self.config, self.updates, len(rollouts) // size)
                norms.append(self.update(rollouts[begin : begin + size], lr=lr, sums=sums))
            number = sums.pop("number")
            by_teacher = {name: sums.pop(name) for name in list(sums) if name.startswith("teacher/")}
            yield (
                {
                    **{f"train/{name}": total / number for name, total in sums.items()},
                    **means_by_teacher(by_teacher, number),
                    "train/response_tokens": number,
                    "train/grad_norm": fmean(norms),
                    "train/lr": lr,
                    **of_answers(rollouts),
                },
                differences,
            )
            step += 1

    @torch.no_grad()
    def differences(self, rollouts: list[Rollout], scores_of: list[TeacherScores]) -> dict[str, float]:
        """Return the largest differences between the engines' and the models' log-probabilities at trained tokens."""
        found: dict[str, float] = defaultdict(float)
        for rollout, scores in zip(rollouts, scores_of, strict=True):
            mask = trained(rollout)
            ids = torch.tensor(rollout.sample.token_ids)[:, None]
            ids_RK, here = scores.topk_ids.long(), (scores.topk_ids >= 0) & mask[:, None]
            logp_RV, in_topk = self.teacher_topk(rollout)
            gap_RK = logp_RV.gather(1, ids_RK.clamp_min(0)) - scores.topk_logp.double()
            found["teacher"] = max(found["teacher"], float(gap_RK[here].abs().max()))
            found["teacher's ids"] += int((here.sum(-1) != in_topk.sum(-1))[mask].sum())
            own = torch.where(torch.isin(ids, torch.tensor(self.ends)), (self.ends or [0])[0], ids)
            logp_RV = merge_ends(self.teacher_logp(rollout), self.ends)
            gap_R = (logp_RV.gather(1, own)[:, 0] - scores.sampled_logp.double())[mask]
            found["teacher's sampled"] = max(found["teacher's sampled"], float(gap_R.abs().max()))
            if rollout.sample.source == "student":
                logq_R = response_logits(self.student, rollout.prompt.token_ids, rollout).log_softmax(-1).gather(1, ids)
                gap_R = (logq_R[:, 0] - torch.tensor(rollout.sample.logp, dtype=torch.float64))[mask]
                found["sampler"] = max(found["sampler"], float(gap_R.abs().max()))
        return dict(found)

    def update(self, rollouts: list[Rollout], *, lr: float, sums: Counter) -> float:
        """One optimizer step; adds up what is reported of its tokens. Returns the gradient's norm."""
        number = sum(int(trained(rollout).sum()) for rollout in rollouts)
        self.student.zero_grad()
        for rollout in rollouts:
            loss_R = self.losses(rollout, sums)
            (loss_R.sum() / number).backward()
        sums["number"] += number
        params = dict(self.student.named_parameters())
        norm = math.sqrt(sum(float(param.grad.square().sum()) for param in params.values()))
        settings, scale = self.config.train, min(1.0, self.config.train.max_grad_norm / (norm + 1e-6))
        self.updates += 1
        (beta1, beta2), at = settings.betas, self.updates
        with torch.no_grad():
            for name, param in params.items():
                first, second = self.moments[name]
                grad = param.grad * scale
                first, second = beta1 * first + (1 - beta1) * grad, beta2 * second + (1 - beta2) * grad.square()
                self.moments[name] = first, second
                param *= 1 - lr * settings.weight_decay * (param.ndim > 1)  # norms do not decay
                param -= lr * first / (1 - beta1**at) / ((second / (1 - beta2**at)).sqrt() + settings.eps)
        return norm

    def losses(self, rollout: Rollout, sums: Counter) -> torch.Tensor:
        """Return the loss of each trained token of the response."""
        loss, mask = self.loss_of(rollout), trained(rollout)
        logits_RV = response_logits(self.student, rollout.prompt.token_ids, rollout) / loss.temperature
        logq_RV = merge_ends(logits_RV.log_softmax(-1), self.ends)[mask]
        logp_RV, in_topk = self.teacher_topk(rollout)
        logp_RV, in_topk = logp_RV[mask], in_topk[mask]
        (p, q) = (with_rest(logp, in_topk) for logp in (logp_RV, logq_RV))
        log_p, log_q = (x.clamp_min(1e-300).log() for x in (p, q))  # 0 log 0 = 0
        forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
        loss_R = loss.kl_weight * forward + (1 - loss.kl_weight) * reverse
        with torch.no_grad():
            sums["loss"] += float(loss_R.sum())
            sums["kl_forward"] += float(forward.sum())
            if len(self.teachers) > 1:
                at = f"teacher/{'+'.join(list(self.alone)[one.teacher] for one in rollout.prompt.targets)}"
                sums[f"{at}/token_share"] += len(loss_R)
                sums[f"{at}/loss"] += float(loss_R.sum())
                sums[f"{at}/kl_forward"] += float(forward.sum())
            sums["kl_reverse"] += float(reverse.sum())
            sums["entropy"] -= float((logq_RV.exp() * logq_RV).sum())
            sums["teacher_topk_mass"] += float(p[:, :-1].sum())
            sums["student_topk_mass"] += float(q[:, :-1].sum())
            sums["top1_agreement"] += int((logq_RV.argmax(-1) == logp_RV.argmax(-1)).sum())
        return loss_R

    def loss_of(self, rollout: Rollout) -> LossConfig:
        """A teacher's own loss; the run's if several are mixed."""
        target, *others = rollout.prompt.targets
        return self.config.loss if others else list(self.alone.values())[target.teacher].loss

    @torch.no_grad()
    def logp_of(self, target: Target, rollout: Rollout) -> torch.Tensor:
        prompt = self.readers[target.teacher](rollout.prompt.token_ids)
        logits_RV = response_logits(self.teachers[target.teacher], prompt, rollout)
        return (logits_RV / self.loss_of(rollout).temperature).log_softmax(-1)

    def teacher_logp(self, rollout: Rollout) -> torch.Tensor:
        parts = [self.logp_of(target, rollout) + math.log(target.weight) for target in rollout.prompt.targets]
        return torch.stack(parts).logsumexp(0)

    def teacher_topk(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [R, V], and which of them are the top-k: of a mixture that of all teachers' top-k."""
        targets = rollout.prompt.targets
        parts = [self.topk_of(target, rollout) for target in targets]
        if len(parts) == 1:
            return parts[0]
        weights = [target.weight for target in targets]
        p_RV = sum(w * logp_RV.exp() * in_topk for w, (logp_RV, in_topk) in zip(weights, parts, strict=True))
        in_topk = torch.zeros_like(p_RV, dtype=torch.bool).scatter(1, p_RV.topk(self.config.loss.topk).indices, 1)
        return p_RV.clamp_min(1e-300).log(), in_topk & (p_RV > 0)

    def topk_of(self, target: Target, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of one teacher: one class of those ends that are."""
        logp_RV = self.logp_of(target, rollout)
        in_topk = torch.zeros_like(logp_RV, dtype=torch.bool).scatter(1, logp_RV.topk(self.config.loss.topk).indices, 1)
        if self.ends:
            logp_RV[:, self.ends] = logp_RV[:, self.ends].masked_fill(~in_topk[:, self.ends], ABSENT)
            logp_RV, any_end = merge_ends(logp_RV, self.ends), in_topk[:, self.ends].any(-1)
            in_topk[:, self.ends] = False
            in_topk[:, self.ends[0]] = any_end
        return logp_RV, in_topk

    @torch.no_grad()
    def distance(self, folder: Path) -> float:
        """The largest difference of a parameter from the folder's, where parameters have moved by about the lr."""
        other = dict(load(str(folder)).named_parameters())
        return max(float((param - other[name]).abs().max()) for name, param in self.student.named_parameters())


def load(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(locate(path, key="path"), dtype=torch.float64)


def recorded(folder: Path) -> tuple[list[Rollout], list[TeacherScores]]:
    """The sequences of a step and their scores, in its order."""
    sequences, scores = {}, {}
    for file in folder.glob("*.safetensors"):
        mine = read_sequences(file)
        sequences |= mine
        scores |= read_scores(file, set(mine), topk=10**6)
    return [sequences[place] for place in range(len(sequences))], [scores[place] for place in range(len(scores))]


def trained(rollout: Rollout) -> torch.Tensor:
    sample = rollout.sample
    return torch.tensor(sample.trained or [True] * len(sample.token_ids))


def response_logits(model: PreTrainedModel, prompt: list[int], rollout: Rollout) -> torch.Tensor:
    """float64 [R, V]: at the positions that predict the response's tokens."""
    return model(torch.tensor([prompt + rollout.sample.token_ids])).logits[0, len(prompt) - 1 : -1].double()


def merge_ends(logp_RV: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """The tokens as one, under the first one's id."""
    if not ids:
        return logp_RV
    together = logp_RV[:, ids].logsumexp(-1, keepdim=True)
    others = torch.full((len(logp_RV), len(ids) - 1), ABSENT, dtype=logp_RV.dtype)
    index = torch.tensor(ids).expand(len(logp_RV), -1)
    return logp_RV.scatter(1, index, torch.cat([together, others], -1))


def with_rest(logp_RV: torch.Tensor, in_topk: torch.Tensor) -> torch.Tensor:
    """Probabilities [R, V + 1]: of the top-k, 0 for others, and what is left to these together."""
    p_RV = logp_RV.exp() * in_topk
    return torch.cat([p_RV, 1 - p_RV.sum(-1, keepdim=True)], -1)


def means_by_teacher(sums: dict[str, float], number: int) -> dict[str, float]:
    """Return each teacher's means over its own tokens, and its share of all `number` tokens."""
    own = {name: sums[f"{name.rpartition('/')[0]}/token_share"] for name in sums}
    return {name: total / (number if name.endswith("share") else own[name]) for name, total in sums.items()}


def lr_factor(config: Config, update: int, updates_per_step: int) -> float:
    """Return the factor of `train.schedule=cosine` at an update, counted from 0."""
    warmup, total = config.train.warmup_updates, config.train.max_steps * updates_per_step
    if update < warmup:
        return (update + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (update - warmup) / (total - warmup)))


def of_answers(rollouts: list[Rollout]) -> dict[str, float]:
    """Return the metrics of the student's own answers, or of all answers if none is its own."""
    rollouts = [one for one in rollouts if one.sample.source == "student"] or rollouts
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    return {
        "rollout/mean_length": fmean(int(trained(rollout).sum()) for rollout in rollouts),
        "rollout/truncated_rate": fmean(rollout.sample.finish_reason == "length" for rollout in rollouts),
        **({"rollout/accuracy": fmean(rewards)} if rewards else {}),
    }
