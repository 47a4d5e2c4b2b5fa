"""The tables of `distill plan`: the mesh, a step, the run, memory, the launch, and what `--measure` expects."""

import platform
import textwrap
from collections.abc import Sequence

from distill_cli.config.compose import compose
from distill_cli.config.derived import ends_by_epochs, micro_batches_per_update, updates_per_step, validates
from distill_cli.config.execution_schema import EngineModelConfig
from distill_cli.config.schema import Config, Dtype
from distill_cli.config.teacher_jobs import job_config, teacher_nodes
from distill_cli.config.teachers import ONLY, teacher_configs
from distill_cli.config.variation import plain
from distill_cli.jobs.new_runs import print_warnings, resolve_jobs, single_path
from distill_cli.jobs.run_panels import (
    Rows,
    layout_row,
    own_nodes,
    roles_row,
    rows_table,
    step_row,
    training_rows,
    validation_rows,
)
from distill_cli.jobs.scratch_runs import Pace, check_only_job, measure
from distill_cli.launch.base import launcher_of
from distill_cli.machine import hardware
from distill_cli.memory.engine_bytes import engines_of
from distill_cli.models import model_files, param_counts
from distill_cli.models.lora_names import targeted
from distill_cli.report.verdict import verdict
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console
from distill_cli.terminal.step_printer import clock

MOST_LINES = 16
"""Lines of the drawn mesh."""


def plan(overrides: Sequence[str], flags: Sequence[str], *, measures: bool) -> int:
    """Check and print each job that was typed; return 0.

    Args:
        measures: run the first steps of the only job instead of printing what would start it.
    """
    jobs = compose(overrides, flags)
    if measures:
        check_only_job(jobs, "distill plan --measure")
    jobs, resolved = resolve_jobs(jobs)
    console = Console(highlight=False)
    for found in resolved:
        print_table(console, "mesh", mesh_rows(found))
        for line in mesh_drawing(found):
            console.print(f"  {line}", markup=False)
        print_table(console, "a step", step_rows(found))
        print_table(console, "the run", run_rows(found))
        print_table(console, "memory of a rank, GiB", memory_rows(found))
        print_warnings([found], console=console, printed=set())
        if measures:
            pace = measure(found)
            print_table(console, "seconds, measured here", pace_rows(found, pace))
            print_table(console, "expected", expected_rows(found, pace))
            if lines := verdict(pace.rows, plain(found.config)):
                print_table(console, "what these steps say", {str(n): line for n, line in enumerate(lines, start=1)})
    if jobs and not measures:
        launcher, folder = launcher_of(jobs[0].config.cluster.launcher), single_path(jobs[0]).absolute()
        print_table(console, "launch", {"folder": str(folder)})
        script = launcher.script(resolved[0], folder=folder, num_jobs=len(jobs))
        print(textwrap.indent(script.strip(), "  "))
        for name in teacher_nodes(resolved[0].config):
            print_table(console, "the job of the teacher" if name == ONLY else f"the job of {name}", {})
            print(textwrap.indent(launcher.teacher_script(resolved[0].config, name, folder=folder).strip(), "  "))
    return 0


def mesh_rows(resolved: ResolvedRun) -> Rows:
    engine, mesh, ranks = resolved.config.engine, resolved.config.mesh, resolved.ranks.trainers
    between = ", and the tokens between them" if mesh.sequence_parallel else ""
    axes = {
        "shard": "each takes a share of the sequences",
        "replicate": "copies of the sharded student",
        "context": "share each sequence",
        "tensor": f"share each layer's matrices{between}",
        "expert": "of the shard's ranks: share each layer's experts, and exchange tokens",
    }
    sizes = {axis: getattr(mesh, axis) for axis in axes if axis != "shard"}
    sizes["shard"] = ranks // (mesh.replicate * mesh.context * mesh.tensor)
    return {
        "ranks": f"{resolved.ranks.total} on {_devices(resolved)}",
        **roles_row(resolved),
        "student's engines": engine_row(resolved, engine.student),
        **{
            "teacher's engines" if name == ONLY else f"{name}'s engines": teacher_row(resolved, one, name)
            for name, one in teacher_configs(resolved.config).items()
        },
        **{axis: f"{sizes[axis]}: {use}" for axis, use in axes.items() if sizes[axis] > 1 or axis == "shard"},
        "of a rank": f"1/{ranks // mesh.replicate} of weights, gradients and optimizer",
    }


