"""Compare with TRL's DistillationTrainer: the same job by both in turns, each in a process timed from its command.

    UV_PROJECT_ENVIRONMENT=TRL uv sync --only-group trl                  # TRL's environment, without vLLM
    python scripts/bench_vs_trl.py --trl TRL/bin/python                  # the embedded pair: seconds to an accuracy
    python scripts/bench_vs_trl.py --trl TRL/bin/python --case smollm2 --pair FOLDER     # tokens per second

    UV_PROJECT_ENVIRONMENT=BOTH uv sync --extra cpu --group trl          # TRL and vLLM
    python scripts/bench_vs_trl.py --trl TRL/bin/python --trl-vllm BOTH/bin/python ...   # TRL's own vLLM: a third side

*tiny* is the default run, `distill train.max_steps=60`, and the same with TRL: the embedded pair, the same training
prompts, batch, answers of up to 64 tokens, AdamW, learning rate and schedule. Both sides answer the same held-out
problems greedily before the first step and at the same steps, and one verifier judges both. Only distill does what else
the default run does: measures the teacher, records answers, saves checkpoints, tracks, writes a report.

*smollm2* is a pair of real language models, such as SmolLM2-135M-Instruct and half of its layers: `FOLDER/student` and
`FOLDER/teacher`. All answers have the same length: in a copy of the pair another special token ends answers, which the
models practically never sample. *fewest tokens of a step* shows whether they did. The first step is not counted, and
no side evaluates or saves.

Float32 everywhere, and as many threads as cores. The losses differ: TRL's is the Jensen-Shannon divergence over the
whole vocabulary (beta=0.5), distill's the default, both directions of KL over the teacher's top 64 and one class for
all other tokens. In distill *score* includes the teacher's head and its top-k, and the verifier's time is in *sample*;
in TRL the teacher's head is part of *train*. TRL's vLLM needs two changes to run in float32 on a CPU
(`prepare_vllm` in bench_trl_side.py); it compiles its model unless `--eager` is given, distill's does not on CPUs.

A step's seconds are a median over steps, without evaluations; rows of *median* are over the runs of a side, and ratios
are relative to distill.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from distill_cli.data.sources import arithmetic
from distill_cli.data.verifiers import exact
from distill_cli.models.model_files import ASSETS
from distill_cli.types import Example

TRL_SIDE = Path(__file__).parent / "bench_trl_side.py"
TARGET = 0.99
NUM_HELD_OUT = 256
STAGES = ("sync", "sample", "score", "pack", "train")
TEMPLATES = (
    "What is {}?",
    "Explain {} to a child.",
    "Give three facts about {}.",
    "Why is {} important?",
    "Write a short story about {}.",
)
TOPICS = (
    *("rain", "the moon", "bread", "gravity", "a library", "photosynthesis", "money", "the ocean", "music", "winter"),
    *("a compass", "democracy", "sleep", "a volcano", "electricity", "friendship", "the heart", "recycling"),
    *("a bridge", "honey"),
)


@dataclass(frozen=True)
class Job:
    """What both sides do."""

    pair: str
    prompts: list[str]
    held_out: list[str]
    """Questions of the evaluations; empty without."""
    steps: int
    batch: int
    max_new_tokens: int
    max_length: int
    """Tokens of prompt and answer together."""
    lr: float
    schedule: str
    warmup: int
    betas: tuple[float, float]
    eval_period: int
    """Steps between evaluations; 0 is never."""
    weight_decay: float = 0.01
    seed: int = 42


Side = Callable[[Job, Path], tuple[list[str], Path]]
"""Takes a job and a folder; returns the command, and the file of its metrics."""


def main() -> None:
    arguments = parse()
    sides: dict[str, Side] = {"distill": distill_tiny if arguments.case == "tiny" else distill_custom}
    if arguments.trl:
        sides["TRL"] = lambda job, folder: trl(job, folder, python=arguments.trl, vllm=None)
    if arguments.trl_vllm:
        vllm = "eager" if arguments.eager else "compiled"
        sides["TRL, vLLM"] = lambda job, folder: trl(job, folder, python=arguments.trl_vllm, vllm=vllm)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        job, answers = tiny_job(arguments) if arguments.case == "tiny" else (smollm2_job(arguments, Path(scratch)), [])
        for number in range(arguments.rounds):
            for seed in arguments.seeds:
                for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
                    with tempfile.TemporaryDirectory() as folder:
                        found = run(sides[name], replace(job, seed=seed), answers, Path(folder))
                    runs.append({"side": name, "round": number + 1, "seed": seed, **found})
                    print_row(runs[-1], head=len(runs) == 1)
    if arguments.json:
        arguments.json.write_text(json.dumps({"case": arguments.case, **machine(), "runs": runs}, indent=1) + "\n")
    print_summary(runs, list(sides))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="Python interpreter of an environment with TRL")
    parser.add_argument("--trl-vllm", help="Python interpreter of an environment with TRL and vLLM")
    parser.add_argument("--eager", action="store_true", help="do not let TRL's vLLM compile the model")
    parser.add_argument("--case", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--pair", type=Path, help="smollm2: folder with student and teacher")
    parser.add_argument("--steps", type=int, help="default: 60, or 4 for smollm2")
    parser.add_argument("--tokens", type=int, default=128, help="smollm2: tokens of an answer")
    parser.add_argument("--prompts", type=int, default=16, help="smollm2: prompts per step")
    parser.add_argument("--eval-period", type=int, default=20, help="tiny: steps between evaluations")
    parser.add_argument("--rounds", type=int, default=2, help="the order of the sides changes from round to round")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    if arguments.case == "smollm2" and arguments.pair is None:
        parser.error("--case smollm2 needs --pair FOLDER")
    return arguments


def tiny_job(arguments: argparse.Namespace) -> tuple[Job, list[Example]]:
    """Return the job of the embedded pair, as conf/model/tiny.yaml composes it, and the held-out problems."""
    train = arithmetic.load(split="train", size=8192, seed=0)
    held_out = arithmetic.load(split="validation", size=512, seed=0)[:NUM_HELD_OUT]
    job = Job(
        pair=str(ASSETS / "tiny_pair"),
        prompts=[example.question for example in train],
        held_out=[example.question for example in held_out],
        steps=arguments.steps or 60,
        batch=64,
        max_new_tokens=64,
        max_length=128,
        lr=1e-3,
        schedule="cosine",
        warmup=5,
        betas=(0.9, 0.95),
        eval_period=arguments.eval_period,
    )
    return job, held_out


def smollm2_job(arguments: argparse.Namespace, scratch: Path) -> Job:
    return Job(
        pair=str(with_unused_end(arguments.pair, scratch / "pair")),
        prompts=[template.format(topic) for template in TEMPLATES for topic in TOPICS],
        held_out=[],
        steps=arguments.steps or 4,
        batch=arguments.prompts,
        max_new_tokens=arguments.tokens,
        max_length=arguments.tokens + 128,
        lr=2e-5,
        schedule="constant",
        warmup=0,
        betas=(0.9, 0.999),
        eval_period=0,
    )


def with_unused_end(pair: Path, copy: Path) -> Path:
    """Make a copy of a pair in which a special token that no prompt contains ends answers; weights are links."""
    for role in ("student", "teacher"):
        source, target = (pair / role).resolve(), copy / role
        target.mkdir(parents=True)
        read = {file.name: json.loads(file.read_text()) for file in source.glob("*.json")}
        template = (source / "chat_template.jinja").read_text()
        ends = read["tokenizer_config.json"]["eos_token"], read["tokenizer_config.json"].get("pad_token")
        special = [one for one in read["tokenizer.json"]["added_tokens"] if one["special"]]
        unused = [one for one in special if one["content"] not in template and one["content"] not in ends]
        if not unused:
            sys.exit(f"{source}: its tokenizer has no unused special token, which would end answers")
        for name in ("config.json", "generation_config.json"):
            read[name]["eos_token_id"] = unused[-1]["id"]
        read["tokenizer_config.json"]["eos_token"] = unused[-1]["content"]
        for file in source.iterdir():
            changed = ("config.json", "generation_config.json", "tokenizer_config.json")
            if file.name in changed:
                (target / file.name).write_text(json.dumps(read[file.name]))
            else:
                (target / file.name).symlink_to(file)
    return copy


def distill(job: Job, folder: Path, *overrides: str) -> tuple[list[str], Path]:
    named = (f"train.max_steps={job.steps}", f"train.seed={job.seed}", "run.name=r", f"run.root={folder}")
    return [sys.executable, "-m", "distill_cli", *named, *overrides], folder / "r" / "metrics.jsonl"


def distill_tiny(job: Job, folder: Path) -> tuple[list[str], Path]:
    return distill(job, folder, f"eval.period={job.eval_period}")


def distill_custom(job: Job, folder: Path) -> tuple[list[str], Path]:
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"question": question}) + "\n" for question in job.prompts))
    models = [f"model.{role}.path={job.pair}/{role}" for role in ("student", "teacher")]
    kinds = [f"model.{role}.dtype=float32" for role in ("student", "teacher")]
    beta1, beta2 = job.betas
    return distill(
        job,
        folder,
        *("model=custom", *models, *kinds, "train.precision=fp32", "train.activation_checkpointing=none"),
        *(f"data.train.path={data}", "data.train.answer_key=null", "data.validation=null", "data.verifier=null"),
        *(f"rollout.prompts_per_step={job.batch}", f"train.global_batch_size={job.batch}"),
        *(f"rollout.max_new_tokens={job.max_new_tokens}", f"rollout.max_sequence_length={job.max_length}"),
        *("rollout.max_truncated_rate=1", f"train.micro_batch_tokens={job.batch * job.max_length}"),
        *(f"train.lr={job.lr}", f"train.schedule={job.schedule}", f"train.warmup_updates={job.warmup}"),
        *(f"train.betas=[{beta1},{beta2}]", f"train.weight_decay={job.weight_decay}"),
        *("eval.record_samples=0", "checkpoint.enabled=false", "tracker=none"),
    )


def trl(job: Job, folder: Path, *, python: str, vllm: str | None) -> tuple[list[str], Path]:
    file, out = folder / "job.json", folder / "rows.jsonl"
    file.write_text(json.dumps({**asdict(job), "vllm": vllm, "out": str(out)}))
    return [python, str(TRL_SIDE), str(file)], out


def run(side: Side, job: Job, held_out: Sequence[Example], folder: Path) -> dict[str, Any]:
    """Run a side's command to its end; return its figures."""
    command, metrics = side(job, folder)
    threads = str(len(os.sched_getaffinity(0)))  # vLLM leaves torch one thread otherwise
    with (folder / "log").open("w") as log:
        begin = time.time()
        env = {**os.environ, "OMP_NUM_THREADS": threads}
        done = subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
        end = time.time()
    if done.returncode:
        sys.exit(f"{' '.join(command)}: status {done.returncode}\n{(folder / 'log').read_text()[-4000:]}")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return figures(rows, held_out, begin=begin, end=end)


