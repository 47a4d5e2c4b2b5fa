"""Measure accuracy on a benchmark through vLLM, with intervals; --against compares models.

Pass@1, pass@k, majority@k, length and truncated rate, with bootstrap 95% intervals over the problems; against other
models also the paired difference and its p-value. The answers are kept as parquet.

examples
  distill eval runs/latest
  distill eval runs/latest --against before teacher
  distill eval runs/latest eval.repeat=4 eval.temperature=1.0 eval.max_samples=500
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from distill_cli.checkpoint import store
from distill_cli.config.compose import compose
from distill_cli.config.execution_schema import ClusterConfig
from distill_cli.config.fields import has_property
from distill_cli.config.schema import Config, MeshConfig, StudentModel
from distill_cli.config.variation import load_config, override, save_config
from distill_cli.data.registry import resolve_extract, resolve_verifier
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.answers_table import join_answers
from distill_cli.folders.attempts import read_outcome
from distill_cli.folders.run_dir import RunDir, free_name, write_json
from distill_cli.jobs.preflight import preflight_evaluation
from distill_cli.jobs.prepare import require_here
from distill_cli.jobs.run_panels import relative
from distill_cli.launch.local import start_ranks
from distill_cli.report.eval_results import make_scoreboard, print_scoreboard, read_problems
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console
from distill_cli.verbs.command_line import Parser, is_override
from distill_cli.verbs.resume import open_run

ALONE = (
    *("engine.student.gpu_memory_utilization=0.9", "engine.teacher.gpu_memory_utilization=0.9"),
    *("eval.batch_size=4096", "eval.at_start=true", "cluster.hang_timeout_s=0"),
)
"""Settings that differ from training unless they are typed: the engine has the device to itself, gets much at a time,
and may take as long as it likes."""
UNREAD = ("data.train",)
"""Dictionaries that an evaluation does not read."""
ROLES = ("before", "teacher")
"""Names of a run's own models: the student as it was before training, and the teacher."""


@dataclass(frozen=True)
class Contender:
    """A model that is asked."""

    name: str
    """In tables; and its folder inside the evaluation's."""
    config: Config
    """With the model as `model.<role>`."""
    role: str
    """`student` or `teacher`: whose engine settings it takes."""


def declare(parser: Parser) -> None:
    parser.takes_subject(
        "RUN|MODEL", help="a run's folder such as runs/latest, a model's folder, or its name on the hub"
    )
    against = parser.add_argument(
        "--against", nargs="+", action="extend", default=[], metavar="RUN|MODEL",
        help="further models; `before` and `teacher` are the run's own student before training, and its teacher",
    )  # fmt: skip
    against.complete = ROLES
    parser.takes_step(default=None)
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def main(arguments: argparse.Namespace) -> int:
    """Evaluate one model after the other; return the exit status.

    Each is asked by ranks of its own, with as many engines as there are GPUs, started as those of a run are. They leave
    answers.parquet; the numbers are computed from those files here.

    Raises:
        ConfigError: no such run or model, an override that cannot be taken, a benchmark that cannot be read.
        DistillError: a model could not be asked.
    """
    after_against = arguments.against  # overrides may follow the models
    arguments.overrides += [word for word in after_against if is_override(word)]
    arguments.against = [word for word in after_against if not is_override(word)]
    if after_against and not arguments.against:
        raise ConfigError(f"--against {after_against[0]}: is an override; give a run, a model, before or teacher")
    width = None if sys.stdout.isatty() else 160
    console = Console(highlight=False, width=width, soft_wrap=width is not None, stderr=arguments.json)
    config, run = base_config(arguments)
    require_here(config, "distill eval")
    words = [arguments.subject, *arguments.against]
    contenders = []
    for word in words:
        contender = find(word, config, run=run, step=arguments.step, console=console)
        contenders.append(replace(contender, name=_unused(contender.name, {other.name for other in contenders})))
    resolved = check(contenders)
    folder = evaluation_folder(arguments.subject, run)
    (folder / "command.txt").write_text(shlex.join(arguments.command) + "\n")
    with stdout_to_stderr() if arguments.json else nullcontext():
        files = {one.name: answer(one, found, folder) for one, found in zip(contenders, resolved, strict=True)}
    has_votes = resolve_extract(resolve_verifier(config.data.verifier)) is not None
    source = str(config.data.validation["source"])
    answers = {name: read_problems(file, unnamed=source) for name, file in files.items()}
    board = make_scoreboard(answers, has_votes=has_votes)
    models = {one.name: getattr(one.config.model, one.role).path for one in contenders}
    settings = {"data": config.data.validation, "eval": asdict(config.eval)}
    result = {"models": models, **board.as_json(), "settings": settings, "folder": str(folder)}
    write_json(folder / "results.json", result)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print_scoreboard(console, board)
        console.print(f"answers  {escape(relative(folder))}")
    return 0


def base_config(arguments: argparse.Namespace) -> tuple[Config, RunDir | None]:
    """What is asked, and how: a run's own config, or a composed one; and the run that the subject belongs to."""
    check_is_read(arguments.overrides)
    run = run_around(arguments.subject)
    if run is not None:
        config = override(load_config(run.config), {"mesh": MeshConfig(), "rollout.replay": None})
        config = override(config, {"cluster": ClusterConfig(**kept_cluster_keys(config.cluster))})
        return override(config, [*ALONE, *arguments.overrides], unread=UNREAD), run
    typed = {word.lstrip("+").split("=", 1)[0] for word in arguments.overrides}
    models = []
    if not arguments.subject.startswith("package://") and not typed & {"model", "experiment"}:
        models = [
            "model=custom",
            *(f"model.{role}.path={json.dumps(arguments.subject)}" for role in ("student", "teacher")),
        ]
        if not typed & {"data", "data.validation.source"}:
            raise ConfigError(f"{arguments.subject}: asked what? choose a benchmark with data=... (distill ls data)")
    jobs = compose([*models, *ALONE, *arguments.overrides], unread=UNREAD)
    if len(jobs) != 1:
        raise ConfigError("distill eval: takes no sweep; name several models with --against")
    if models and set(arguments.against) & set(ROLES):
        raise ConfigError(f"{' and '.join(ROLES)}: of which run? evaluate a run, or choose model=...")
    return override(jobs[0].config, {"mesh": MeshConfig()}), None


