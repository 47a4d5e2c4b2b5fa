"""Compare packing and training with the bare forward and backward pass of the same model on the same tokens.

    python scripts/bench_train.py [FOLDER] [--prompts 32] [--prompt-tokens 15] [--tokens 24 34] [--threads 1]
    torchrun --nproc-per-node=2 scripts/bench_train.py ...        # each rank with `--prompts` sequences of its own

*ours* is everything between scored answers and the next step: packing, forward and backward with the loss, clipping,
the optimizer, and the ranks' collectives. *bare* is transformers' own model with SDPA on the sequences as a padded
batch: the forward pass, the mean cross-entropy of the responses, the backward pass; without optimizer or collectives.
Both in turns, medians over rounds; every round has other lengths.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective
from distill_cli.models.model_files import ASSETS
from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.rollout.pack import lay_out, plan_batch
from distill_cli.student.model import Student, build_lm, wrap
from distill_cli.student.optimizer import build_optimizer, build_schedule, optimizer_step
from distill_cli.student.weights import load_weights
from distill_cli.types import Example, Prompt, Rollout, Sample, TeacherScores

TOPK = 64


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    parallel = layout(device=torch.device("cpu"))
    bare_lm = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="sdpa")
    ours, bare = trainer(arguments.model, parallel), bare_pass(bare_lm.train())
    generator, seconds = torch.Generator().manual_seed(0), ([], [])
    for number in range(2 * arguments.rounds):
        sequences = [made_up(arguments, bare_lm.config.vocab_size, generator) for _ in range(arguments.prompts)]
        dist.barrier()
        for found, one in zip(seconds, (ours, bare), strict=True):
            begin = time.perf_counter()
            one(sequences)
            if number >= arguments.rounds:  # the first half warms up
                found.append(time.perf_counter() - begin)
            dist.barrier()
    if parallel.is_main:
        tokens = arguments.prompts * (arguments.prompt_tokens + sum(arguments.tokens) / 2)
        print(f"{parallel.size} ranks of {arguments.threads} threads, about {tokens:.0f} tokens a rank")
        mine, plain = map(median, seconds)
        print(f"pack and train {mine:.4f} s, bare {plain:.4f} s: {mine / plain:.2f} times")
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ASSETS / "tiny_pair" / "student")
    parser.add_argument("--prompts", type=int, default=32, help="sequences of a rank")
    parser.add_argument("--prompt-tokens", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs=2, default=(24, 34), help="fewest and most of an answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    return parser.parse_args()


Scored = tuple[Rollout, TeacherScores]


def made_up(arguments: argparse.Namespace, vocab: int, generator: torch.Generator) -> Scored:
    """Return a sequence of random tokens and random scores of its response."""
    fewest, most = arguments.tokens
    length = int(torch.randint(fewest, most + 1, (), generator=generator))
    prompt, answer = (torch.randint(0, vocab, (n,), generator=generator) for n in (arguments.prompt_tokens, length))
    logp, top = torch.randn(length, min(vocab, 4 * TOPK), generator=generator).log_softmax(-1).topk(TOPK)
    rollout = Rollout(Prompt(0, prompt.tolist(), Example("q")), Sample(answer.tolist(), [-1.0] * length, "stop"))
    return rollout, TeacherScores.of_topk(top.int(), logp, logp[:, 0])


def trainer(folder: Path, parallel: Parallel) -> Callable[[list[Scored]], None]:
    """Return an update of the student by sequences of this rank."""
    lm, published = build_lm(folder)
    load_weights(lm, published, device=parallel.device)
    student = Student(lm, objective=Objective(DistillLoss(kl_type="mixed")), parallel=parallel)
    wrap(student, parallel, bf16=False, checkpointing="none", compile=False, cpu_offload=False)
    optimizer = build_optimizer(student, lr=1e-4)
    schedule = build_schedule(optimizer, warmup_updates=0, num_updates=10_000)

    def update(sequences: list[Scored]) -> None:
        rollouts, scores = zip(*sequences, strict=True)
        plan = plan_batch([len(rollout.token_ids) for rollout in rollouts], num_ranks=1, max_tokens=16384)
        batches = [lay_out(row, rollouts, dict(enumerate(scores))) for row in plan.rows[0]]
        optimizer_step(student, optimizer, schedule, batches, max_grad_norm=1.0, parallel=parallel)

    return update


def bare_pass(lm: PreTrainedModel) -> Callable[[list[Scored]], None]:
    """Return the forward and backward pass of a plain model."""

    def run(sequences: list[Scored]) -> None:
        longest = max(len(rollout.token_ids) for rollout, _scores in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row, (rollout, _scores) in enumerate(sequences):
            length, begin = len(rollout.token_ids), len(rollout.prompt.token_ids)
            ids[row, :length] = torch.tensor(rollout.token_ids)
            labels[row, begin:length] = ids[row, begin:length]
        lm.zero_grad()
        logits = lm(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()

    return run


if __name__ == "__main__":
    main()
