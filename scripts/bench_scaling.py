"""Measure how the cost of a step grows with prompts, answer length, vocabulary, k and ranks, one at a time.

    python scripts/bench_scaling.py                            # 15 runs
    python scripts/bench_scaling.py --quick --axes prompts k   # the ends of two axes

Each point is a run of `distill` on a pair with random weights, made by the script: Qwen3's architecture, two layers of
128 for the student and four for the teacher, float32. The base point is 64 prompts per step, answers of 128 tokens, a
vocabulary of 4,096, k = 64, one rank; an axis changes one of them. With several ranks the work of all together stays
the same, so on the cores of one machine an exponent of 0 is ideal.

Answers never end early: one dimension of the hidden states is large and constant, and the end token's embedding has the
opposite sign there, so its probability is about e^-20; the embedding is also the head. The learning rate is too small
to change that. No validation, no checkpoints, no tracker.

Print a table in Markdown for each axis: medians in seconds over all steps but the first, then exponents of the axis,
log(time ratio) / log(size ratio) between neighbouring points, and the least-squares slope over all: 1.0 is straight.
*sample* includes sampling's fixed cost per token position, *train* the optimizer. Points whose answers were not of full
length are marked.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import linear_regression, median

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from distill_cli.models.model_files import ASSETS

TOKENIZER = ASSETS / "tiny_pair" / "student"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
END_TOKEN, PAD_TOKEN = 2, 0
MAX_PROMPT = 64
KV_CACHE_GIB = 0.5
"""Holds all sequences of every point that vLLM samples at a time."""
LAYERS = {"student": 2, "teacher": 4}
STAGES = ("step", "sync", "sample", "score", "pack", "train")


@dataclass(frozen=True)
class Point:
    """The sizes of a run."""

    prompts: int = 64
    length: int = 128
    vocabulary: int = 4096
    k: int = 64
    ranks: int = 1


AXES = {
    "prompts": (16, 64, 256, 1024),
    "length": (32, 128, 512, 2048),
    "vocabulary": (512, 4096, 32_768, 151_936),
    "k": (1, 8, 64, 512),
    "ranks": (1, 2, 4),
}
UNITS = {
    "prompts": "prompts per step",
    "length": "tokens of an answer",
    "vocabulary": "vocabulary",
    "k": "k (loss.topk)",
    "ranks": "ranks",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--quick", action="store_true", help="only the ends of each axis, and one step after the first")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    disable_progress_bar()
    num_steps = 2 if arguments.quick else arguments.steps
    measured: dict[Point, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for axis in arguments.axes:
            sizes = AXES[axis][:: len(AXES[axis]) - 1] if arguments.quick else AXES[axis]
            points = [replace(Point(), **{axis: size}) for size in sizes]
            for point in points:
                if point not in measured:
                    begin = time.time()
                    measured[point] = measure(point, num_steps=num_steps, folder=Path(folder))
                    print(f"{point}: {time.time() - begin:.0f} s", file=sys.stderr, flush=True)
            print(table(axis, sizes, [measured[point] for point in points]), flush=True)
    if arguments.json:
        rows = [{**point.__dict__, **found} for point, found in measured.items()]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(point: Point, *, num_steps: int, folder: Path) -> dict[str, float]:
    """Run `distill`; return each stage's median seconds, and the length of answers relative to the point's."""
    pair = folder / f"pair_{point.vocabulary}"
    if not pair.exists():
        make_pair(pair, point.vocabulary)
    data, run = folder / f"prompts_{point.prompts}.jsonl", folder / "run"
    questions = [f"What is {10 + number % 90} + {number // 90}?" for number in range(point.prompts)]
    data.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions))
    length = MAX_PROMPT + point.length
    command = [
        *(sys.executable, "-m", "distill_cli", "model=custom", "tracker=none", "run.name=run", f"run.root={folder}"),
        *(f"model.{role}.path={pair / role}" for role in LAYERS),
        *(f"model.{role}.dtype=float32" for role in LAYERS),
        *(f"engine.{role}.kv_cache_gib={KV_CACHE_GIB}" for role in LAYERS),
        *(f"data.train.path={data}", "data.train.answer_key=null", "data.validation=null", "data.verifier=null"),
        *(f"rollout.prompts_per_step={point.prompts}", f"train.global_batch_size={point.prompts}"),
        *(f"rollout.max_new_tokens={point.length}", f"rollout.max_sequence_length={length}"),
        *("rollout.max_truncated_rate=1", f"loss.topk={point.k}", f"cluster.ranks_per_node={point.ranks}"),
        *("train.precision=fp32", "train.activation_checkpointing=none", "train.lr=1e-8"),
        *(f"train.max_steps={num_steps}", f"train.micro_batch_tokens={max(4096, length)}"),
        *("eval.record_samples=0", "checkpoint.enabled=false"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(run)
    steps = [row for row in rows if row["step"] > 0]
    seconds = {stage: median(row[f"time/{stage}_s"] for row in steps[1:]) for stage in STAGES}
    return {**seconds, "share_of_length": min(row["rollout/mean_length"] for row in steps) / point.length}


def make_pair(folder: Path, vocab_size: int) -> None:
    """Write a student and a teacher with random weights that never end an answer."""
    for role, num_layers in LAYERS.items():
        torch.manual_seed(num_layers)
        config = Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END_TOKEN,
            pad_token_id=PAD_TOKEN,
            dtype="float32",
        )
        model = Qwen3ForCausalLM(config)
        model.generation_config = GenerationConfig(eos_token_id=END_TOKEN, pad_token_id=PAD_TOKEN)
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] = 1.0
            model.model.embed_tokens.weight[END_TOKEN, 0] = -1.0
        model.save_pretrained(folder / role)
        for name in TOKENIZER_FILES:
            shutil.copy(TOKENIZER / name, folder / role / name)


def table(axis: str, sizes: Sequence[int], found: Sequence[dict[str, float]]) -> str:
    """Return the points of an axis and their exponents in Markdown."""
    lines = [f"\n| {UNITS[axis]} | {' | '.join(f'{stage}, s' for stage in STAGES)} |", "|---" * (1 + len(STAGES)) + "|"]
    for size, row in zip(sizes, found, strict=True):
        mark = "" if row["share_of_length"] == 1 else f" (answers of {row['share_of_length']:.0%} of the length)"
        lines.append(f"| {size:,}{mark} | {' | '.join(f'{row[stage]:.3f}' for stage in STAGES)} |")
    columns = {stage: [row[stage] for row in found] for stage in STAGES}
    spans = [slice(start, start + 2) for start in range(len(sizes) - 1)]
    for span in [*spans, slice(None)] if len(sizes) > 2 else spans:
        what = f"exponent, {sizes[span][0]:,} to {sizes[span][-1]:,}"
        exponents = [exponent(sizes[span], columns[stage][span]) for stage in STAGES]
        lines.append(f"| {what} | {' | '.join(f'{value:.2f}' for value in exponents)} |")
    return "\n".join(lines)


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the least-squares slope of log(seconds) over log(size)."""
    logs = [[math.log(max(value, 1e-9)) for value in values] for values in (sizes, seconds)]
    return linear_regression(*logs).slope


if __name__ == "__main__":
    main()
