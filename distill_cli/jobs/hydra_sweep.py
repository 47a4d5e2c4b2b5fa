"""Sweeps through Hydra's plugins: `hydra/launcher=submitit_slurm` submits runs, `hydra/sweeper=optuna` chooses them.

Hydra's sweeper gets a launcher of ours (`Batches`). What it asks for is composed, checked and prepared here, in the
sweep's folder, as the runs of any sweep are. Then it is carried out as any sweep is, or given to the launcher that was
typed, whose tasks carry out the runs that are there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape

from distill_cli.config.compose import (
    Job,
    check_overrides,
    compose_unsearched,
    composed_job,
    hear_own_warnings,
    run_hydra,
    search_space,
)
from distill_cli.config.credentials import credentials_environment, without_credentials
from distill_cli.config.derived import parse_time_limit, validates
from distill_cli.config.schema import ClusterConfig, Config, Launcher
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.run_dir import Element, RunDir, SweepDir
from distill_cli.jobs.run import check_jobs, print_warnings, read_outcome
from distill_cli.jobs.slurm_job import Task
from distill_cli.jobs.submit import note_job
from distill_cli.jobs.sweep import add_runs, carry_out_runs, check_sweep, conclude, discard, new_sweep
from distill_cli.launch import slurm
from distill_cli.report.read import last_values
from distill_cli.terminal.console import Console

KNOWN = {
    "hydra/launcher=submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "hydra-submitit-launcher"),
    "hydra/sweeper=optuna": ("hydra_plugins.hydra_optuna_sweeper", "hydra-optuna-sweeper"),
}
"""The plugins that work here: module and package."""
TARGET = "hydra_plugins.distill.Batches"
"""Hydra takes launchers of the package hydra_plugins alone; ours is registered by this name."""

SAME = ("partition", "account", "qos", "constraint", "exclude", "nodes", "gpus_per_node", "array_parallelism", "setup")
"""What hydra.launcher and cluster call alike."""
OTHER_NAMES = {"cpus_per_task": "cpus_per_node", "signal_delay_s": "signal_s", "additional_parameters": "extra"}
SBATCH = ("comment", "gres", "cpus_per_gpu", "gpus_per_task", "mem_per_gpu", "mem_per_cpu")
"""Keys of hydra.launcher that are cluster.extra's."""

OURS = {
    "max_num_timeout": "set cluster.max_requeues",
    "tasks_per_node": "set cluster.ranks_per_node",
    "submitit_folder": "it is slurm/ in the sweep's folder",
}
"""Keys of hydra.launcher that are refused, and what to do instead."""


class Batches(BasicLauncher):
    """Where Hydra's sweepers send their runs, some at a time. Takes the parameters of the launcher that was typed."""

    sweep: ClassVar[HydraSweep]
    """What this process carries out: Hydra makes the launcher, and knows nothing of it."""

    def __init__(self, **params: Any) -> None:
        super().__init__()
        self._params = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in params.items()
        }

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Composes and prepares these runs, and carries them out; a sweeper reads what each one reached."""
        returns = super().launch(job_overrides, initial_job_idx)
        jobs = [returned.return_value for returned in returns]  # raises what was wrong in composing
        hear_own_warnings()

        def submit(config: Config) -> None:
            self._submit(config, job_overrides, initial_job_idx)

        values = self.sweep.carry_out(jobs, self._params, submit=submit)
        for returned, value in zip(returns, values, strict=True):
            returned.return_value = value
            returned.status = JobStatus.FAILED if isinstance(value, Exception) else JobStatus.COMPLETED
        return returns

    def _submit(self, config: Config, job_overrides: Sequence[Sequence[str]], first: int) -> None:
        """Gives prepared runs to the launcher of Hydra's; returns when that has seen all of them end."""
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

        folder = str(self.sweep.folder.path / "slurm")
        given = launcher_parameters(config, name=self.sweep.folder.path.name, max_jobs=len(job_overrides))
        typed = {name: self._params[name] for name in self.sweep.launcher_keys & {"name", "stderr_to_stdout", *SBATCH}}
        launcher = SlurmLauncher(**{**self._params, "submitit_folder": folder, **given, **typed})
        launcher.setup(hydra_context=self.hydra_context, task_function=carry_out_element, config=self.config)
        launcher.launch(job_overrides, first)


