"""How fast `distill eval` is: what a rank does between its engine's start and end, against vLLM's bare `generate`.

    python scripts/bench_eval.py

500 problems of the built-in arithmetic, 4 answers each, on the embedded student; in one process, alternating. *Ours*
samples, judges, takes the final answers out and writes the parquet file. *Bare* is `LLM.generate` of the same engine on
the same prompts, with its default parameters and no seeds; *seeded* has a seed a request, as ours has.
"""

from distill_cli.engines.process import prepare_process

prepare_process()

import argparse  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import torch.distributed as dist  # noqa: E402

from distill_cli.config.compose import compose  # noqa: E402
from distill_cli.data.registry import resolve_extract  # noqa: E402
from distill_cli.engines.sampling import Answerer, fold_seed  # noqa: E402
from distill_cli.evaluate import Validator, answer_row  # noqa: E402
from distill_cli.parallel.mesh import layout  # noqa: E402
from distill_cli.ranks.engines import engine_settings  # noqa: E402
from distill_cli.ranks.prompts import build_tokenizer, build_validator  # noqa: E402
from distill_cli.track.answers import AnswersFile  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--problems", type=int, default=500)
    args = parser.parse_args()
    asked = [f"eval.max_samples={args.problems}", "eval.repeat=4", "eval.temperature=0.7", "eval.batch_size=4096"]
    (job,) = compose(asked)
    config = job.config
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        import torch

        parallel = layout(config.mesh, device=torch.device("cpu"))
        validator = build_validator(config, parallel, build_tokenizer(config))
        engine = Answerer(engine_settings(config, config.model.student, config.engine.student))
        variants = {
            "bare": lambda: bare(engine, validator, seeded=False),
            "seeded": lambda: bare(engine, validator, seeded=True),
            "ours": lambda: ours(engine, validator, Path(folder)),
        }
        rates: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(args.rounds + 1):
            for name, run in variants.items():
                begin = time.perf_counter()
                num_tokens = run()
                rates[name].append(num_tokens / (time.perf_counter() - begin))
        rates = {name: values[1:] for name, values in rates.items()}  # the first round warms up
        for name, values in rates.items():
            ratio = statistics.median(a / b for a, b in zip(values, rates["bare"], strict=True))
            print(f"{name:7} {statistics.median(values):8.0f} tokens/s  {ratio:.0%} of bare")
        engine.close()
        dist.destroy_process_group()


def bare(engine: Answerer, validator: Validator, *, seeded: bool) -> int:
    from vllm import SamplingParams

    settings = validator.sampling
    prompts = [prompt for prompt in validator.prompts for _ in range(validator.repeat)]
    params = [
        SamplingParams(
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=fold_seed(number) if seeded else None,
        )
        for number in range(len(prompts))
    ]
    outputs = engine._engine.llm.generate(
        [{"prompt_token_ids": prompt.token_ids} for prompt in prompts], params, use_tqdm=False
    )
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def ours(engine: Answerer, validator: Validator, folder: Path) -> int:
    file, extract, num_tokens = AnswersFile(folder, rank=0), resolve_extract(validator.verify.function), 0
    for answers in validator.answers(engine):
        file.write([answer_row(answer, decode=validator.decode, extract=extract) for answer in answers])
        num_tokens += sum(len(answer.rollout.sample.token_ids) for answer in answers)
    file.close()
    return num_tokens


if __name__ == "__main__":
    main()
