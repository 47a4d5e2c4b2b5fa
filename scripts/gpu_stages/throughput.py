"""Measure sampling, scoring and sync at 1.7B and 4B against bare vLLM.

Bare sampling is the same engine's `generate` without log-probabilities and seeds; bare scoring is its prefill without
log-probabilities. As in a run the teacher has its own process; its bare prefill is measured in this one. It runs
eagerly: CUDA graphs and compilation take minutes and hardly speed up prefills.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from gpu_stages.in_process import one_rank  # before torch

import torch  # isort: skip
from safetensors import safe_open
from vllm import SamplingParams

from distill_cli.engines.base import AnsweringEngine
from distill_cli.engines.companion import CompanionTeacher
from distill_cli.engines.engine import request_params
from distill_cli.engines.sampler import VllmSampler
from distill_cli.engines.settings import EngineSettings, SamplingSettings
from distill_cli.engines.teacher import VllmTeacher
from gpu_stages.figures import Stage
from gpu_stages.shapes import make_pair
from gpu_stages.timing import alternating_seconds, median_seconds, most_expensive


def run(stage: Stage) -> None:
    student, teacher = make_pair(stage.scratch, device=stage.device, rehearse=stage.rehearse)
    settings = EngineSettings(
        str(student),
        max_model_len=128 if stage.rehearse else 1024,
        gpu_memory_utilization=0.3,
        kv_cache_bytes=64 << 20 if stage.rehearse else None,
        sleep_mode=True,
    )
    with one_rank(stage.device):
        sampling(stage, settings, student)
        scoring(stage, settings, str(teacher))


def sampling(stage: Stage, settings: EngineSettings, folder: Path) -> None:
    prompts, new_tokens = words(4, 16) if stage.rehearse else words(64, 128), 16 if stage.rehearse else 512
    sampler = VllmSampler(settings)
    wanted = SamplingSettings(max_new_tokens=new_tokens, ignore_eos=True)
    plain = SamplingParams(max_tokens=new_tokens, temperature=1.0, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    seconds = alternating_seconds(
        {
            "bare": lambda: sampler.llm.generate(inputs, plain, use_tqdm=False),
            "ours": lambda: sampler.sample(prompts, seeds=range(len(prompts)), sampling=wanted),
        },
        device=stage.device,
        rounds=3,
    )
    number = len(prompts) * new_tokens
    stage.record("sampling, 1.7B", number / seconds["ours"], "tokens/s")
    stage.record("bare generate", number / seconds["bare"], "tokens/s")
    stage.record("sampling, of bare generate", seconds["bare"] / seconds["ours"] * 100, "%", at_least=95)
    weights = master_weights(folder, device=stage.device)
    copied = seconds_to_copy(weights, device=stage.device)
    sync = median_seconds(lambda: sampler.sync(weights.items(), version=1), device=stage.device, rounds=3)
    stage.record("sync, 1.7B", sync, "s")
    stage.record("a copy of its weights into bfloat16", copied, "s")
    stage.record("sync over a copy", sync / copied, "copies", at_most=3)
    sleep_and_wake(stage, "sampler", sampler)
    sampler.close()


def scoring(stage: Stage, settings: EngineSettings, path: str) -> None:
    sequences = words(4, 64) if stage.rehearse else words(64, 640)
    starts, topk = [len(sequences[0]) // 5] * len(sequences), 16 if stage.rehearse else 64
    number = sum(len(ids) for ids in sequences)
    teacher = replace(settings, path=path, enforce_eager=True)
    local = VllmTeacher(replace(teacher, sleep_mode=False), topk=topk)
    params = [request_params(max_tokens=1, temperature=0.0, detokenize=False)] * len(sequences)

    def local_score() -> None:
        local.score(sequences, response_starts=starts)

    seconds = alternating_seconds(
        {
            "bare": lambda: local.generate(sequences, params),
            "ours": local_score,
        },
        device=stage.device,
        rounds=3,
    )
    stage.table("kernels of scoring", most_expensive(local_score, device=stage.device))
    local.close()
    stage.record("scoring in this process, 4B", number / seconds["ours"], "tokens/s")
    stage.record("bare prefill", number / seconds["bare"], "tokens/s")
    stage.record("scoring, of bare prefill", seconds["bare"] / seconds["ours"] * 100, "%", at_least=95)
    companion = CompanionTeacher(teacher, topk=topk)
    apart = median_seconds(
        lambda: companion.score(sequences, response_starts=starts), device=stage.device, rounds=3, warmup=1
    )
    stage.record("scoring in its own process, of bare prefill", seconds["bare"] / apart * 100, "%", at_least=95)
    sleep_and_wake(stage, "teacher", companion)
    companion.close()


def sleep_and_wake(stage: Stage, who: str, engine: AnsweringEngine) -> None:
    for number in range(2):  # the first round pins host memory
        begin = time.perf_counter()
        engine.sleep()
        asleep = time.perf_counter()
        engine.wake()
        if number:
            stage.record(f"{who}: to sleep", asleep - begin, "s")
            stage.record(f"{who}: to wake", time.perf_counter() - asleep, "s")


def seconds_to_copy(weights: dict[str, torch.Tensor], *, device: str) -> float:
    """Return the seconds to copy all weights into existing bfloat16 tensors: the least that a sync can take."""
    low = {name: torch.empty_like(tensor, dtype=torch.bfloat16) for name, tensor in weights.items()}

    def copy() -> None:
        for name, tensor in weights.items():
            low[name].copy_(tensor)

    return median_seconds(copy, device=device, rounds=3)


def words(number: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, 500, (number, length), generator=generator).tolist()


def master_weights(folder: Path, *, device: str) -> dict[str, torch.Tensor]:
    """Return the folder's weights in float32, as the trainer holds them."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
            weights |= {name: content.get_tensor(name).to(device, torch.float32) for name in names}
    return weights