@dataclass
class HydraSweep:
    """A sweep whose runs come from one of Hydra's sweepers, all at once or batch after batch."""

    command: Sequence[str]
    console: Console
    plugins: dict[str, str]
    """As `hydra_plugins` finds them."""
    launcher_keys: set[str]
    """The keys of hydra.launcher that were typed."""
    space: dict[str, str]
    """What is searched: key and range. Empty where the sweeper is Hydra's basic one."""
    folder: SweepDir | None = None
    failed: int = 0
    is_told: set[str] = field(default_factory=set)

    def carry_out(
        self, jobs: Sequence[Job], params: dict[str, Any], *, submit: Callable[[Config], None]
    ) -> list[float | DistillError | None]:
        """The runs of a batch: what each reached, or why it reached nothing; None where nobody chooses by it.

        Raises:
            ConfigError: a run is wrong; none of the batch was started.
        """
        for job in jobs:
            if "launcher" in self.plugins:
                lay_over(job.config.cluster, params, typed=self.launcher_keys)
        checked = check_jobs(jobs, is_new=self.folder is None)
        check_sweep(jobs)
        config = jobs[0].config
        print_warnings(jobs, checked, console=self.console, told=self.is_told)
        self.folder = self.folder or new_sweep(config)
        elements = add_runs(self.folder, jobs, checked, command=self.command, space=self.space)
        os.environ["DISTILL_SWEEP_DIR"] = str(self.folder.path)  # of Hydra's tasks, and of what its sweepers write
        try:
            if "launcher" in self.plugins:
                self.failed += self._launched(elements, lambda: submit(config))
            else:
                self.failed += carry_out_runs(self.folder, elements, config, console=self.console)
        except ConfigError:  # Slurm has refused them
            if elements[0].index == 0:
                discard(self.folder)
            raise
        if not self.space:
            return [None] * len(jobs)
        runs = [RunDir(self.folder.path / element.folder) for element in elements]
        return [reached(run, config.checkpoint.metric) for run in runs]

    def _launched(self, elements: Sequence[Element], launch: Callable[[], None]) -> int:
        """Runs that Hydra's launcher carries out; how many did not finish."""
        runs = [RunDir(self.folder.path / element.folder) for element in elements]
        before = set(submitted(self.folder))
        self.console.print(f"folder   {escape(str(self.folder.path))}")
        self.console.print(f"submits  {len(runs)} runs through {self.plugins['launcher']}")
        self.console.print(f"follow   squeue -r -n {escape(self.folder.path.name)}")
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
                launch()
        except Exception as error:  # whatever submitit makes of a job that was refused, or lost
            if submitted(self.folder) == before:
                raise ConfigError(slurm.refusal(error)) from error
            said = str(error).strip().splitlines()
            self.console.print(f"warning: {escape(said[0] if said else repr(error))}: Hydra's launcher waits no longer")
        except KeyboardInterrupt:
            self.console.print("what was submitted goes on; scancel ends it")
            raise
        finally:
            for job_id in submitted(self.folder) - before:
                index = job_id.partition("_")[2]
                note_job(runs[int(index or 0)], job_id, self.folder.path / "slurm")
        failed = 0
        for number, run in enumerate(runs, start=1):
            outcome, end = read_outcome(run), run.job_end() if run.slurm.exists() else None
            told = outcome["state"] if outcome else (end or {}).get("error") or "has not ended"
            failed += (outcome or {}).get("state") != "finished"
            self.console.print(f"{number}/{len(runs)}  {escape(run.path.name)}: {escape(told)}")
        return failed


