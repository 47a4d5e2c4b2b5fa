"""Compute a run's numbers again from its folder: its config, the tokens that it recorded, and the two models.

Plain transformers in float64, one sequence at a time, softmax over the whole vocabulary, AdamW by hand: nothing here
packs, shards, chunks, or calls an engine. The mathematics is docs/losses.md's, for the `bucket` tail.

Shape letters: R response tokens of one sequence, T of them that are trained, K the teacher's top-k, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill_cli.config.loss_schema import LossConfig
from distill_cli.config.schema import Config
from distill_cli.config.teachers import teacher_configs
from distill_cli.config.variation import load_config
from distill_cli.folders.metrics_file import read_metrics
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
    check_run(finished.run, steps=steps, read_by_teacher=read_by_teacher)


def check_run(run: RunDir, *, steps: int, read_by_teacher: Reader | dict[str, Reader] = list) -> None:
    """The same of a run's folder; that of a replay has the scores of the run that it replays."""
    rows = [row for row in read_metrics(run.metrics) if row["step"] > 0]
    reference = Reference(run, read_by_teacher)
    looked_at = list(zip(rows[:steps], islice(reference.steps(), steps), strict=True))
    assert len(looked_at) == steps
    for row, (expected, differences) in looked_at:
        is_replay = reference.config.rollout.replay is not None
        if is_replay:  # another student sampled
            del differences["sampler"]
        assert max(differences.values()) < 5e-4, (row["step"], differences)
        for name, value in expected.items():
            assert math.isclose(row[name], value, rel_tol=2e-4, abs_tol=2e-6), (row["step"], name, row[name], value)
        assert math.isclose(row["perf/tokens_per_s"] * row["time/step_s"], row["train/response_tokens"], rel_tol=1e-6)
        assert ("rollout/engine_mismatch" in row) == ("sampler" in differences)
        assert row.get("rollout/engine_mismatch", 0.0) < 1e-5
    if steps == len(rows):
        assert reference.distance(run.student) < 1e-5