def teacher_row(resolved: ResolvedRun, alone: Config, name: str) -> str:
    """Say where a teacher scores, and by how many engines of how many ranks."""
    model = alone.model.teacher
    if model.is_student:
        return "the student's, with the teacher's weights" if model.moves_apart else "the student's"
    if model.addresses:
        return f"on a server: {model.shown}"
    if not model.has_job:
        return engine_row(resolved, alone.engine.teacher)
    job, size = job_config(resolved.config, name), alone.engine.teacher.tensor_parallel
    number = hardware.ranks_per_node(job) // size * job.cluster.nodes
    return f"{number}{own_nodes(job.cluster.nodes)}"


def engine_row(resolved: ResolvedRun, engine: EngineModelConfig) -> str:
    ranks = engine.tensor_parallel
    each = "1 rank" if ranks == 1 else f"{ranks} ranks that share its matrices"
    sleeps = resolved.ranks.on_gpus and engine.sleep is not False
    number = resolved.ranks.trainers
    if resolved.ranks.samplers:
        number = (resolved.ranks.samplers if engine is resolved.config.engine.student else engine.ranks) or number
    return f"{number // ranks}, each of {each}" + (", asleep while others work" if sleeps else "")


def mesh_drawing(resolved: ResolvedRun) -> list[str]:
    """Return each rank by its place: a line is one share of the sequences; nothing for a single rank."""
    mesh, ranks, per_node = resolved.config.mesh, resolved.ranks.trainers, resolved.ranks.per_node
    if ranks == 1:
        return []
    per_line, width = mesh.context * mesh.tensor, len(str(ranks - 1))
    shards, lines = ranks // (mesh.replicate * per_line), []
    for line in range(mesh.replicate * shards):
        first = line * per_line
        node = f"node {first // per_node}  " if resolved.ranks.num_nodes > 1 else ""
        replica = f"replicate {line // shards}  " if mesh.replicate > 1 else ""
        numbers = [f"{rank:{width}}" for rank in range(first, first + per_line)]
        groups = [f"[{' '.join(numbers[at : at + mesh.tensor])}]" for at in range(0, per_line, mesh.tensor)]
        lines.append(f"{node}{replica}shard {line % shards:<3} {' '.join(groups)}")
    legend = "rank numbers" + (", a bracket shares each layer's matrices" if mesh.tensor > 1 else "")
    legend += ", the brackets of a line share each sequence" if mesh.context > 1 else ""
    more = [f"... and {len(lines) - MOST_LINES} lines more"] if len(lines) > MOST_LINES else []
    return [*lines[:MOST_LINES], *more, f"({legend})"]


def step_rows(resolved: ResolvedRun) -> Rows:
    rollout, train, context = resolved.config.rollout, resolved.config.train, resolved.config.mesh.context
    sequences, length = rollout.prompts_per_step * rollout.generations_per_prompt, rollout.max_sequence_length
    rounds = micro_batches_per_update(resolved.config, num_ranks=resolved.ranks.trainers)
    how = ("packed" if train.packing else "padded") + (f", shared by {context} context ranks" if context > 1 else "")
    return {
        "sequences": f"{rollout.prompts_per_step} prompts x {rollout.generations_per_prompt} answers = {sequences}",
        "samples": step_row(resolved.config) if rollout.carry_over or rollout.staleness else None,
        "updates": f"{sequences} / {train.global_batch_size} sequences = {updates_per_step(resolved.config)}",
        "tokens": f"at most {sequences * length:,} ({length:,} a sequence)",
        "micro-batches": f"at most about {rounds} of {train.micro_batch_tokens:,} tokens, {how}, an update",
        "layout": layout_row(resolved),
    }