def figures(rows: list[dict[str, Any]], held_out: Sequence[Example], *, begin: float, end: float) -> dict[str, Any]:
    """Return the figures of a run.

    Args:
        rows: lines of its metrics, each with the time at which its step and evaluation had ended.
        held_out: the problems that `answers` of rows answer.
        begin: time of its command.
        end: time at which it had ended.
    """
    for row in rows:
        if answers := row.pop("answers", None):
            pairs = zip(answers, held_out, strict=True)
            row["val/accuracy"] = sum(exact.verify(text, one.answer or "") for text, one in pairs) / len(held_out)
    steps = [row for row in rows if row["step"] > 0]
    measured = [row for row in rows if "val/accuracy" in row]
    reached = [row["time"] - begin for row in measured if row["val/accuracy"] >= TARGET]
    counted = steps if measured else steps[1:] or steps
    found = {
        "to first step, s": steps[0]["time"] - steps[0]["time/step_s"] - begin,
        "to end, s": end - begin,
        "step, s": median(row["time/step_s"] for row in counted),
        **{f"{stage}, s": median(row.get(f"time/{stage}_s", 0.0) for row in counted) for stage in STAGES},
        "tokens/s": median(row["train/response_tokens"] / row["time/step_s"] for row in counted),
        "tokens per step": median(row["train/response_tokens"] for row in counted),
    }
    if measured:
        accuracy = {f"accuracy at {row['step']}": row["val/accuracy"] for row in measured}
        return {**found, f"to {TARGET:.0%}, s": min(reached, default=None), **accuracy}
    return {**found, "fewest tokens of a step": min(row["train/response_tokens"] for row in steps)}


def machine() -> dict[str, Any]:
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in cpus if line.startswith("model name")), platform.machine())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "distill": versions}


def print_row(row: dict[str, Any], *, head: bool) -> None:
    widths = [max(10, len(name)) for name in row]
    if head:
        print("  ".join(f"{name:>{width}}" for name, width in zip(row, widths, strict=True)))
    print("  ".join(f"{text(value):>{width}}" for value, width in zip(row.values(), widths, strict=True)), flush=True)


def print_summary(runs: Sequence[dict[str, Any]], sides: Sequence[str]) -> None:
    """Print the median of each side's runs, and the other sides' relative to the first's, as a table in Markdown."""
    first, *others = sides
    columns = [f"median of {len(runs) // len(sides)}", *sides, *(f"{side} / {first}" for side in others)]
    print(f"\n| {' | '.join(columns)} |")
    print("|---" * (2 * len(sides)) + "|")
    for name in list(runs[0])[3:]:
        found = {side: [row[name] for row in runs if row["side"] == side] for side in sides}
        values = [None if None in column else median(column) for column in found.values()]
        ratios = [value / values[0] if value is not None and values[0] else None for value in values[1:]]
        print(f"| {name} | {' | '.join(map(text, [*values, *ratios]))} |")


def text(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
