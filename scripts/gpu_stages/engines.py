"""Run `distill check` on the embedded pair, then wake, sync, use and sleep both engines three times."""

from __future__ import annotations

import copy
import re
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace

from gpu_stages.in_process import free_gib, one_rank  # before torch

import torch  # isort: skip
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_cli.engines.base import AnsweringEngine
from distill_cli.engines.companion import CompanionTeacher
from distill_cli.engines.sampler import VllmSampler
from distill_cli.engines.settings import EngineSettings, SamplingSettings
from distill_cli.models.model_files import ASSETS
from gpu_stages.command import BF16, finish, start
from gpu_stages.figures import Stage, StageFailed
from gpu_stages.teachers import planted_teachers, teacher_problem

ROUNDS = 3
TOPK = 64
ROUNDED = 2e-2
"""Largest mean difference of log-probabilities that bfloat16 or TF32 rounding explains."""
EXACT = 1e-4
SHRINK = 0.9
"""Scale the student's weights by this before each sync."""
MEMORY_SHARE = 0.15
"""GPU memory share of each engine; both precisions are checked at the same time."""


def run(stage: Stage) -> None:
    check_pair(stage)
    with one_rank(stage.device):
        for dtype in ("bfloat16",) if stage.rehearse else ("bfloat16", "float32"):
            try:
                sleep_and_sync(stage, dtype)
            except Exception as error:  # go on with the other precision
                traceback.print_exc()
                stage.fail(f"{dtype}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def check_pair(stage: Stage) -> None:
    """Run `distill check` in both precisions at the same time."""
    keys = {"kv_cache_gib": 0.25, "gpu_memory_utilization": MEMORY_SHARE}
    engines = [f"engine.{role}.{key}={value}" for role in ("student", "teacher") for key, value in keys.items()]
    processes = {"float32": start(stage, "check", *engines), "bfloat16": start(stage, "check", *engines, *BF16)}
    for precision, process in processes.items():
        try:
            output = finish(process)
        except StageFailed as error:  # wait for the other check
            stage.fail(f"check in {precision}: {error}")
            continue
        good, bad = (len(re.findall(rf"^{mark}\s", output, re.M)) for mark in ("ok", "bad"))
        stage.record(f"check in {precision}: answers that are right", good, at_least=8, wrong_if_missed=True)
        stage.record(f"check in {precision}: wrong", bad, at_most=0, wrong_if_missed=True)
        for what in ("sampler and trainer agree", "scorer and trainer agree on the teacher"):
            found = re.search(rf"{what}\s+(\S+) \(limit (\S+)\)", output)
            if found:
                stage.record(f"check in {precision}: {what}", float(found[1]), at_most=float(found[2]))


def sleep_and_sync(stage: Stage, dtype: str) -> None:
    """After every sleep the sampler must have the latest weights, and the teacher must score as before."""
    on_gpu = stage.device == "cuda"
    limit = ROUNDED if on_gpu or dtype == "bfloat16" else EXACT
    settings = EngineSettings(
        str(ASSETS / "tiny_pair" / "student"),
        max_model_len=128,
        dtype=dtype,
        kv_cache_bytes=1 << 30 if on_gpu else 64 << 20,
        gpu_memory_utilization=MEMORY_SHARE,
        enforce_eager=True,
        sleep_mode=True,
        kwargs={"skip_tokenizer_init": True},
    )
    sequences, starts = [list(range(3, 3 + length)) for length in (60, 90)], [20, 30]
    free = [free_gib()]
    sampler = VllmSampler(settings)
    sampler.sleep()
    free.append(free_gib())
    scorer = CompanionTeacher(replace(settings, path=str(ASSETS / "tiny_pair" / "teacher")), topk=TOPK)
    first = scorer.score(sequences, response_starts=starts)
    others = scorer.score([ids[::-1] for ids in sequences], response_starts=starts)
    scorer.sleep()
    free.append(free_gib())
    student = AutoModelForCausalLM.from_pretrained(settings.path, dtype=getattr(torch, dtype)).to(stage.device)
    student.requires_grad_(False)
    prompts, waking, problem = real_prompts(), [], None
    for version in range(1, ROUNDS + 1):
        before = copy.deepcopy(student)
        for param in student.parameters():
            param.mul_(SHRINK)
        waking.append(seconds_to_wake(sampler))
        sampler.sync(list(student.named_parameters()), version=version)
        to_new, to_old = sampler_mismatches(sampler, (student, before), prompts)
        stage.record(f"{dtype}: mismatch after sleep and sync {version}", to_new, at_most=limit, wrong_if_missed=True)
        stage.record(f"{dtype}: over that to the weights before", to_new / to_old, at_most=0.5, wrong_if_missed=True)
        sampler.sleep()
        waking.append(seconds_to_wake(scorer))
        problem = problem or teacher_problem(first, scorer.score(sequences, response_starts=starts), limit=limit)
        scorer.sleep()
    if problem:
        stage.fail(f"{dtype}: the teacher after a wake: {problem}")
    planted = planted_teachers(first, others)
    unseen = [name for name, scores in planted.items() if teacher_problem(first, scores, limit=limit) is None]
    stage.record(f"{dtype}: planted wrong teachers not seen", len(unseen), at_most=0, wrong_if_missed=True)
    stage.record(f"{dtype}: longest wake", max(waking), "s")
    if on_gpu:
        stage.record(f"{dtype}: a sleeping sampler keeps", free[0] - free[1], "GiB")
        stage.record(f"{dtype}: a sleeping teacher's process keeps", free[1] - free[2], "GiB")
        stage.record(f"{dtype}: free for training", free_gib(), "GiB")
    scorer.close()
    sampler.close()


def seconds_to_wake(engine: AnsweringEngine) -> float:
    begin = time.perf_counter()
    engine.wake()
    return time.perf_counter() - begin


def sampler_mismatches(
    sampler: VllmSampler, students: Sequence[torch.nn.Module], prompts: Sequence[list[int]]
) -> list[float]:
    """Return mean |log q(sampler) - log q(transformers)| over newly sampled tokens, for each student."""
    samples = sampler.sample(prompts, seeds=range(len(prompts)), sampling=SamplingSettings(max_new_tokens=24))

    def mismatch(student: torch.nn.Module) -> float:
        differences = []
        for prompt, sample in zip(prompts, samples, strict=True):
            ids = torch.tensor([prompt + sample.token_ids], device=student.device)
            logp_TV = student(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1).cpu()
            expected = logp_TV.gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
            differences.append((torch.tensor(sample.logp) - expected).abs())
        return float(torch.cat(differences).mean())

    return [mismatch(student) for student in students]


def real_prompts() -> list[list[int]]:
    """Return addition prompts, which the embedded pair was trained on; on other text rounding errors are larger."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_pair" / "student")
    questions = [[{"role": "user", "content": f"{number} + {number + 19}"}] for number in range(21, 29)]
    return [
        tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False) for question in questions
    ]
