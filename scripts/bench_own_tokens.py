"""Measure what a teacher with a tokenizer of its own costs the scoring stage: docs/performance.md.

    python scripts/bench_own_tokens.py --student FOLDER --teacher FOLDER [--sequences 16] [--tokens 256]

The teacher scores answers in its own tokens, alone and with all that brings them there and the scores back to the
student's tokens. Reported are the medians, and their ratio.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path
from statistics import median

import torch.distributed as dist

from distill_cli.engines.settings import EngineSettings
from distill_cli.engines.teacher import VllmTeacher
from distill_cli.models.model_files import ModelFiles
from distill_cli.rollout.early_scores import submit
from distill_cli.tokens.token_map import TokenMap
from distill_cli.tokens.translation import Translation
from distill_cli.types import Example, Prompt, Rollout, Sample, Target

TEXT = (Path(__file__).parent.parent / "docs").glob("*.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="package://tiny_pair/student")
    parser.add_argument("--teacher", default="package://tiny_pair/teacher")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--topk", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29555")
    dist.init_process_group("gloo", rank=0, world_size=1)
    student, teacher = (ModelFiles.find(path, key="path") for path in (arguments.student, arguments.teacher))
    begin = time.perf_counter()
    tokens = TokenMap.read(student, teacher, student)
    tables = len(tokens.tree.keys) + len(tokens.spellings.hashes) + len(tokens.groups.reps_G)
    print(f"tables of both vocabularies: {time.perf_counter() - begin:.2f} s ({tables} entries)")
    length = arguments.tokens + 8
    longest = min(2 * length, teacher.max_positions or 2 * length)
    translation = Translation(tokens, arguments.topk, longest)
    engine = VllmTeacher(EngineSettings(str(teacher.folder), longest, dtype="float32"), topk=arguments.topk)
    rng, text = random.Random(0), "\n".join(path.read_text() for path in sorted(TEXT))
    requests = []
    for _ in range(arguments.sequences):
        place = rng.randrange(len(text) // 2)
        ids = [token for token, _ in tokens.student.encode(text[place : place + 8 * arguments.tokens].encode())]
        prompt = Prompt(0, ids[:8], Example("?"), (Target(token_ids=ids[:8]),))
        answer = ids[8 : 8 + arguments.tokens]
        requests.append((Rollout(prompt, Sample(answer, [0.0] * len(answer), "length")), prompt.targets[0]))
    read = [translation.request(rollout, target) for rollout, target in requests]
    sequences, starts = [one.token_ids for one in read], [one.response_start for one in read]
    alone: list[float] = []
    whole: list[float] = []
    for round_ in range(arguments.rounds + 1):
        begin = time.perf_counter()
        engine.submit(sequences, response_starts=starts)()
        middle = time.perf_counter()
        submit(requests, engine, translation=translation)()
        if round_:
            alone.append(middle - begin)
            whole.append(time.perf_counter() - middle)
    number, ratio = sum(len(rollout.sample.token_ids) for rollout, _ in requests), median(whole) / median(alone)
    print(f"{number} tokens: {median(alone):.3f} s alone, {median(whole):.3f} s with its own tokens: {ratio:.3f} times")
    engine.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
