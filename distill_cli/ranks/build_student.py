"""Build the model that is trained, the loss that it minimises, its optimizer, and what saves them."""

from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from distill_cli.checkpoint.saver import Saver, Trainable
from distill_cli.checkpoint.store import prune
from distill_cli.config.derived import ends_by_epochs, updates_per_step
from distill_cli.config.loss_schema import Alignment
from distill_cli.config.schema import Config, Precision
from distill_cli.config.teachers import teacher_configs
from distill_cli.folders.run_dir import RunDir
from distill_cli.losses import divergence, token_weight
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective, TokenWeight
from distill_cli.models.model_files import fingerprint
from distill_cli.parallel.mesh import Parallel
from distill_cli.ranks.build_source import Order
from distill_cli.resolved import ResolvedRun
from distill_cli.student.adapters import add_adapters
from distill_cli.student.model import Student, build_lm, wrap
from distill_cli.student.optimizer import OptimizerOffload, build_optimizer, build_schedule
from distill_cli.student.published import Published
from distill_cli.student.weights import load_weights


def build_loss(config: Config) -> DistillLoss:
    """Build the loss of the config. Raises ConfigError if it cannot be built."""
    loss = config.loss
    kwargs = divergence.SIGNATURES.taken(loss.kl_type, loss.kwargs)
    return DistillLoss(kl_type=loss.kl_type, tail=loss.tail.value, **loss.parameters, **kwargs)


def build_objective(config: Config) -> Objective:
    """Build what the config's `loss` section minimises. Raises ConfigError if it cannot be built."""
    loss, weight, family = config.loss, None, token_weight.SIGNATURES
    if (name := loss.token_weight) is not None:
        function = family.resolve(name, **loss.weight_parameters, **family.taken(name, loss.kwargs))
        weight = TokenWeight(function, family.positional_of(name))
    return Objective(
        build_loss(config),
        temperature=loss.temperature,
        support=loss.support.value,
        topk=loss.topk,
        divergence_weight=loss.divergence_weight,
        weight=weight,
        clip=loss.token_clip,
        policy_gradient=loss.policy_gradient,
        likelihood=loss.likelihood,
        max_ratio=loss.max_ratio,
        by_rank=loss.alignment is Alignment.rank,
    )


def build_own_objectives(config: Config) -> dict[int, Objective]:
    """Return the objectives of the teachers whose loss is not the run's, by `Prompt.teachers`."""
    alone = enumerate(teacher_configs(config).values())
    return {1 << index: build_objective(one) for index, one in alone if one.loss != config.loss}


Built = tuple[PreTrainedModel, Published]
"""A model without its weights, and where they lie."""


def build_model(resolved: ResolvedRun, *, role: str = "student") -> Built:
    """Build `model.<role>` in the student's code, without its weights."""
    return build_lm(resolved.model(role).folder, trust_remote_code=resolved.config.model.trust_remote_code)


def build_student(resolved: ResolvedRun, parallel: Parallel, built: Built, *, role: str = "student") -> Student:
    """Read a model's weights, laid out over the mesh. A collective.

    Args:
        role: the model's; the teacher gets no adapters.
    """
    config, model, train = resolved.config, resolved.config.model, resolved.config.train
    (lm, published), lora, bf16 = built, model.student.lora, train.precision is Precision.bf16
    if lora.rank and role == "student":
        add_adapters(lm, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, bf16=bf16)
    ends = resolved.vocabulary.merged_eos_ids
    student = Student(
        lm,
        objective=build_objective(config),
        own_objectives=build_own_objectives(config),
        has_advantages=config.loss.has_advantages,
        parallel=parallel,
        merged_eos_ids=ends,
        published=published,
        router_aux_loss=train.router_aux_loss if role == "student" else 0.0,
    )
    if ends and lm.generation_config is not None:
        lm.generation_config.eos_token_id = list(ends)  # samplers of the saved student then stop where training did
    kept, offload = train.activation_checkpointing, train.cpu_offload
    wrap(student, parallel, bf16=bf16, checkpointing=kept.value, compile=train.compile, cpu_offload=offload)
    home = torch.device("cpu") if offload else parallel.device
    load_weights(lm, published, device=home, seed=train.seed)
    return student


def build_trainable(resolved: ResolvedRun, student: Student, *, num_steps: int, device: torch.device) -> Trainable:
    """Build the student's optimizer and schedule; with the student they are what a checkpoint holds."""
    config, train = resolved.config, resolved.config.train
    beta1, beta2 = train.betas
    decay, warmup, num_updates = train.weight_decay, train.warmup_updates, num_steps * updates_per_step(config)
    optimizer = build_optimizer(student, lr=train.lr, betas=(beta1, beta2), eps=train.eps, weight_decay=decay)
    schedule = build_schedule(optimizer, kind=train.schedule.value, warmup_updates=warmup, num_updates=num_updates)
    base = fingerprint(resolved.student.folder) if config.model.student.lora.is_on else None
    trainable = Trainable(student.lm, optimizer, schedule, base)
    if train.offload_optimizer and device.type == "cuda":
        offload = OptimizerOffload(optimizer, rest=torch.device("cpu"), work=device)
        return replace(trainable, after_load=offload.to_rest)
    return trainable


def count_steps(config: Config, order: Order) -> int:
    """Return the number of steps of the whole run."""
    if not ends_by_epochs(config):
        return config.train.max_steps
    return int(min(config.train.max_steps, config.train.max_epochs * order.steps_per_epoch))


def build_saver(config: Config, run: RunDir, trainable: Trainable, *, last_step: int = 0) -> Saver:
    """Build the writer of the run's checkpoints; `last_step` is the last completed step. A collective."""
    settings = config.checkpoint
    return Saver(
        run,
        trainable,
        last_step=last_step,
        prune=partial(prune, settings=settings),
        save_optimizer=settings.save_optimizer,
        async_save=settings.async_save,
    )