def run_rows(resolved: ResolvedRun) -> Rows:
    config, steps, train = resolved.config, resolved.num_steps, resolved.config.train
    validations, most = num_validations(config, steps), config.eval.max_samples
    teacher = ", and the teacher once" if config.eval.teacher else ""
    on = f"on {min(most, resolved.num_validation_rows or most)} prompts{teacher}"
    epochs = f", max_epochs {train.max_epochs}" if ends_by_epochs(config) else ""
    epoch = "not known: the data is streamed"
    if resolved.num_recorded_steps is not None:
        epoch = f"{resolved.num_recorded_steps:,} recorded steps"
    elif not ends_by_epochs(config):
        epoch = "each slot reads the data at its own pace (rollout.carry_over)"
    elif resolved.num_train_rows is not None:
        epoch = f"{resolved.num_train_rows // config.rollout.prompts_per_step:,} steps"
    return {
        "parameters": parameter_row(resolved),
        "trained": trained_row(resolved),
        **{
            "teacher's tokenizer" if name == ONLY else f"{name}'s tokenizer": text
            for name, text in resolved.tokenizers.items()
        },
        "rows": f"{training_rows(resolved)}, {validation_rows(resolved)} for validation",
        "epoch": epoch,
        "steps": f"{steps:,} (max_steps {train.max_steps:,}{epochs})",
        "validation": f"{validations} times {on}" if validations else unjudged_row(config),
        "checkpoints": checkpoint_row(resolved),
        "scores": scores_row(config, steps, hidden_bytes=hidden_bytes(resolved)),
    }


def unjudged_row(config: Config) -> str:
    """Say what is measured on validation's prompts if no verifier judges answers to them."""
    number = config.eval.record_samples if config.data.validation and config.data.verifier is None else 0
    return f"KL at {number} held-out prompts; no accuracy without data.verifier" if number else "none"


def num_validations(config: Config, steps: int) -> int:
    """Return how often a run of so many steps validates the student."""
    settings = config.eval
    if not validates(config):
        return 0
    periodic = steps // settings.period if settings.period else 0
    at_end = settings.at_end and not (settings.period and steps % settings.period == 0)
    return settings.at_start + periodic + at_end


def parameter_row(resolved: ResolvedRun) -> str:
    """Return the student's parameters, and those that compute a token if it has experts."""
    folder = resolved.student.folder
    total, active = param_counts.count(folder), param_counts.count_active(folder)
    return _count(total) + (f", {_count(active)} active" if active < total else "")


def trained_row(resolved: ResolvedRun) -> str | None:
    """Say how much of the student is trained, if it is not all of it."""
    lora = resolved.config.model.student.lora
    if not lora.rank:
        return None
    layers = targeted(model_files.shapes(resolved.student.folder), lora.targets)
    trained = param_counts.count_adapters(resolved.student.folder, rank=lora.rank, targets=lora.targets)
    sync = "as an adapter" * lora.syncs_adapter
    what = f"adapters of rank {lora.rank} on {len(layers)} linear layers: {trained:,} parameters"
    return f"{what}, with {_num_params(resolved):,} frozen ones, synced {sync or 'merged'}"


def checkpoint_row(resolved: ResolvedRun) -> str | None:
    """Return the disk that checkpoints take: what is trained in float32, and with it AdamW's two moments."""
    settings = resolved.config.checkpoint
    if not settings.enabled:
        return "none (checkpoint.enabled=false)"
    if resolved.config.model.student.lora.is_on:
        return None
    gib = 4 * _num_params(resolved) * (3 if settings.save_optimizer else 1) / 2**30
    kept = settings.keep_top_k + 2  # the newest, and the one that is being written
    return f"{gib:.3g} GiB each, every {settings.period} steps; up to {kept} of them, {kept * gib:.3g} GiB"


def scores_row(config: Config, steps: int, *, hidden_bytes: int) -> str | None:
    """Return the disk that the kept scores take if every answer is as long as it may be.

    Args:
        hidden_bytes: of the largest teacher's hidden state.
    """
    rollout = config.rollout
    tokens = rollout.max_sequence_length if rollout.environment else rollout.longest_answer
    sequences = rollout.prompts_per_step * rollout.generations_per_prompt
    token_bytes = 16 + (hidden_bytes if rollout.saves_hidden else 8 * config.loss.topk)
    gib = sequences * tokens * token_bytes / 2**30
    return f"at most {gib:.3g} GiB a step, {steps * gib:.3g} GiB of all" if rollout.save_scores else None


