"""`distill resume RUN|SWEEP [--step N] [OVERRIDES]`: a run goes on in its own folder, from a checkpoint.

What may be changed on the way is what changes where and how the run computes, when it looks at itself and when it ends
(`SAFE`). The rest has shaped the weights that are there: it is compared with the checkpoint's own config, and a
difference is refused with both values.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.markup import escape

from distill_cli.checkpoint import store
from distill_cli.checkpoint.store import Checkpoint
from distill_cli.config.choices import conf_dir
from distill_cli.config.compose import flatten, load_config, save_config
from distill_cli.config.credentials import credentials_environment
from distill_cli.config.overrides import override_problems
from distill_cli.config.schema import Config, Launcher, Schedule
from distill_cli.data.row_check import DataFacts
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.attempts import attempts_of, told
from distill_cli.folders.run_dir import RunDir, SweepDir
from distill_cli.jobs import submit
from distill_cli.jobs.preflight import Preflight, preflight
from distill_cli.jobs.run import carry_out, exit_status, job_of, read_outcome, start_panel
from distill_cli.jobs.sweep import carry_out_sweep
from distill_cli.models.model_files import fingerprint, locate
from distill_cli.terminal.console import Console

SAFE = (
    *("mesh.", "cluster.", "engine.", "eval.", "checkpoint.", "tracker.", "run.print_every"),
    *("train.max_steps", "train.max_epochs", "train.micro_batch_tokens", "train.packing"),
    *("train.activation_checkpointing", "train.cpu_offload", "train.offload_optimizer", "train.compile"),
    *("model.student.lora.sync", "train.max_bad_steps", "rollout.max_truncated_rate", "rollout.on_truncation"),
    "rollout.save_scores",
)
"""Keys, or their beginnings, that a resumed run may change."""


def resume(argv: Sequence[str]) -> int:
    """The verb; its exit status.

    Raises:
        ConfigError: there is no such run, it is in use, it is finished, or an override cannot be taken.
        DistillError: the run failed again.
    """
    path, step, overrides = _arguments(argv)
    console = Console(highlight=False, soft_wrap=True)
    sweep = SweepDir(path.resolve())
    if sweep.file.is_file():
        if step is not None:
            raise ConfigError(f"--step {step}: goes back in one run; give a run's folder of {path}")
        with exit_status() as status:
            status.value = resume_sweep(sweep, overrides, console=console)
        return status.value
    return resume_run(open_run(path), step, overrides, console=console)


def resume_run(run: RunDir, step: int | None, overrides: Sequence[str], *, console: Console) -> int:
    """One run, here or as a job; the exit status."""
    job_id = None
    with run.lock(), exit_status() as status:
        for job in submit.in_queue([run]).values():
            raise ConfigError(f"{run.path}: Slurm has it as {job}; wait for it to end, or scancel it")
        old = load_config(run.config)
        config = with_overrides(old, overrides)
        start = start_of(run, step, config=config, console=console)
        found = preflight(config)
        if step is None and is_done(run, config, found):
            raise ConfigError(
                f"{run.path}: finished after {read_outcome(run)['num_steps']} steps; give train.max_steps=N to go on, "
                "or --step N to go on from an earlier checkpoint"
            )
        save_config(config, run.config)
        os.environ |= credentials_environment(config)
        if step is not None and start is not None:
            set_aside(run, later_than=start.step)
        attempt = run.next_attempt()
        warnings = list(found.warnings)
        if config.train.schedule is not Schedule.constant and found.num_steps(config) != found.num_steps(old):
            warnings.append(
                f"train.schedule={config.train.schedule.value} now ends at step {found.num_steps(config)} instead of "
                f"{found.num_steps(old)}: the learning rate of the steps to come is another"
            )
        for warning in warnings:
            console.print(f"warning: {escape(warning)}")
        job = job_of(run)
        for line in told(attempts_of(run)):
            console.print(escape(line))
        console.print(start_panel(job, found, attempt))
        if config.cluster.launcher is Launcher.slurm:
            job_id = submit.submit_run(config, run, console=console)
        else:
            carry_out(job, attempt, console=console)
    if job_id is not None and config.cluster.wait:
        return submit.wait_for_run(run, job_id, console=console)
    return status.value


def resume_sweep(sweep: SweepDir, overrides: Sequence[str], *, console: Console) -> int:
    """What did not finish of a sweep, here or as a job array; the exit status. What is in the queue stays there.

    Raises:
        ConfigError: nothing is left to do, or some run cannot go on; nothing was started.
    """
    elements = sweep.elements()
    runs = {element.index: RunDir(sweep.path / element.folder) for element in elements}
    open_elements = [element for element in elements if overrides or not has_finished(runs[element.index])]
    queued = submit.in_queue([runs[element.index] for element in open_elements])
    for path, job in queued.items():
        console.print(f"left     {escape(path.name)}: Slurm has it as {job}")
    configs: dict[int, Config] = {}
    problems: dict[str, None] = {}
    known_data: dict[str, DataFacts] = {}
    for element in open_elements:
        run = runs[element.index]
        if run.path in queued:
            continue
        try:
            config = with_overrides(load_config(open_run(run.path).config), overrides)
            start_of(run, None, config=config, console=console)
            found = preflight(config, known_data)
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        if not is_done(run, config, found):
            configs[element.index] = config
    if problems:
        raise ConfigError(*problems)
    if not configs:
        done = "has finished" if not queued else "has finished or is in the queue"
        raise ConfigError(f"{sweep.path}: every run {done}; give train.max_steps=N to go on with finished ones")
    for index, config in configs.items():
        save_config(config, runs[index].config)
        os.environ |= credentials_environment(config)
    console.print(f"{len(configs)} of {len(elements)} runs go on")
    rest = [element for element in elements if element.index in configs]
    return carry_out_sweep(sweep, rest, next(iter(configs.values())), console=console)


def has_finished(run: RunDir) -> bool:
    outcome = read_outcome(run)
    return outcome is not None and outcome["state"] == "finished"


def is_done(run: RunDir, config: Config, found: Preflight) -> bool:
    """Whether the run has finished all the steps that the config asks for."""
    return has_finished(run) and read_outcome(run)["num_steps"] >= found.num_steps(config)


def _arguments(argv: Sequence[str]) -> tuple[Path, int | None, list[str]]:
    words, step = list(argv), None
    for index, word in enumerate(words):
        if word == "--step" or word.startswith("--step="):
            value = word.partition("=")[2] if "=" in word else "".join(words[index + 1 : index + 2])
            if not value.isdecimal():
                raise ConfigError(f"--step {value}: must be the number of a step")
            step = int(value)
            del words[index : index + (1 if "=" in word else 2)]
            break
    if not words or words[0].startswith("-") or "=" in words[0]:
        raise ConfigError("distill resume: which run? give its folder, such as runs/latest")
    flags = [word for word in words[1:] if word.startswith("-")]
    if flags:
        raise ConfigError(f"{' '.join(flags)}: `distill resume` takes a run, --step and overrides")
    return Path(words[0]), step, words[1:]


def open_run(path: Path) -> RunDir:
    """The run in a folder. Raises ConfigError where none is."""
    run = RunDir(path.resolve())
    if not run.config.is_file():
        what = "no such folder" if not path.exists() else "no run is there (it has no config.yaml)"
        raise ConfigError(f"{path}: {what}; give a run's folder, such as runs/latest")
    return run


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A run's config with `key=value` and `group=choice` of `SAFE` keys; others are for `differences` to refuse.

    Raises:
        ConfigError: an override that is none.
    """
    problems = override_problems(overrides, conf_dirs=[conf_dir()])
    if problems:
        raise ConfigError(*problems)
    merged = OmegaConf.structured(config)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: takes no sweep and no deletion; give key=value or group=choice")
        try:
            file = conf_dir() / override.key_or_group / f"{override.value()}.yaml"
            if file.is_file():
                OmegaConf.update(merged, override.key_or_group, OmegaConf.load(file))
            else:
                OmegaConf.update(merged, override.key_or_group, override.value())
        except OmegaConfBaseException as error:
            raise ConfigError(f"{override.input_line}: {str(error).splitlines()[0]}") from error
    return OmegaConf.to_object(merged)


