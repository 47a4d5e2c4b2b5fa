"""Check what `distill chat` was typed with before an engine starts: the models that answer, and a teacher. No torch."""

from collections.abc import Iterator

from distill_cli.config.checks import chat_problems, config_problems
from distill_cli.config.schema import Config
from distill_cli.data.row_check import DataFacts
from distill_cli.jobs import model_checks, teacher_checks, template_checks
from distill_cli.jobs.preflight import (
    Check,
    Facts,
    check_engines,
    count_ranks,
    find_student,
    run_checks,
    use_hub_cache,
)
from distill_cli.models import model_files
from distill_cli.models.model_files import ModelFiles
from distill_cli.resolved import ResolvedRun

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")
"""Files of which a tokenizer has at least one."""


def preflight_chat(config: Config, *, role: str) -> ResolvedRun:
    """Check `model.student`, which answers with `engine.<role>`. Raises ConfigError with all problems."""
    facts = Facts(config, (role,), {}, trains=False, data=DataFacts(), problems=chat_problems(config))
    return run_checks(facts, CHECKS)


def preflight_teacher(config: Config) -> ResolvedRun:
    """Check `model.student` with the run's teachers, which score its answers. Raises ConfigError with all problems."""
    problems = [one for one in config_problems(config) if one.startswith(("loss.", "model.teacher"))]
    facts = Facts(config, ("student", "teacher"), {}, trains=False, data=DataFacts(), problems=problems)
    return run_checks(facts, PAIR_CHECKS)


def has_tokenizer(tokenizer: ModelFiles) -> Iterator[str]:
    """There must be a tokenizer for the prompts. Raises ConfigError if its file is damaged."""
    own_code = "auto_map" in model_files.read_object(tokenizer.folder / "tokenizer_config.json")
    if not own_code and not any(file for name in TOKENIZERS for file in tokenizer.folder.glob(name)):
        files = "no tokenizer.json and no file of another tokenizer"
        yield f"{tokenizer.path}: has no tokenizer ({files}); add it to the folder, or set model.tokenizer"
    model_files.vocabulary(tokenizer.folder)


COMMON_CHECKS: tuple[Check, ...] = (
    *(model_checks.weights, model_checks.causal, model_checks.sizes, count_ranks, template_checks.template_files),
    check_engines,
)
CHECKS: tuple[Check, ...] = (use_hub_cache, find_student, has_tokenizer, *COMMON_CHECKS)
PAIR_CHECKS: tuple[Check, ...] = (
    use_hub_cache,
    find_student,
    teacher_checks.find_teachers,
    *COMMON_CHECKS,
    model_checks.pair,
    teacher_checks.check_servers,
)