def run_through_hydra(argv: Sequence[str], plugins: dict[str, str], *, command: Sequence[str], console: Console) -> int:
    """A sweep with the plugins that were typed; the exit status.

    Raises:
        ConfigError: a plugin is unknown or not there, or a run is wrong.
    """
    check_overrides(argv)
    check_plugins(argv, plugins)
    os.environ |= credentials_environment(compose_unsearched(argv))
    argv = [without_credentials(word) for word in argv]  # Hydra's launcher pickles what was typed
    keys = {
        word.lstrip("+").removeprefix("hydra.launcher.").partition("=")[0].partition(".")[0]
        for word in argv
        if word.lstrip("+").startswith("hydra.launcher.")
    }
    space = search_space(argv) if "sweeper" in plugins else {}
    sweep = Batches.sweep = HydraSweep(command, console, plugins, keys, space)
    Plugins.instance().class_name_to_class[TARGET] = Batches
    extra = [f"hydra.launcher._target_={TARGET}"]
    if "sweeper" in plugins:
        extra.append(f"hydra.sweeper.direction={direction(argv)}")
    place = 1 + max(argv.index(override) for override in plugins.values())  # overrides stand together
    try:
        run_hydra([*argv[:place], *extra, *argv[place:]], composed_job)
    except ConfigError:
        raise
    except DistillError as error:  # of a run: the sweeper goes no further
        console.print(f"error: {escape(str(error))}")
    if sweep.folder is None:
        return 0  # a flag of Hydra's was answered
    best = sweep.folder.path / "optimization_results.yaml"
    if best.exists():
        found = OmegaConf.load(best)
        told = " ".join(f"{key}={value}" for key, value in found.best_params.items())
        console.print(f"best     {found.best_value:.4g} with {escape(told)}")
    return conclude(sweep.folder, sweep.failed, console=console)


def check_plugins(argv: Sequence[str], plugins: dict[str, str]) -> None:
    """Raises ConfigError where a plugin does not work here, or is not installed."""
    for kind, override in plugins.items():
        if override.lstrip("+") not in KNOWN:
            other = (
                "cluster.parallel_jobs=N runs N at a time here"
                if kind == "launcher"
                else "give values, separated by commas"
            )
            known = next(name for name in KNOWN if kind in name)
            raise ConfigError(f"{override}: distill works with {known} alone; {other}")
        module, package = KNOWN[override.lstrip("+")]
        if importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(module) is None:
            raise ConfigError(f"{override}: needs {package}, which is not installed; pip install {package}")
        if not {"-m", "--multirun"} & set(argv):
            raise ConfigError(f"{override}: is for sweeps; add -m" + (", or type cluster=slurm" * (kind == "launcher")))
    for word in argv:
        if word.lstrip("+").startswith("hydra.sweeper.storage=") and not word.endswith("=null"):
            raise ConfigError(
                "hydra.sweeper.storage: the plugin's Optuna 2 keeps no database with the SQLAlchemy 2 that is there; "
                "leave it out"
            )


def direction(argv: Sequence[str]) -> str:
    """Whether more of checkpoint.metric is better. Raises ConfigError where no run would have it."""
    config = compose_unsearched(argv)
    found = "maximize" if config.checkpoint.higher_is_better else "minimize"
    metric, typed = config.checkpoint.metric, [word for word in argv if word.startswith("hydra.sweeper.direction=")]
    if metric.startswith("val/") and not (validates(config) and (config.eval.at_end or config.eval.period)):
        raise ConfigError(
            f"checkpoint.metric={metric}: is what the search goes by, and nothing validates; set eval.at_end=true, or "
            "another metric, such as train/kl_forward with checkpoint.higher_is_better=false"
        )
    if typed and typed[-1].partition("=")[2] != found:
        raise ConfigError(
            f"{typed[-1]}: the search goes by checkpoint.metric={metric}, of which "
            f"checkpoint.higher_is_better={str(config.checkpoint.higher_is_better).lower()}; set that"
        )
    return found