def check_is_read(overrides: Sequence[str]) -> None:
    """Raise ConfigError for each key that an evaluation does not read, and each group of which it reads no key."""
    problems = []
    for word in overrides:
        key = word.lstrip("+").split("=", 1)[0]
        if key != "experiment" and not has_property(Config, key, "evaluation"):
            own = f"eval.{key.rpartition('.')[2]}"
            hint = f"set {own}" if has_property(Config, own, "evaluation") else "leave it out"
            problems.append(f"{word}: an evaluation does not read it; {hint}")
    if problems:
        raise ConfigError(*problems)


def kept_cluster_keys(cluster: ClusterConfig) -> dict[str, Any]:
    """Return what an evaluation takes over from its run's cluster: all that it reads, but the launcher."""
    names = [field.name for field in fields(cluster) if has_property(ClusterConfig, field.name, "evaluation")]
    return {name: getattr(cluster, name) for name in names if name != "launcher"}


def run_around(word: str) -> RunDir | None:
    """The run that a folder is, or lies in: runs/latest, runs/latest/student, runs/latest/export/step_40."""
    path = Path(word)
    if not path.is_dir():
        return None
    return next((RunDir(f) for f in [path.resolve(), *path.resolve().parents][:3] if RunDir(f).command.is_file()), None)


def find(word: str, config: Config, *, run: RunDir | None, step: str | None, console: Console) -> Contender:
    """The model that a word of the command line names.

    Raises:
        ConfigError: there is none.
    """
    if word == "before":
        return Contender("before", config, "student")
    if word == "teacher":
        teacher = config.model.teacher
        as_student = StudentModel(path=teacher.path, revision=teacher.revision)
        return Contender("teacher", override(config, {"model.student": as_student}), "teacher")
    name, path = Path(word).resolve().name if Path(word).exists() else word, word
    if RunDir(Path(word)).config.is_file() and not (Path(word) / "config.json").is_file():
        trained = open_run(Path(word))
        path = str(trained_student(trained, step=step, console=console))
    return Contender(name, override(config, {"model.student.path": path, "model.student.revision": None}), "student")


def trained_student(run: RunDir, *, step: str | None, console: Console) -> Path:
    """A run's student as a Hugging Face folder: the finished one, or an export of a checkpoint, made if need be."""
    outcome = read_outcome(run)
    if step is None and outcome and outcome.is_finished and (run.student / "config.json").is_file():
        return run.student
    settings = load_config(run.config).checkpoint
    try:
        checkpoint = store.choose(
            run.checkpoints,
            step or "last",
            metric=settings.metric,
            higher_is_better=settings.keeps_highest,
            warn=lambda text: console.print(f"warning: {escape(text)}"),
        )
    except DistillError as error:
        raise ConfigError(str(error)) from error
    folder = run.path / "export" / checkpoint.path.name
    if not folder.exists():
        console.print(f"exporting the student of step {checkpoint.step}: {escape(relative(folder))}")
        command = [
            sys.executable,
            "-m",
            "distill_cli",
            "export",
            str(run.path),
            str(folder),
            f"--step={checkpoint.step}",
        ]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise DistillError(done.stderr.strip().removeprefix("error: ") or f"{folder}: the export failed")
    return folder


def check(contenders: Sequence[Contender]) -> list[ResolvedRun]:
    """Find everything that can be wrong before an engine starts. Raises ConfigError with all problems."""
    resolved, problems = [], {}
    for contender in contenders:
        try:
            resolved.append(preflight_evaluation(contender.config, role=contender.role))
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(*problems)
    return resolved


def evaluation_folder(subject: str, run: RunDir | None) -> Path:
    """A new folder: in the run's `evals/`, beside a model's folder, or here for a model from elsewhere."""
    if run is not None:
        root = run.evals
    elif Path(subject).is_dir():
        root = Path(subject).resolve().with_name(f"{Path(subject).resolve().name}.evals")
    else:
        root = Path("evals", re.sub(r"\W+", "_", subject).strip("_")).absolute()
    folder = root / free_name(root, time.strftime("%Y%m%d-%H%M%S"))
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made here ({error.strerror})") from error
    return folder


def answer(contender: Contender, found: ResolvedRun, folder: Path) -> Path:
    """Start ranks that answer with a model, and return the file with its answers. Raises DistillError if they fail."""
    config, run = found.config, RunDir(folder / contender.name)
    run.logs.mkdir(parents=True)
    save_config(config, run.config)
    found.write(run)
    write_json(run.evaluation, {"name": contender.name, "role": contender.role})
    start_ranks(config, run)
    return join_answers(run.path)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What the ranks print goes to standard error within: standard output is for the JSON alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _unused(name: str, taken: set[str]) -> str:
    """A folder's name that is not taken."""
    plain = re.sub(r"[^\w.,=+-]+", "_", name.removeprefix("package://")).strip("_.")[-80:] or "model"
    candidate, number = plain, 1
    while candidate in taken:
        number += 1
        candidate = f"{plain}_{number}"
    return candidate
