"""Check the teachers before the first step, and that a resumed run has the same ones (`engines.handshake`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from distill_cli.config.schema import Dtype
from distill_cli.config.teachers import ONLY, model_key
from distill_cli.data.prompts import PromptMaker
from distill_cli.engines import handshake
from distill_cli.engines.base import Teacher
from distill_cli.engines.guarded import GuardedTeacher
from distill_cli.engines.handshake import Probe
from distill_cli.engines.moving import MovingTeacher
from distill_cli.engines.server_info import Info
from distill_cli.errors import ConfigError, Unrecoverable
from distill_cli.folders.run_dir import RunDir
from distill_cli.models.model_files import fingerprint
from distill_cli.ranks.build_source import Rank, prompt_settings
from distill_cli.resolved import ResolvedRun
from distill_cli.rollout.stages import Stages
from distill_cli.student.teacher_head import TeacherHeads
from distill_cli.types import Example, TeacherScores

QUESTIONS = (
    "Which number is larger, 17 or 23?",
    "Name three colours of the rainbow, and say which of them you like best.",
    "What is the capital of France?",
    "Write one sentence about the sea.",
)


@dataclass(frozen=True)
class Identity:
    """What tells a teacher from another one."""

    path: str | None
    revision: str | None
    weights: str | None
    """`model_files.fingerprint`; None if it is not known, as that of a server of vLLM: its scores decide."""


def guard(resolved: ResolvedRun, teacher: Teacher, *, name: str) -> GuardedTeacher:
    """Guard the run's only teacher; `name` is its among several."""
    model, loss = resolved.config.model.teacher, resolved.config.loss
    shown = "the teacher" if name == ONLY else f"the teacher {name}"
    limit = handshake.ROUNDED
    if model.is_served:
        limit = handshake.NEARLY_EXACT if info_of(teacher).dtype == "float32" else limit
    elif model.dtype is Dtype.float32 and not resolved.ranks.on_gpus:
        limit = handshake.EXACT
    return GuardedTeacher(
        teacher,
        name=f"{shown} ({model.shown})",
        topk=loss.topk,
        vocab_size=resolved.vocabulary.size,
        temperature=loss.temperature,
        limit=limit,
    )


def shake_hands(
    rank: Rank, run: RunDir, teachers: Sequence[Teacher], stages: Stages, heads: TeacherHeads | None = None
) -> list[Teacher]:
    """Check each teacher, and return them guarded. A collective.

    The first attempt writes down who they are; each one after it compares.

    Args:
        heads: takes the teachers' heads, with which their hidden states must give their scores.

    Raises:
        ConfigError: the run began with another teacher under a name.
        Unrecoverable: a teacher's scores are not what the loss takes them for.
    """
    guarded: list[Teacher] = []
    alone_by_name = rank.resolved.by_teacher().items()
    for index, ((name, alone), teacher) in enumerate(zip(alone_by_name, teachers, strict=True)):
        one, file = guard(alone, teacher, name=name), run.teachers / f"{name}.safetensors"
        is_moving = isinstance(teacher, MovingTeacher)
        is_known = bool(rank.parallel.all_max(float(rank.parallel.is_main and file.exists())))
        with stages.awake(one), stages("handshake"):
            for answer in one.shake_hands(probe_prompts(rank, name)):
                if answer.problem is not None:
                    raise Unrecoverable(f"{one.name} {answer.problem}; see `distill check`")
            if heads is not None:
                heads.read(index, one.head)
                temperature = alone.config.loss.temperature
                error = head_error(heads, index, teacher, one.probe, temperature=temperature)
                if error is not None and not error < one.limit:
                    problem = f"does not score by its hidden states and head: {error:.2g} nats off"
                    raise Unrecoverable(f"{one.name} {problem} (limit {one.limit:g}); see `distill check`")
            if is_moving:
                one.forget()
            elif is_known:
                check_identity(file, identity_of(alone, teacher), one, key=model_key(name))
        if rank.parallel.is_main and not is_known and not is_moving:
            write_identity(file, identity_of(alone, teacher), one)
        guarded.append(one)
    stages.check_stop()
    return guarded


def head_error(heads: TeacherHeads, index: int, teacher: Teacher, probe: Probe, *, temperature: float) -> float | None:
    """Return by how much an awake teacher's scores differ from those by its hidden states and the trainer's copy of its
    head: nats. A collective.

    Returns:
        None if a rank's teacher was interrupted.
    """
    found = teacher.score(probe.sequences, response_starts=probe.starts, hidden=True)
    if heads.parallel.all_max(float(not all(len(scores.hidden) for scores in found))):
        return None
    scores, hidden = TeacherScores.cat(probe.scores), TeacherScores.cat(found).hidden
    logp_RK = heads.logp_at(index, hidden, scores.topk_ids, temperature=temperature)
    return handshake.top_difference(scores, logp_RK)


def probe_prompts(rank: Rank, name: str) -> list[list[int]]:
    """Return the handshake's questions as a teacher reads them, cut to what its engine takes."""
    settings = prompt_settings(rank.resolved)
    index = [teacher.name for teacher in settings.teachers].index(name)
    make, room = PromptMaker(rank.tokenizer, settings, is_scored=False), rank.resolved.lengths.teacher
    most = max(1, min(room - handshake.ANSWER_TOKENS, rank.resolved.lengths.prompt))
    ids, tokenizer = [], settings.teachers[index].tokenizer or rank.tokenizer
    for number, question in enumerate(QUESTIONS):
        prompt = make(Example(question), number)
        found = {target.teacher: prompt.ids_for(target) for target in prompt.targets} if prompt is not None else {}
        ids.append((found.get(index) or tokenizer.encode(question, add_special_tokens=False))[:most])
    return ids


def info_of(teacher: Teacher) -> Info:
    """Return what the servers of a teacher say of themselves."""
    from distill_cli.engines.http_teacher import HttpTeacher  # its libraries take a while to import

    assert isinstance(teacher, HttpTeacher)
    return teacher.info()


def identity_of(resolved: ResolvedRun, teacher: Teacher) -> Identity:
    """Return the identity of the run's only teacher."""
    model = resolved.config.model.teacher
    if model.is_served:
        info = info_of(teacher)
        return Identity(info.path, info.revision, info.digest)
    return Identity(model.path, model.revision, fingerprint(resolved.model(ONLY).folder))


def write_identity(file: Path, identity: Identity, teacher: GuardedTeacher) -> None:
    """Write down who a teacher is, with the probe of its handshake."""
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".tmp")
    metadata = {"identity": json.dumps(asdict(identity))}
    save_file(handshake.to_tensors(teacher.probe), temporary, metadata=metadata)
    temporary.rename(file)


def check_identity(file: Path, now: Identity, teacher: GuardedTeacher, *, key: str) -> None:
    """Raise ConfigError or Unrecoverable if the awake teacher is not the one that was written down."""
    with safe_open(file, framework="pt") as stored:
        before = Identity(**json.loads(stored.metadata()["identity"]))
        probe = handshake.from_tensors({key: stored.get_tensor(key) for key in stored.keys()})  # noqa: SIM118
    if None not in (before.weights, now.weights) and before.weights != now.weights:
        what = f"{key}: {now.path}: its weights are not those that the run began with ({before.path})"
        raise ConfigError(f"{what}; restore them, or start a new run")
    teacher.compare(probe)
