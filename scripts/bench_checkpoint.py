"""Measure how long a checkpoint stops training, relative to a step: the tiny pair, or given shapes on one rank.

    python scripts/bench_checkpoint.py --tiny             # 40 steps of the default run, a checkpoint every ten
    python scripts/bench_checkpoint.py                    # Qwen2.5-0.5B's shapes: 494 million parameters, float32
    python scripts/bench_checkpoint.py --layers 2 --vocab 4096 --tokens 512

A step of the second kind is one forward and backward pass over `--tokens` tokens with random weights, clipping and
AdamW. A step of the default recipe also samples and scores, and has about a hundred times as many tokens. `stops` is
the time in `Saver.save`, and the time for which the next optimizer update waits for the copy.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from distill_cli.checkpoint.saver import Saver, Trainable
from distill_cli.checkpoint.store import prune
from distill_cli.config.execution_schema import CheckpointConfig
from distill_cli.config.schema import Config
from distill_cli.config.variation import save_config
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective
from distill_cli.parallel.mesh import init_parallel
from distill_cli.rollout.pack import micro_batches, plan_batch
from distill_cli.student import attention
from distill_cli.student.model import Student, wrap
from distill_cli.student.optimizer import build_optimizer, build_schedule, optimizer_step
from distill_cli.types import Example, Prompt, Rollout, Sample, TeacherScores

TOPK = 64


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 24), ("hidden", 896), ("vocab", 151_936), ("tokens", 2048)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--tiny", action="store_true")
    given = arguments.parse_args()
    if given.tiny:
        measure_tiny()
        return
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_RANK": "0"}
    on_gpu = torch.cuda.is_available()
    parallel = init_parallel(device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"))
    attention.register()
    heads = given.hidden // 64
    config = AutoConfig.for_model(
        "qwen2", vocab_size=given.vocab, hidden_size=given.hidden, intermediate_size=given.hidden * 38 // 7,
        num_hidden_layers=given.layers, num_attention_heads=heads, num_key_value_heads=2 if heads % 2 == 0 else 1,
        tie_word_embeddings=True,
    )  # fmt: skip
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).to(parallel.device)
    student = Student(lm, objective=Objective(DistillLoss(kl_type="mixed")))
    wrap(student, parallel, bf16=on_gpu, checkpointing="full")
    optimizer = build_optimizer(student, lr=2e-5)
    schedule = build_schedule(optimizer, num_updates=100)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        save_config(Config(), run.config)
        newest_only = partial(prune, settings=CheckpointConfig(keep_top_k=0))
        saver = Saver(run, Trainable(student.lm, optimizer, schedule), prune=newest_only)
        scored = rollout(given.tokens, given.vocab)
        plan = plan_batch([given.tokens], num_ranks=1, max_tokens=given.tokens, packing=True, multiple=1)

        def train() -> float:
            begin = time.perf_counter()
            batches = micro_batches(plan, [scored[0]], {0: scored[1]}, parallel=parallel)
            optimizer_step(student, optimizer, schedule, batches, max_grad_norm=1.0, parallel=parallel)
            return time.perf_counter() - begin

        train()
        for step in (1, 2, 3):
            step_s, before, begin = train(), saver.stopped_s, time.perf_counter()
            saver.save(step, {"metrics": {}})
            during_s = train()
            stops_s = saver.stopped_s - before
            saver.finish()
            written_s = time.perf_counter() - begin
            size_gib = sum(file.stat().st_size for file in (run.checkpoints / f"step_{step}").iterdir()) / 2**30
            print(
                f"{sum(p.numel() for p in student.parameters()) / 1e6:.0f} M parameters, {size_gib:.2f} GiB: "
                f"a step of {given.tokens} tokens {step_s:.2f} s; a checkpoint stops training for {stops_s:.3f} s "
                f"({stops_s / step_s:.1%}), and is written after {written_s:.2f} s; a step during the writing takes "
                f"{during_s:.2f} s",
                flush=True,
            )
        saver.close()
    dist.destroy_process_group()


def measure_tiny() -> None:
    """Run the command; read the checkpoint times from the main rank's log."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ("train.max_steps=40", "run.name=r", "tracker=none")
        subprocess.run([sys.executable, "-m", "distill_cli", *argv], cwd=folder, check=True, capture_output=True)
        run = RunDir(Path(folder) / "runs/r")
        rows = [row for row in read_metrics(run.metrics) if row["step"] > 0]
        stopped_s = float(re.search(r"stopped training for ([\d.]+) s", run.rank_log(0).read_text())[1])
        step_s, number = median(row["time/step_s"] for row in rows), len(rows) // 10
        print(
            f"the tiny pair: a step {step_s:.2f} s; {number} checkpoints stop training for {stopped_s / number:.4f} s "
            f"each ({stopped_s / number / step_s:.2%} of a step)"
        )


def rollout(num_tokens: int, vocab_size: int) -> tuple[Rollout, TeacherScores]:
    num_prompt = num_tokens // 8
    num_response = num_tokens - num_prompt
    ids = torch.randint(0, vocab_size, (num_tokens,)).tolist()
    top = torch.stack([torch.randperm(vocab_size)[:TOPK] for _ in range(num_response)]).int()
    logp = (torch.randn(num_response, TOPK).log_softmax(-1) - 0.1).sort(-1, descending=True).values
    sample = Sample(ids[num_prompt:], [-1.0] * num_response, "stop")
    return Rollout(Prompt(0, ids[:num_prompt], Example("q")), sample), TeacherScores.of_topk(top, logp, logp[:, 0])


if __name__ == "__main__":
    main()