def reached(run: RunDir, metric: str) -> float | DistillError:
    """The last value of a metric of a run that has finished, or what there is instead."""
    outcome = read_outcome(run)
    if outcome is None or outcome["state"] != "finished":
        return DistillError(f"{run.path.name} has not finished")
    value = last_values(run.metrics, [metric]).get(metric, math.nan)
    return value if math.isfinite(value) else DistillError(f"{run.path.name}: no {metric} was recorded")


def lay_over(cluster: ClusterConfig, params: dict[str, Any], *, typed: set[str]) -> None:
    """What was typed as hydra.launcher.* becomes the run's cluster, which is checked, and which `resume` submits to.

    Raises:
        ConfigError: a key that means nothing here, or that the launcher does not know.
    """
    for name in sorted(typed & OURS.keys()):
        raise ConfigError(f"hydra.launcher.{name}: distill does this itself; {OURS[name]}")
    for name in ("container", "python"):
        if getattr(cluster, name):
            raise ConfigError(
                f"cluster.{name}: Hydra's launcher knows none; leave hydra/launcher out, cluster=slurm does"
            )
    cluster.launcher = Launcher.slurm
    for name in typed & {*SAME, *OTHER_NAMES}:
        setattr(cluster, OTHER_NAMES.get(name, name), params[name])
    if "timeout_min" in typed or cluster.time is None:
        cluster.time = str(params["timeout_min"])
    if "mem_gb" in typed:
        cluster.mem = f"{params['mem_gb']}G"
    cluster.extra = dict(cluster.extra) | {name: params[name] for name in sorted(typed & set(SBATCH))}


def launcher_parameters(config: Config, *, name: str, max_jobs: int) -> dict[str, Any]:
    """What our own array would ask of Slurm, in the names of Hydra's launcher."""
    ours, cluster = slurm.parameters(config, name=name, max_jobs=max_jobs), config.cluster
    additional = {
        key: value for key, value in ours["additional_parameters"].items() if key.replace("-", "_") not in SBATCH
    }
    given = {key: ours[key] for key in ("partition", "account", "qos", "constraint", "exclude", "nodes", "setup")}
    given |= {key: ours[key] for key in ("gpus_per_node", "signal_delay_s", "array_parallelism", "stderr_to_stdout")}
    minutes = parse_time_limit(cluster.time) / 60
    if cluster.mem is not None:
        additional["mem"] = cluster.mem
    return given | {
        "name": name,
        "cpus_per_task": ours["cpus_per_task"],
        "tasks_per_node": 1,
        "mem_gb": None,
        "timeout_min": math.ceil(minutes) if math.isfinite(minutes) else 0,  # Slurm's word for no limit
        "additional_parameters": additional,
    }


def submitted(sweep: SweepDir) -> set[str]:
    """The ids of what submitit has submitted into the sweep's folder."""
    return {file.name.removesuffix("_submitted.pkl") for file in (sweep.path / "slurm").glob("*_submitted.pkl")}


def carry_out_element(_: DictConfig) -> None:
    """What Hydra's launcher runs on a node: the run that was prepared for this place in the sweep.

    Raises:
        DistillError: it did not finish.
    """
    import submitit

    place, here = HydraConfig.get(), submitit.JobEnvironment()
    sweep = SweepDir(Path(place.sweep.dir))
    run = RunDir(sweep.path / sweep.elements()[place.job.num].folder)
    hear_own_warnings()
    if here.node == 0:
        note_job(run, here.job_id, here.paths.folder)
    status = Task(str(run.path)).carry_out()
    if status:
        raise DistillError(f"{run.path.name}: status {status}; {here.paths.stdout} says why")
