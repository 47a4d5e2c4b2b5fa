"""Evaluate models on a benchmark: resolve them, start the ranks that answer, compute the numbers."""

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.markup import escape

from distill_cli.config.compose import check_overrides, compose
from distill_cli.config.fields import has_property
from distill_cli.config.schema import Config, MeshConfig
from distill_cli.config.variation import override
from distill_cli.data.registry import resolve_extract, resolve_verifier
from distill_cli.errors import ConfigError, collect, refuse
from distill_cli.folders.answers_table import join_answers
from distill_cli.folders.run_dir import RunDir, free_name, write_json
from distill_cli.jobs.named_models import Contender, config_here, find, run_around
from distill_cli.jobs.new_runs import make_bare_run, require_here
from distill_cli.jobs.preflight import preflight_evaluation
from distill_cli.jobs.run_panels import relative
from distill_cli.launch.local import start_ranks
from distill_cli.report.eval_results import make_scoreboard, print_scoreboard, read_problems
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console

ALONE = (
    *("engine.student.gpu_memory_utilization=0.9", "engine.teacher.gpu_memory_utilization=0.9"),
    *("eval.batch_size=4096", "eval.at_start=true", "cluster.hang_timeout_s=0"),
)
"""What differs from training unless it is typed: the engine has the device to itself, large batches, and no limit of
time."""
UNREAD = ("data.train",)
"""Dictionaries that an evaluation does not read."""


def evaluate(
    models: Sequence[str], overrides: Sequence[str], *, step: str | None, as_json: bool, command: Sequence[str]
) -> int:
    """Evaluate the models, the first against the others; return the exit status.

    Each model gets ranks of its own, with as many engines as there are GPUs. They leave answers.parquet, from which
    this process computes the numbers.
    """
    width = None if sys.stdout.isatty() else 160
    console = Console(highlight=False, width=width, soft_wrap=width is not None, stderr=as_json)
    config, run = base_config(models, overrides)
    require_here(config, "distill eval")
    contenders = [find(word, config, step=step, console=console) for word in models]
    resolved = collect(partial(preflight_evaluation, one.config, role=one.role) for one in contenders)
    folder = evaluation_folder(models[0], run)
    (folder / "command.txt").write_text(shlex.join(command) + "\n")
    stdout = os.dup(1)
    if as_json:
        os.dup2(2, 1)  # what the ranks print: standard output is for the JSON alone
    try:
        files = [answer(one, found, folder) for one, found in zip(contenders, resolved, strict=True)]
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    assert config.data.validation  # refused by the checks otherwise, as the verifier
    assert config.data.verifier
    source = str(config.data.validation["source"])
    answers = {file.parent.name: read_problems(file, unnamed=source) for file in files}
    has_votes = resolve_extract(resolve_verifier(config.data.verifier)) is not None
    board = make_scoreboard(answers, has_votes=has_votes)
    paths = {name: getattr(one.config.model, one.role).path for name, one in zip(answers, contenders, strict=True)}
    settings = {"data": config.data.validation, "eval": asdict(config.eval)}
    result = {"models": paths, **asdict(board), "settings": settings, "folder": str(folder)}
    write_json(folder / "results.json", result)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print_scoreboard(console, board)
        console.print(f"answers  {escape(relative(folder))}")
    return 0


def base_config(models: Sequence[str], overrides: Sequence[str]) -> tuple[Config, RunDir | None]:
    """Return the benchmark and its settings, of the first model's run or composed; and that run, if it has one.

    Raises:
        ConfigError: an override is refused, there is no benchmark, or the models of a run are named without one.
    """
    check_overrides(overrides)
    check_is_read(overrides)
    subject, run = models[0], run_around(models[0])
    if run is not None:
        return config_here(run, [*ALONE, *overrides], unread=UNREAD), run
    keys = {word.lstrip("+").split("=", 1)[0] for word in overrides}
    if subject.startswith("package://") or keys & {"model", "experiment"}:
        chosen = []
    elif not keys & {"data", "data.validation.source"}:
        raise ConfigError(f"{subject}: no benchmark is given; choose one with data=... (distill ls data)")
    elif {"before", "teacher"} & set(models[1:]):
        raise ConfigError(f"--against before, teacher: are models of a run, not of {subject}; give a run or model=...")
    else:
        paths = [f"model.{role}.path={json.dumps(subject)}" for role in ("student", "teacher")]
        chosen = ["model=custom", *paths]
    jobs = compose([*chosen, *ALONE, *overrides], unread=UNREAD)
    if len(jobs) != 1:
        raise ConfigError("distill eval: takes no sweep; name several models with --against")
    return override(jobs[0].config, {"mesh": MeshConfig()}), None


def check_is_read(overrides: Sequence[str]) -> None:
    """Raise ConfigError for overrides of keys that an evaluation does not read."""
    problems = []
    for word in overrides:
        key = word.lstrip("+").split("=", 1)[0]
        if key != "experiment" and not has_property(Config, key, "evaluation"):
            own = f"eval.{key.rpartition('.')[2]}"
            fix = f"set {own}" if has_property(Config, own, "evaluation") else "leave it out"
            problems.append(f"{word}: an evaluation does not read it; {fix}")
    refuse(problems)


def evaluation_folder(subject: str, run: RunDir | None) -> Path:
    """Make a new folder: in the run's `evals/`, next to a model's folder, or here for a model from the hub."""
    path, root = Path(subject).resolve(), Path("evals", re.sub(r"\W+", "_", subject).strip("_")).absolute()
    if run is not None or path.is_dir():
        root = run.evals if run is not None else path.with_name(f"{path.name}.evals")
    folder = root / free_name(root, time.strftime("%Y%m%d-%H%M%S"))
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made here ({error.strerror})") from error
    return folder


def answer(contender: Contender, resolved: ResolvedRun, folder: Path) -> Path:
    """Start ranks that answer with a model; return the file with its answers. Raises DistillError if they fail."""
    run = make_bare_run(folder / free_name(folder, contender.name), resolved)
    write_json(run.evaluation, {"name": run.path.name, "role": contender.role})
    start_ranks(resolved, run)
    return join_answers(run.path)