def hidden_bytes(resolved: ResolvedRun) -> int:
    """Return the bytes of the largest hidden state of the run's teachers."""
    sizes = [
        model_files.hidden_size(files.folder)
        * (4 if resolved.by_teacher()[name].config.model.teacher.dtype is Dtype.float32 else 2)
        for name, files in resolved.teachers.items()
    ]
    return max(sizes, default=0)


def memory_rows(resolved: ResolvedRun) -> Rows:
    """Return a rank's peak by part, in GiB, or why there is no prediction."""
    predicted, ranks = resolved.memory, resolved.ranks
    if predicted is None:
        return {"no prediction": resolved.no_memory}
    rows: Rows = {name: _gib(size) for name, size in predicted.parts.items()}
    total = hardware.gpu_memory() if ranks.on_gpus else hardware.host_memory()
    if total is None:
        folders = {name: files.folder for name, files in resolved.teachers.items()}
        for one in engines_of(resolved.config, resolved.student.folder, folders):
            if one.settings.kv_cache_gib is None:
                rows[one.name] = f"{one.settings.gpu_memory_utilization:.0%} of a GPU whose size is not known here"
    share, of = (1, "a GPU") if ranks.on_gpus else (ranks.per_node, f"the host's memory over {ranks.per_node} ranks")
    peak = f"{_gib(predicted.peak)}, at most, the trainer's in {predicted.moment}"
    return rows | {"peak": peak, "of": f"{_gib(total / share)}, {of}" if total else None}


def pace_rows(resolved: ResolvedRun, pace: Pace) -> Rows:
    """Return the seconds of each stage of a step, of a step, and of what does not happen in every step."""
    length = pace.mean_length
    ranks, times = resolved.ranks.total, ", ".join(f"{seconds:.2f}" for seconds in pace.steps)
    how = f"the median of {times}" if len(pace.steps) > 1 else "of one step"
    once = {
        "start": (pace.start, "once: imports, engines, the check of the first answers"),
        "teacher validated": (pace.teacher_validation, "once"),
        "a validation": (pace.validation, "its recorded answers included"),
        "a checkpoint": (pace.checkpoint, "in which training stops; the writing goes on meanwhile"),
    }
    where = f"{ranks} rank{'s' * (ranks > 1)} on {_devices(resolved)} of {platform.node()}"
    return {
        **{stage: f"{seconds:9.3f}" for stage, seconds in pace.stages.items()},
        "a step": f"{pace.step:9.3f}, {how}" + (f"; answers of {length:.0f} tokens" if length is not None else ""),
        "binds": pace.binding,
        **{name: f"{seconds:9.3f}, {text}" for name, (seconds, text) in once.items() if seconds is not None},
        "from": f"the first steps of this run, {where}; the first one is left out",
    }


def expected_rows(resolved: ResolvedRun, pace: Pace) -> Rows:
    """Return how long an epoch and the run will take if every step is as the measured ones."""
    config, steps, settings = resolved.config, resolved.num_steps, resolved.config.checkpoint
    parts = {
        "start": pace.start + (pace.teacher_validation or 0.0),
        f"{steps:,} steps": steps * pace.step,
        "validations": num_validations(config, steps) * (pace.validation or 0.0),
        "checkpoints": (steps // settings.period if settings.enabled else 0) * (pace.checkpoint or 0.0),
    }
    shares = ", ".join(f"{name} {clock(seconds)}" for name, seconds in parts.items() if seconds >= 0.5)
    rows, epoch = resolved.num_train_rows, (resolved.num_train_rows or 0) // config.rollout.prompts_per_step
    return {
        "an epoch": f"{clock(epoch * pace.step)} for {epoch:,} steps" if rows is not None else None,
        "the run": f"{clock(sum(parts.values()))} ({shares})",
        "if": "answers stay as long as they are now: sampling and scoring depend on their length",
    }


def _devices(resolved: ResolvedRun) -> str:
    return "GPUs" if resolved.ranks.on_gpus else "the CPU"


def _num_params(resolved: ResolvedRun) -> int:
    return param_counts.count(resolved.student.folder)


def _count(number: int) -> str:
    """Return 30532122624 as 30.5B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:9.3f}"


def print_table(console: Console, title: str, rows: Rows) -> None:
    console.print(rows_table(rows, title=title, min_width=18))
