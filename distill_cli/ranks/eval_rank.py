"""One rank's part in an evaluation: answer its engine's share of the problems and write the answers to a file."""

import json
from dataclasses import replace
from typing import IO

from distill_cli.data.registry import resolve_extract
from distill_cli.engines.engine import VllmEngine
from distill_cli.folders.answers_table import AnswersFile
from distill_cli.folders.run_dir import RunDir
from distill_cli.ranks.build_engines import engine_settings, leave
from distill_cli.ranks.build_source import Rank, build_validator
from distill_cli.train.validation import answer_row


def evaluate_rank(run: RunDir, console: IO[str]) -> None:
    """Write this rank's share of a model's answers to a benchmark to its part of answers.parquet. A collective."""
    rank, evaluation = Rank.join(run), json.loads(run.evaluation.read_text())
    resolved, parallel, validator = rank.resolved, rank.parallel, build_validator(rank)
    assert validator is not None, "an evaluation's config validates"
    settings, max_model_len = engine_settings(resolved, evaluation["role"]), resolved.lengths.validation
    engine = VllmEngine(replace(settings, max_model_len=max_model_len, sleep_mode=False, adapter=None))
    share, responder = validator.share(engine), validator.responder
    assert responder.verify is not None, "preflight refuses an evaluation without a verifier"
    extract = resolve_extract(responder.verify.function)
    file = AnswersFile(run.path, rank=parallel.rank) if share.is_first else None
    num_answers, done = len(validator.prompts) * validator.repeat, 0
    for answers in validator.answers(engine):
        if file is not None:
            file.write([answer_row(answer, decode=responder.decode, extract=extract) for answer in answers])
        done += len(answers)
        if parallel.is_main:
            run.beat(f"{done} answers")
            print(f"{evaluation['name']}: {done * share.num_engines} of {num_answers} answers", file=console)
    if file is not None:
        file.close()
    leave()