class Reference:
    """The student as it should be, from one step to the next."""

    def __init__(self, run: RunDir, read_by_teacher: Reader | dict[str, Reader]) -> None:
        self.run, self.config = run, load_config(run.config)
        self.student, self.alone = load(self.config.model.student.path), teacher_configs(self.config)
        self.teachers = [load(one.model.teacher.path) for one in self.alone.values()]
        readers = read_by_teacher if isinstance(read_by_teacher, dict) else dict.fromkeys(self.alone, read_by_teacher)
        self.readers = [readers[name] for name in self.alone]
        replayed = self.config.rollout.replay
        self.scores = run.scores if replayed is None else RunDir(Path(replayed)).scores
        facts = json.loads((self.scores / "recording.json").read_text())
        self.ends, self.from_hidden = facts["merged_eos_ids"], facts["hidden"]
        self.moments = {name: (0.0, 0.0) for name, _ in self.student.named_parameters()}
        self.updates = 0

    def steps(self) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
        """Yield each step's metrics, and the largest differences of recorded log-probabilities from both models'."""
        size, step = self.config.train.global_batch_size, 1
        while (folder := self.scores / f"step_{step}").is_dir():
            rollouts, scores = recorded(folder)
            differences = self.differences(rollouts, scores)
            sums, norms = Counter(), []
            for begin in range(0, len(rollouts), size):
                lr = self.config.train.lr * lr_factor(self.config, self.updates, len(rollouts) // size)
                part = slice(begin, begin + size)
                advantages = advantages_of(self.config, rollouts, part)
                norms.append(self.update(rollouts[part], advantages, lr=lr, sums=sums))
            number = sums.pop("number")
            signals = signal_shares(self.config, sums, number)
            by_teacher = {name: sums.pop(name) for name in list(sums) if name.startswith("teacher/")}
            yield (
                {
                    **{f"train/{name}": total / number for name, total in sums.items()},
                    **means_by_teacher(by_teacher, number),
                    **signals,
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
            if rollout.sample.source == "student":
                logq_R = response_logits(self.student, rollout.prompt.token_ids, rollout).log_softmax(-1).gather(1, ids)
                gap_R = (logq_R[:, 0] - torch.tensor(rollout.sample.logp, dtype=torch.float64))[mask]
                found["sampler"] = max(found["sampler"], float(gap_R.abs().max()))
            if self.from_hidden:
                target = rollout.prompt.targets[0]
                prompt = self.readers[target.teacher](rollout.prompt.token_ids)
                hidden_RH = hidden_states(self.teachers[target.teacher], prompt, rollout)
                gap_RH = hidden_RH - scores.hidden.double()
                found["teacher's hidden states"] = max(found["teacher's hidden states"], float(gap_RH.abs().max()))
                continue
            ids_RK, here = scores.topk_ids.long(), (scores.topk_ids >= 0) & mask[:, None]
            logp_RV, in_topk = self.teacher_topk(rollout)
            gap_RK = logp_RV.gather(1, ids_RK.clamp_min(0)) - scores.topk_logp.double()
            found["teacher"] = max(found["teacher"], float(gap_RK[here].abs().max()))
            found["teacher's ids"] += int((here.sum(-1) != in_topk.sum(-1))[mask].sum())
            own = torch.where(torch.isin(ids, torch.tensor(self.ends)), (self.ends or [0])[0], ids)
            logp_RV = merge_ends(self.teacher_logp(rollout), self.ends)
            gap_R = (logp_RV.gather(1, own)[:, 0] - scores.sampled_logp.double())[mask]
            found["teacher's sampled"] = max(found["teacher's sampled"], float(gap_R.abs().max()))
        return dict(found)

    def update(self, rollouts: list[Rollout], advantages: list[torch.Tensor], *, lr: float, sums: Counter) -> float:
        """One optimizer step; adds up what is reported of its tokens. Returns the gradient's norm."""
        number = sum(int(trained(rollout).sum()) for rollout in rollouts)
        self.student.zero_grad()
        for rollout, advantage_R in zip(rollouts, advantages, strict=True):
            loss_T = self.losses(rollout, advantage_R, sums)
            (loss_T.sum() / number).backward()
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

    def losses(self, rollout: Rollout, advantage_R: torch.Tensor, sums: Counter) -> torch.Tensor:
        """Return the loss of each trained token of the response: [T]."""
        loss, mask = self.loss_of(rollout), trained(rollout)
        raw_RV = response_logits(self.student, rollout.prompt.token_ids, rollout)
        logq_TV = merge_ends((raw_RV / loss.temperature).log_softmax(-1), self.ends)[mask]
        if self.from_hidden:
            logp_TV = merge_ends(self.teacher_logp(rollout), self.ends)[mask]
            compared = {
                "teacher": likeliest(logp_TV, loss.topk),
                "student": likeliest(logq_TV.detach(), loss.topk),
                "full": logp_TV > ABSENT,
            }
            compared["union"] = compared["teacher"] | compared["student"]
            in_support = compared[loss.support.value]
        else:
            logp_RV, in_topk = self.teacher_topk(rollout)
            logp_TV, in_support = logp_RV[mask], in_topk[mask]
        (p, q) = (with_rest(logp, in_support) for logp in (logp_TV, logq_TV))
        divergence_T = divergence(loss, p, q)
        ids_T1 = torch.tensor(rollout.sample.token_ids)[mask][:, None]
        own_T1 = torch.where(torch.isin(ids_T1, torch.tensor(self.ends)), (self.ends or [0])[0], ids_T1)
        with torch.no_grad():
            weight_T = token_weights(loss, logp_TV, logq_TV)
            gap_T = (logp_TV.gather(1, own_T1) - logq_TV.gather(1, own_T1))[:, 0]
        clip = loss.token_clip or math.inf
        loss_T = loss.divergence_weight * weight_T * divergence_T.clamp_max(clip)
        if rollout.sample.source == "student":
            sampler_T = torch.tensor(rollout.sample.logp, dtype=torch.float64)[mask]
            ratio_T = (raw_RV.log_softmax(-1)[mask].gather(1, ids_T1)[:, 0] - sampler_T).exp()
            is_near = (ratio_T <= loss.max_ratio) & (ratio_T >= 1 / loss.max_ratio)
            advantage_T = loss.policy_gradient * weight_T * gap_T.clamp(-clip, clip) + advantage_R[mask]
            loss_T = loss_T - torch.where(is_near, ratio_T, 0.0) * advantage_T
            sums["sampled"] += len(ratio_T)
            sums["near"] += int(is_near.sum())
        else:
            loss_T = loss_T - loss.likelihood * raw_RV.log_softmax(-1)[mask].gather(1, ids_T1)[:, 0]
        with torch.no_grad():
            self.report(rollout, loss_T, p, q, logp_TV, logq_TV, sums)
            sums["below"] += int((divergence_T <= clip).sum())
            sums["weighted"] += int((weight_T > 0).sum())
            sums["whole"] += float(divergence_T.sum())
            sums["clipped"] += float(divergence_T.clamp_max(clip).sum())
            sums["left"] += float((weight_T * divergence_T.clamp_max(clip)).sum())
        return loss_T

    def report(
        self,
        rollout: Rollout,
        loss_T: torch.Tensor,
        p: torch.Tensor,
        q: torch.Tensor,
        logp_TV: torch.Tensor,
        logq_TV: torch.Tensor,
        sums: Counter,
    ) -> None:
        forward, reverse = kl(p, q), kl(q, p)
        sums["loss"] += float(loss_T.sum())
        sums["kl_forward"] += float(forward.sum())
        if len(self.teachers) > 1:
            at = f"teacher/{'+'.join(list(self.alone)[one.teacher] for one in rollout.prompt.targets)}"
            sums[f"{at}/token_share"] += len(loss_T)
            sums[f"{at}/loss"] += float(loss_T.sum())
            sums[f"{at}/kl_forward"] += float(forward.sum())
        sums["kl_reverse"] += float(reverse.sum())
        sums["entropy"] -= float((logq_TV.exp() * logq_TV).sum())
        sums["teacher_topk_mass"] += float(p[:, :-1].sum())
        sums["student_topk_mass"] += float(q[:, :-1].sum())
        sums["top1_agreement"] += int((logq_TV.argmax(-1) == logp_TV.argmax(-1)).sum())

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


def hidden_states(model: PreTrainedModel, prompt: list[int], rollout: Rollout) -> torch.Tensor:
    """float64 [R, H]: what the head reads at the positions that predict the response's tokens."""
    ids = torch.tensor([prompt + rollout.sample.token_ids])
    return model.get_decoder()(ids).last_hidden_state[0, len(prompt) - 1 : -1].double()


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


def likeliest(logp: torch.Tensor, topk: int) -> torch.Tensor:
    """Which tokens are the top-k, without those that were merged into another."""
    return torch.zeros_like(logp, dtype=torch.bool).scatter(1, logp.topk(topk).indices, 1) & (logp > ABSENT)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    log_p, log_q = (x.clamp_min(1e-300).log() for x in (p, q))  # 0 log 0 = 0
    return (p * (log_p - log_q)).sum(-1)


def divergence(loss: LossConfig, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    w, a = 0.5 if loss.kl_weight is None else loss.kl_weight, 0.1 if loss.skew is None else loss.skew
    m = w * p + (1 - w) * q
    return {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "mixed": lambda: w * kl(p, q) + (1 - w) * kl(q, p),
        "jsd": lambda: w * kl(p, m) + (1 - w) * kl(q, m),
        "skew_forward": lambda: kl(p, a * p + (1 - a) * q),
        "skew_reverse": lambda: kl(q, (1 - a) * p + a * q),
    }[loss.kl_type]()


def token_weights(loss: LossConfig, logp_TV: torch.Tensor, logq_TV: torch.Tensor) -> torch.Tensor:
    """The weights of the trained tokens of one response."""
    number = len(logq_TV)
    place_T, threshold = torch.arange(number), 0.5 if loss.min_entropy is None else loss.min_entropy
    first = math.ceil(number * (loss.fraction or 0.3))
    entropy_p, entropy_q = (-(x.exp() * x).sum(-1) for x in (logp_TV, logq_TV))
    kinds = {
        None: torch.ones(number),
        "first_fraction": place_T < first,
        "last_fraction": place_T >= number - first,
        "position": 0.5 ** (place_T / (loss.half_life or 256)),
        "student_entropy": entropy_q >= threshold,
        "teacher_entropy": entropy_p >= threshold,
        "teachability": (logp_TV.exp() * likeliest(logq_TV, min(loss.topk, logq_TV.shape[1]))).sum(-1),
    }
    return kinds[loss.token_weight].double()


def advantages_of(config: Config, rollouts: list[Rollout], part: slice) -> list[torch.Tensor]:
    """Those of an update's answers, [R] each: of rewards within the step, and of penalties within the update."""
    loss, own = config.loss, rollouts[part]
    found = []
    for rollout in own:
        rewards = [one.reward for one in rollouts if one.prompt.index == rollout.prompt.index]
        spread = stdev(rewards) if loss.reward and len(rewards) > 1 else 0.0
        reward = loss.reward * (rollout.reward - fmean(rewards)) / spread if spread else 0.0
        found.append(torch.full((len(rollout.sample.token_ids),), reward, dtype=torch.float64))
    if loss.penalty:
        logp = [torch.tensor(one.sample.logp)[trained(one)] for one in own]
        ordered = torch.cat(logp).sort().values
        limit = ordered[math.ceil(loss.penalty_share * len(ordered)) - 1]
        size = loss.penalty * len(ordered) / int((ordered <= limit).sum())
        for rollout, advantage_R in zip(own, found, strict=True):
            advantage_R -= size * ((torch.tensor(rollout.sample.logp) <= limit) & trained(rollout))
    return found


def signal_shares(config: Config, sums: Counter, number: int) -> dict[str, float]:
    """Take what weights, clip and ratios leave out of `sums`, and return it as the run reports it."""
    names = ("sampled", "near", "below", "weighted", "whole", "clipped", "left")
    sampled, near, below, weighted, whole, clipped, left = (sums.pop(name, 0) for name in names)
    loss, found = config.loss, {}
    if loss.token_weight is not None:
        found |= {"train/weighted_tokens": weighted / number, "train/weighted_loss": left / clipped}
    if loss.token_clip is not None:
        found |= {"train/unclipped_tokens": below / number, "train/unclipped_loss": clipped / whole}
    if loss.policy_gradient or loss.reward or loss.penalty:
        found["train/near_tokens"] = near / sampled
    return found


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
