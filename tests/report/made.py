"""Run folders without a run: noisy curves, and recorded answers of random tokens."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from distill_cli.folders.rollouts_table import RolloutsFolder
from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.types import Example, Prompt, Rollout, Sample, TokenViews

WORDS = ("the", " sum", " of", " 7", " and", "\n", " is", "####", "", "<|im_end|>", " carry", "\t", " naïve", " 数")


def make_run(
    folder: Path,
    *,
    num_steps: int = 20,
    num_prompts: int = 4,
    num_tokens: int = 30,
    recorded: Sequence[int] = (0, 20),
    words: Sequence[str] = WORDS,
    config: str = "loss: {kl_type: mixed, topk: 64, kl_weight: 0.5, tail: bucket}\nmodel: {student: {path: s}}\n",
    seed: int = 0,
    slowness: float = 5.0,
) -> RunDir:
    """Write a finished run whose student approaches its teacher."""
    noise = random.Random(seed)
    folder.mkdir(parents=True)
    run = RunDir(folder)
    run.config.write_text(config)
    run.command.write_text("distill loss.topk=64\n")
    rows = [{"step": 0, "time": 0.0, "val/accuracy": 0.3, "val/mean_length": 30.0, "val/teacher_accuracy": 0.95}]
    rows += [metrics(step, noise, slowness=slowness, num_steps=num_steps) for step in range(1, num_steps + 1)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, after, teacher = ({"accuracy": value, "num_samples": 64} for value in (0.3, rows[-1]["val/accuracy"], 0.95))
    ended = {"state": "finished", "reason": None, "num_steps": num_steps, "seconds": 3723.0}
    write_json(run.outcome, {**ended, "before": before, "after": after, "teacher": teacher})
    parts = {"weights": 2**28, "gradients": 2**28, "optimizer": 2**29, "sampler": 2**27}
    write_json(run.resolved, {"memory": {"peak": 3 * 2**29, "asleep": ["sampler"], "parts": parts}})
    for step in recorded:
        answers = [
            make_answer(number, noise, words=words, num_tokens=num_tokens, sharpness=1 + step / 10)
            for number in range(num_prompts)
        ]
        decode = partial(text, words=words)
        rollouts, views = zip(*answers, strict=True)
        folder = RolloutsFolder(run.rollouts, decode, token_text=lambda token: decode([token]))  # noqa: B023
        folder.write(f"step_{step}.parquet", rollouts, views=views)
    return run


def text(ids: Sequence[int], *, words: Sequence[str]) -> str:
    return "".join(words[token % len(words)] + (str(token) if token >= len(words) else "") for token in ids)


def metrics(step: int, noise: random.Random, *, slowness: float, num_steps: int) -> dict[str, float]:
    left = math.exp(-step / slowness)
    wobble = 1 + 0.1 * noise.gauss(0, 1)
    row = {
        "step": step, "time": 1.0 * step, "train/lr": 1e-3, "train/loss": 0.3 * left * wobble + 1e-3,
        "train/grad_norm": 1 + left * wobble, "train/response_tokens": 2000, "train/skipped_updates": 0,
        "train/kl_forward": 0.1 * left * wobble + 1e-3, "train/kl_reverse": 0.3 * left * wobble + 2e-3,
        "train/entropy": 0.02 + 0.01 * left * wobble, "train/teacher_topk_mass": 0.9999,
        "train/student_topk_mass": 1 - 0.004 * left, "train/top1_agreement": 1 - 0.04 * left,
        "rollout/engine_mismatch": 2e-7, "rollout/mean_length": 29 + wobble, "rollout/truncated_rate": 0.02 * left,
        "rollout/accuracy": 0.95 - 0.6 * left, "time/step_s": 0.9, "perf/tokens_per_s": 2000 * wobble,
        "perf/peak_mem_gib": 1.1 + 0.1 * (1 - left), "perf/packing_efficiency": 1.0, "time/sync_s": 0.02,
        "time/sample_s": 0.3 * wobble, "time/score_s": 0.2, "time/pack_s": 0.01, "time/train_s": 0.4 * wobble,
    }  # fmt: skip
    if step % 10 == 0 or step == num_steps:
        row |= {
            "val/accuracy": 0.95 - 0.65 * left,
            "val/mean_length": 29.0,
            "val/truncated_rate": 0.0,
            "time/eval_s": 0.5,
        }
    return row


def make_answer(
    number: int, noise: random.Random, *, words: Sequence[str], num_tokens: int, sharpness: float
) -> tuple[Rollout, TokenViews]:
    tokens = [noise.randrange(200) for _ in range(num_tokens)]
    ids = [
        [noise.randrange(len(words) if noise.random() < 0.5 else 5000) for _ in range(5)] for _ in range(2 * num_tokens)
    ]
    logp = [
        sorted((-sharpness * noise.expovariate(0.5) for _ in range(5)), reverse=True) for _ in range(2 * num_tokens)
    ]
    kl = [noise.expovariate(2 * sharpness) ** 2 for _ in range(num_tokens)]
    views = TokenViews(
        loss=[value / 2 for value in kl],
        kl_forward=kl,
        kl_reverse=[1.5 * value for value in kl],
        entropy=[noise.random() for _ in range(num_tokens)],
        student_logp=[rows[0] for rows in logp[:num_tokens]],
        teacher_logp=[rows[1] for rows in logp[num_tokens:]],
        student_top_ids=ids[:num_tokens],
        student_top_logp=logp[:num_tokens],
        teacher_top_ids=ids[num_tokens:],
        teacher_top_logp=logp[num_tokens:],
    )
    views.kl_forward[1] = float("nan")
    for name in vars(views):  # an observation's token
        getattr(views, name)[5] = [] if "_top_" in name else None
    prompt = Prompt(index=number, token_ids=[number, 1, 2], example=Example("?", "7"))
    sample = Sample(token_ids=tokens, logp=[-1.0] * num_tokens, finish_reason="length" if number == 1 else "stop")
    return Rollout(prompt, sample, reward=float(number % 2)), views
