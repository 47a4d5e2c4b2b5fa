"""Measure the speed of `distill eval` with a started engine, relative to vLLM's bare `generate`.

    python scripts/bench_eval.py

500 generated arithmetic problems, 4 answers each at temperature 0.7, on the embedded student and one engine. The
variants alternate in one process, in an order that rotates from round to round; the first round warms up. Starting the
process, the engine and the verifier's process, and making the prompts, is not measured.

- *ours*: everything else that the command does: sampling with a seed per answer, judging, the parquet files, and the
  scores with their intervals.
- *bare*: `LLM.generate` with the same prompts, `max_tokens` and temperature and otherwise default parameters, with one
  request per answer; *n=4*: with one per problem; *seeded*: with a seed per request, as ours.

All variants use the same engine in this process, with the same patches of vLLM (`engines.vllm_patches`).

Shares are medians of the ratios within a round, with their range. Wall time is unreliable if other work shares the
cores. CPU time includes the verifier's process; with OMP_NUM_THREADS=1 it contains no threads that spin.
"""

from distill_cli.engines.process_setup import prepare_process
from distill_cli.jobs.preflight import preflight

prepare_process()

import argparse  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import psutil  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from distill_cli.config.compose import compose  # noqa: E402
from distill_cli.data.prompts import load_tokenizer  # noqa: E402
from distill_cli.data.registry import resolve_extract  # noqa: E402
from distill_cli.engines.engine import VllmEngine, fold_seed  # noqa: E402
from distill_cli.folders.answers_table import AnswersFile, join_answers  # noqa: E402
from distill_cli.parallel.mesh import layout  # noqa: E402
from distill_cli.ranks.build_engines import engine_settings  # noqa: E402
from distill_cli.ranks.build_source import Rank, build_validator  # noqa: E402
from distill_cli.report.eval_results import make_scoreboard, read_problems  # noqa: E402
from distill_cli.train.validation import Validator, answer_row  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--problems", type=int, default=500)
    args = parser.parse_args()
    overrides = [f"eval.max_samples={args.problems}", "eval.repeat=4", "eval.temperature=0.7", "eval.batch_size=4096"]
    (job,) = compose(overrides)
    config = job.config
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        parallel = layout(device=torch.device("cpu"))
        found = preflight(config)
        validator = build_validator(Rank(found, parallel, load_tokenizer(found.tokenizer.folder)))
        engine = VllmEngine(engine_settings(found, "student"))
        variants = {
            "bare": lambda: bare(engine, validator),
            "bare, n=4": lambda: bare(engine, validator, n=validator.repeat),
            "bare, seeded": lambda: bare(engine, validator, seeds=range(len(validator.prompts) * validator.repeat)),
            "ours": lambda: ours(engine, validator, Path(folder)),
        }
        walls: dict[str, list[float]] = {name: [] for name in variants}
        cpus: dict[str, list[float]] = {name: [] for name in variants}
        names = list(variants)
        for number in range(args.rounds + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                begin, begin_cpu = time.perf_counter(), cpu_seconds()
                num_tokens = variants[name]()
                if number > 0:  # the first round warms up
                    walls[name].append(num_tokens / (time.perf_counter() - begin))
                    cpus[name].append(num_tokens / (cpu_seconds() - begin_cpu))
        for name in names:
            print(f"{name:12}", report(walls, name, unit="s"), report(cpus, name, unit="CPU s"), sep="  ")
        engine.close()
        dist.destroy_process_group()


def report(rates: dict[str, list[float]], name: str, *, unit: str) -> str:
    ratios = sorted(a / b for a, b in zip(rates[name], rates["bare"], strict=True))
    share = f"{statistics.median(ratios):4.0%} of bare ({ratios[0]:.0%} to {ratios[-1]:.0%})"
    return f"{statistics.median(rates[name]):6.0f} tokens/{unit} {share:28}"


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its children."""
    this = psutil.Process()
    return sum(one.cpu_times().user + one.cpu_times().system for one in (this, *this.children()))


def bare(engine: VllmEngine, validator: Validator, *, n: int = 1, seeds: Sequence[int] | None = None) -> int:
    """Sample with `LLM.generate`; return the number of tokens."""
    from vllm import SamplingParams

    prompts = [prompt.token_ids for prompt in validator.prompts for _ in range(validator.repeat // n)]
    common: dict[str, Any] = {
        "n": n,
        "max_tokens": validator.responder.sampling.max_new_tokens,
        "temperature": validator.responder.sampling.temperature,
    }
    params = SamplingParams(**common)
    if seeds is not None:
        params = [SamplingParams(seed=fold_seed(seed), **common) for seed in seeds]
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = engine.llm.generate(inputs, params, use_tqdm=False)
    return sum(len(answer.token_ids) for output in outputs for answer in output.outputs)


def ours(engine: VllmEngine, validator: Validator, folder: Path) -> int:
    """Do what `ranks.eval_rank` and `jobs.evaluation` do around an engine; return the number of tokens."""
    file, extract, num_tokens = AnswersFile(folder, rank=0), resolve_extract(validator.responder.verify.function), 0
    for answers in validator.answers(engine):
        file.write([answer_row(answer, decode=validator.responder.decode, extract=extract) for answer in answers])
        num_tokens += sum(len(rollout.sample.token_ids) for _, rollout in answers)
    file.close()
    make_scoreboard({"student": read_problems(join_answers(folder), unnamed="problems")}, has_votes=True)
    return num_tokens


if __name__ == "__main__":
    main()
