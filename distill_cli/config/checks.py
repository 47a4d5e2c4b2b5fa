"""What no single key can tell: ranges, and keys that contradict each other. Reads nothing but the config, and the
signature of a divergence of the user's own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import reduce

from distill_cli.config.choices import nearest
from distill_cli.config.credentials import secret_problems
from distill_cli.config.derived import (
    needed_length,
    parse_duration,
    scored_length,
    validates,
)
from distill_cli.config.schema import Config
from distill_cli.losses.divergence import DIVERGENCES, PARAMETERS, parameter_problems, parameters_of
from distill_cli.metrics import METRICS, find

RESERVED_ENGINE_KWARGS = {
    *("model", "tokenizer", "revision", "dtype", "quantization", "trust_remote_code", "max_model_len", "seed"),
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "enforce_eager", "tensor_parallel_size", "load_format"),
    *("enable_prefix_caching", "logprobs_mode", "max_logprobs", "distributed_executor_backend", "enable_sleep_mode"),
    "enable_chunked_prefill",
    *("enable_lora", "max_loras", "max_lora_rank"),
}
"""Arguments of `vllm.LLM` that another key sets, or that the right numbers rest on."""

MAX_ENGINE_RANK = 512
"""Of an adapter in vLLM."""


def config_problems(config: Config) -> list[str]:
    """One line for each value that cannot be: what, value, rule, fix."""
    return [
        *_lora(config),
        *_loss(config),
        *_rollout(config),
        *_train(config),
        *_mesh(config),
        *_data(config),
        *_eval(config),
        *_engine(config),
        *_checkpoint(config),
        *_cluster(config),
        *secret_problems(asdict(config)),
        *_search(config),
        *_run(config),
    ]


def evaluation_problems(config: Config) -> list[str]:
    """What `config_problems` is for an evaluation, which trains nothing."""
    problems = [*_eval(config), *_engine(config), *_cluster(config)]
    if not config.data.validation:
        problems.append("data.validation: a source is needed; choose data=... (distill ls data)")
    if config.data.verifier is None:
        problems.append("data.verifier=null: an evaluation needs one to call an answer right; choose one")
    return problems


def inert_overrides(config: Config, overrides: Sequence[str]) -> list[str]:
    """Warnings: keys that were typed and that what was chosen with them does not read."""
    typed = {override.lstrip("+").split("=", 1)[0] for override in overrides}
    kind, warnings = config.loss.kl_type, []
    for name in PARAMETERS:
        if f"loss.{name}" in typed and name not in parameters_of(kind):
            readers = " and ".join(known for known in DIVERGENCES if name in parameters_of(known))
            warnings.append(f"loss.{name} has no effect with loss.kl_type={kind}: it is a parameter of {readers}")
    if "data.teacher_prompt_template" in typed and config.data.teacher_context is None:
        warnings.append("data.teacher_prompt_template has no effect without data.teacher_context")
    if config.data.train.get("streaming"):
        if "train.max_epochs" in typed:
            warnings.append("train.max_epochs has no effect on a source that is streamed: train.max_steps ends the run")
    elif "data.shuffle_buffer" in typed:
        warnings.append("data.shuffle_buffer has no effect on a source that is not streamed: it is shuffled whole")
    for key in sorted(typed & {"search.sampler", "search.seed"}):
        warnings.append(f"{key} has no effect without search.trials")
    if not config.model.student.lora.is_on:
        for key in sorted(typed & {"model.student.lora.alpha", "model.student.lora.sync"}):
            warnings.append(f"{key} has no effect: no adapters are trained (model.student.lora.rank)")
    return warnings


def _search(config: Config) -> Iterator[str]:
    if config.search.trials is not None:
        yield (
            f"search.trials={config.search.trials}: nothing is searched here; type it with `distill train -m` and a "
            "range or several values, or leave it out"
        )


def _run(config: Config) -> Iterator[str]:
    name = config.run.name
    if name is not None and (name in ("", ".", "..") or "/" in name):
        yield f"run.name={name}: is the name of one folder in run.root; give one without /, or leave it out"
    if not config.run.root:
        yield "run.root=: is empty; give the folder that runs go to, or leave it out"
    yield from _at_least("run.print_every", config.run.print_every, 1)


def _lora(config: Config) -> Iterator[str]:
    lora = config.model.student.lora
    if lora.rank is not None:
        yield from _at_least("model.student.lora.rank", lora.rank, 0)
    yield from _above_zero("model.student.lora.alpha", lora.alpha)
    if lora.targets is not None and not lora.is_on:
        yield "model.student.lora.targets: no adapters are trained; give model.student.lora.rank, or leave it out"
    if lora.targets == []:
        yield "model.student.lora.targets=[]: names no layer; null is every linear layer"
    if lora.syncs_adapter and lora.rank > MAX_ENGINE_RANK:
        yield (
            f"model.student.lora.rank={lora.rank}: vLLM's adapters have at most rank {MAX_ENGINE_RANK}; lower it, or "
            "set model.student.lora.sync=merged"
        )


def _loss(config: Config) -> Iterator[str]:
    loss = config.loss
    yield from parameter_problems(loss.kl_type, loss.parameters, kwargs=loss.kwargs)
    yield from _at_least("loss.topk", loss.topk, 1)
    yield from _above_zero("loss.temperature", loss.temperature)
    if loss.tail.value == "renormalize" and loss.topk == 1:
        yield "loss.topk=1: the loss is always zero with loss.tail=renormalize; raise it, or choose loss.tail=bucket"


def _rollout(config: Config) -> Iterator[str]:
    rollout, prompt_tokens = config.rollout, config.data.max_prompt_tokens or 1
    yield from _at_least("rollout.prompts_per_step", rollout.prompts_per_step, 1)
    yield from _at_least("rollout.generations_per_prompt", rollout.generations_per_prompt, 1)
    yield from _at_least("rollout.max_new_tokens", rollout.max_new_tokens, 1)
    yield from _sampling("rollout", rollout.temperature, rollout.top_p)
    yield from _within("rollout.on_policy_fraction", rollout.on_policy_fraction, 0, 1)
    if rollout.on_policy_fraction < 1 and rollout.environment is not None:
        yield (
            f"rollout.on_policy_fraction={rollout.on_policy_fraction}: with rollout.environment={rollout.environment} "
            "all sequences are the student's; set it to 1"
        )
    if rollout.replay is not None and rollout.save_scores:
        yield "rollout.save_scores=true: what a replay trains on is recorded already; leave it out"
    if rollout.replay is not None and config.eval.record_samples and not validates(config):
        yield (
            f"eval.record_samples={config.eval.record_samples}: a replay that validates nothing has no engine to "
            "answer with; set it to 0, or eval.period"
        )
    yield from _at_least("rollout.max_turns", rollout.max_turns, 1)
    if rollout.max_turns > 1 and rollout.environment is None:
        yield f"rollout.max_turns={rollout.max_turns}: nobody answers a turn; set rollout.environment"
    yield from _within("rollout.max_truncated_rate", rollout.max_truncated_rate, 0, 1)
    if rollout.top_k == 0 or rollout.top_k < -1:
        yield f"rollout.top_k={rollout.top_k}: must be at least 1, or -1 for all tokens"
    room = rollout.max_sequence_length - rollout.max_new_tokens
    if room < prompt_tokens:
        yield (
            f"rollout.max_new_tokens={rollout.max_new_tokens}: leaves {max(room, 0)} of "
            f"rollout.max_sequence_length={rollout.max_sequence_length} tokens for a prompt"
            + (f" of up to data.max_prompt_tokens={prompt_tokens}" if config.data.max_prompt_tokens else "")
            + "; lower it, or raise rollout.max_sequence_length"
        )


def _train(config: Config) -> Iterator[str]:
    train, rollout = config.train, config.rollout
    for name in ("max_steps", "max_epochs", "global_batch_size", "max_bad_updates"):
        yield from _at_least(f"train.{name}", getattr(train, name), 1)
    for name in ("lr", "max_grad_norm", "eps"):
        yield from _above_zero(f"train.{name}", getattr(train, name))
    for name in ("warmup_updates", "weight_decay", "seed"):
        yield from _at_least(f"train.{name}", getattr(train, name), 0)
    if train.seed >= 2**32:
        yield f"train.seed={train.seed}: must be below 2**32, as the engines' seeds are"
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        yield f"train.betas={train.betas}: must be two numbers from 0 to below 1"
    if train.cpu_offload and train.offload_optimizer:
        yield "train.offload_optimizer=true: train.cpu_offload=true keeps it in host memory already; drop one"
    sequences = rollout.prompts_per_step * rollout.generations_per_prompt
    if train.global_batch_size >= 1 and sequences % train.global_batch_size:
        yield (
            f"train.global_batch_size={train.global_batch_size}: must divide the {sequences} sequences of a step "
            f"(rollout.prompts_per_step={rollout.prompts_per_step} x "
            f"rollout.generations_per_prompt={rollout.generations_per_prompt})"
        )
    if train.micro_batch_tokens < rollout.max_sequence_length:
        yield (
            f"train.micro_batch_tokens={train.micro_batch_tokens}: a sequence of "
            f"rollout.max_sequence_length={rollout.max_sequence_length} tokens does not fit; raise the one or lower "
            "the other"
        )


def _mesh(config: Config) -> Iterator[str]:
    mesh = config.mesh
    for name in ("tensor", "context", "replicate"):
        yield from _at_least(f"mesh.{name}", getattr(mesh, name), 1)
    if mesh.sequence_parallel and mesh.tensor == 1:
        yield "mesh.sequence_parallel=true: needs tensor-parallel ranks; raise mesh.tensor, or leave it out"
    if config.train.compile and mesh.tensor > 1:
        yield (
            f"train.compile=true: gives wrong gradients with mesh.tensor={mesh.tensor} in this torch; turn one of them "
            "off"
        )


def mesh_problems(config: Config, *, ranks_per_node: int) -> Iterator[str]:
    """One line for each layout that the ranks of the job cannot take."""
    mesh, num_ranks = config.mesh, ranks_per_node * config.cluster.nodes
    taken = mesh.tensor * mesh.context * mesh.replicate
    if taken >= 1 and num_ranks % taken:
        fits = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
        yield (
            f"mesh.tensor={mesh.tensor}, mesh.context={mesh.context}, mesh.replicate={mesh.replicate}: their product "
            f"{taken} must divide the {num_ranks} ranks; choose sizes whose product is one of {_listed(fits)}, or "
            "another number of ranks"
        )
        return
    data_ranks = num_ranks // max(mesh.tensor * mesh.context, 1)
    if data_ranks > config.train.global_batch_size:
        yield (
            f"train.global_batch_size={config.train.global_batch_size}: fewer sequences than the {data_ranks} ranks "
            "that share them; raise it, or lower cluster.ranks_per_node or cluster.gpus_per_node"
        )


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def _data(config: Config) -> Iterator[str]:
    if config.data.max_prompt_tokens is not None:
        yield from _at_least("data.max_prompt_tokens", config.data.max_prompt_tokens, 1)
    if config.data.max_teacher_prompt_tokens is not None:
        yield from _at_least("data.max_teacher_prompt_tokens", config.data.max_teacher_prompt_tokens, 1)
    yield from _at_least("data.shuffle_buffer", config.data.shuffle_buffer, 1)
    for part in ("{question}", "{context}"):
        if part not in config.data.teacher_prompt_template:
            yield f"data.teacher_prompt_template={config.data.teacher_prompt_template!r}: must contain {part}"
    if "{question}" not in config.data.prompt_template:
        yield f"data.prompt_template={config.data.prompt_template!r}: must contain {{question}}"
    if not config.data.train and config.rollout.replay is None:
        yield "data.train: a source is needed; choose data=... (distill ls data)"
    if validates(config) and config.data.verifier is None:
        yield (
            "data.verifier=null: validation needs one to call an answer right; choose exact, or turn validation off "
            "with data.validation=null"
        )


def _eval(config: Config) -> Iterator[str]:
    yield from _at_least("eval.period", config.eval.period, 0)
    yield from _at_least("eval.max_samples", config.eval.max_samples, 1)
    yield from _at_least("eval.batch_size", config.eval.batch_size, 1)
    yield from _at_least("eval.record_samples", config.eval.record_samples, 0)
    yield from _at_least("eval.repeat", config.eval.repeat, 1)
    if config.eval.repeat > 1 and config.eval.temperature == 0:
        yield f"eval.repeat={config.eval.repeat}: greedy answers are all the same; set eval.temperature above 0"
    yield from _sampling("eval", config.eval.temperature, config.eval.top_p)
    if config.eval.max_new_tokens is not None:
        yield from _at_least("eval.max_new_tokens", config.eval.max_new_tokens, 1)


def _engine(config: Config) -> Iterator[str]:
    for role, engine, least in (
        ("student", config.engine.student, needed_length(config)),
        ("teacher", config.engine.teacher, scored_length(config)),
    ):
        if engine.max_model_len is not None and engine.max_model_len < least:
            yield (
                f"engine.{role}.max_model_len={engine.max_model_len}: sequences of up to {least} "
                "tokens come to it; leave it out"
            )
        if engine.kv_cache_gib is not None:
            yield from _above_zero(f"engine.{role}.kv_cache_gib", engine.kv_cache_gib)
        for name in sorted(RESERVED_ENGINE_KWARGS & {str(key) for key in engine.kwargs}):
            yield f"engine.{role}.kwargs.{name}: is set by distill, which relies on it; leave it out"
        if not 0 < engine.gpu_memory_utilization <= 1:
            yield f"engine.{role}.gpu_memory_utilization={engine.gpu_memory_utilization}: must lie above 0 and up to 1"


def _checkpoint(config: Config) -> Iterator[str]:
    checkpoint = config.checkpoint
    yield from _at_least("checkpoint.period", checkpoint.period, 1)
    yield from _at_least("checkpoint.keep_top_k", checkpoint.keep_top_k, 0)
    metric, known = find(checkpoint.metric), [metric.name for metric in METRICS if metric.ranks_checkpoints]
    if metric is None or metric.name not in known:
        what = "no such metric" if metric is None else "does not rank checkpoints"
        choice = nearest(checkpoint.metric, known) or "; choose a train/, rollout/ or val/ metric (docs/metrics.md)"
        yield f"checkpoint.metric={checkpoint.metric}: {what}{choice}"
    elif metric.needs and config.rollout.replay is None and not reduce(getattr, metric.needs.split("."), config):
        yield f"checkpoint.metric={checkpoint.metric}: never recorded without {metric.needs}; set it, or choose another"
    elif metric.better is None and checkpoint.higher_is_better is None:
        yield (
            f"checkpoint.higher_is_better=null: checkpoint.metric={checkpoint.metric} is not better high or low by "
            "itself; set true or false"
        )
    if checkpoint.must_save_by is not None and parse_duration(checkpoint.must_save_by) is None:
        yield f"checkpoint.must_save_by={checkpoint.must_save_by}: must be DD:HH:MM:SS, such as 00:03:45:00"


def _cluster(config: Config) -> Iterator[str]:
    least = {"max_restarts": 0, "hang_timeout_s": 0, "grace_s": 0, "gpus_per_node": 0}
    for name, low in (least | {"nodes": 1, "ranks_per_node": 1, "parallel_jobs": 1}).items():
        if (value := getattr(config.cluster, name)) is not None:
            yield from _at_least(f"cluster.{name}", value, low)


def _sampling(group: str, temperature: float, top_p: float) -> Iterator[str]:
    yield from _at_least(f"{group}.temperature", temperature, 0)
    if not 0 < top_p <= 1:
        yield f"{group}.top_p={top_p}: must lie above 0 and up to 1"


def _within(key: str, value: float, low: float, high: float) -> Iterator[str]:
    if not low <= value <= high:
        yield f"{key}={value}: must lie in {low}..{high}"


def _at_least(key: str, value: float, low: float) -> Iterator[str]:
    if not low <= value < math.inf:
        yield f"{key}={value}: must be at least {low}"


def _above_zero(key: str, value: float) -> Iterator[str]:
    if not 0 < value < math.inf:
        yield f"{key}={value}: must be above 0"