def start_of(run: RunDir, step: int | None, *, config: Config, console: Console) -> Checkpoint | None:
    """The checkpoint to go on from; None is the beginning.

    Raises:
        ConfigError: `step` has none, or the config does not fit it.
    """

    def warn(text: str) -> None:
        console.print(f"warning: {escape(text)}")

    if step is None:
        start = store.newest_whole(run.checkpoints, warn=warn)
    else:
        try:
            start = store.choose(run.checkpoints, str(step), metric="", higher_is_better=True, warn=warn)
        except DistillError as error:
            raise ConfigError(str(error)) from error
    made_under = start.path / store.CONFIG if start else run.config
    problems = differences(load_config(made_under), config)
    if problems:
        raise ConfigError(*problems)
    if start:
        check_base(start, config)
    return start


def check_base(checkpoint: Checkpoint, config: Config) -> None:
    """Raises ConfigError where the frozen weights that a checkpoint's adapters belong to are no longer the same."""
    student, expected = config.model.student, checkpoint.state.get("base")
    if expected is None:
        return
    folder = locate(student.path, revision=student.revision, key="model.student.path")
    if fingerprint(folder) != expected:
        raise ConfigError(
            f"model.student.path={student.path}: its weights are not those that the adapters of {checkpoint.path} were "
            f"trained beside; put them back in {folder}"
        )


def differences(old: Config, new: Config) -> list[str]:
    """One line for each key that differs and may not."""
    before, after = plain(old), plain(new)
    return [
        f"{key}={after.get(key)}: the run was made with {before.get(key)}, which has shaped its weights; leave it, or "
        "start a new run"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(SAFE)
    ]


def plain(config: Config) -> dict[str, Any]:
    return flatten(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))


def set_aside(run: RunDir, *, later_than: int) -> None:
    """Moves checkpoints that the run goes back behind to where no attempt looks for them."""
    for checkpoint in store.find(run.checkpoints):
        if checkpoint.step > later_than:
            aside = run.path / "checkpoints_aside"
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / checkpoint.path.name, ignore_errors=True)
            checkpoint.path.rename(aside / checkpoint.path.name)
