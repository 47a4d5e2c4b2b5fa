"""Problems that a key's type cannot show: limits, and keys that contradict each other.

Reads nothing but the config, and the signature of a user's own divergence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from operator import attrgetter

from distill_cli.config.choices import nearest
from distill_cli.config.credentials import secret_problems
from distill_cli.config.derived import needed_length, parse_duration, scored_length, validates
from distill_cli.config.fields import LIMITS, declared_keys
from distill_cli.config.schema import Config, Tail
from distill_cli.losses.divergence import DIVERGENCES, PARAMETERS, parameter_problems, parameters_of
from distill_cli.metrics import METRICS, find

RESERVED_ENGINE_KWARGS = {
    *("model", "tokenizer", "revision", "dtype", "quantization", "trust_remote_code", "max_model_len", "seed"),
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "enforce_eager", "tensor_parallel_size", "load_format"),
    *("enable_prefix_caching", "logprobs_mode", "max_logprobs", "distributed_executor_backend", "enable_sleep_mode"),
    *("enable_chunked_prefill", "enable_lora", "max_loras", "max_lora_rank"),
}
"""Arguments of `vllm.LLM` that another key sets, or that the numbers rely on."""

MAX_ENGINE_RANK = 512
"""Largest rank of an adapter in vLLM."""


def config_problems(config: Config) -> list[str]:
    """Return one line for each value that cannot be: key=value: rule; fix."""
    checks = (_limits, _lora, _loss, _rollout, _train, _mesh, _data, _eval, _engine, _checkpoint, _search, _run)
    return [*(problem for check in checks for problem in check(config)), *secret_problems(asdict(config))]


def evaluation_problems(config: Config) -> list[str]:
    """Return the problems of an evaluation, which trains nothing, as `config_problems` does those of a run."""
    problems = [*_limits(config, ("eval.", "engine.", "cluster.")), *_eval(config), *_engine(config)]
    if not config.data.validation:
        problems.append("data.validation: a source is needed; choose data=... (distill ls data)")
    if config.data.verifier is None:
        problems.append("data.verifier=null: an evaluation needs one to judge the answers; choose one")
    return problems


def inert_overrides(config: Config, overrides: Sequence[str]) -> list[str]:
    """Return a warning for each override that has no effect given the other choices."""
    typed = {override.lstrip("+").split("=", 1)[0] for override in overrides}
    kind, reasons = config.loss.kl_type, {}
    for name in PARAMETERS:
        if f"loss.{name}" in typed and name not in parameters_of(kind):
            readers = " and ".join(known for known in DIVERGENCES if name in parameters_of(known))
            reasons[f"loss.{name}"] = f"with loss.kl_type={kind}: it is a parameter of {readers}"
    if config.data.teacher_context is None:
        reasons["data.teacher_prompt_template"] = "without data.teacher_context"
    if config.data.train.get("streaming"):
        reasons["train.max_epochs"] = "on a source that is streamed: train.max_steps ends the run"
    else:
        reasons["data.shuffle_buffer"] = "on a source that is not streamed: it is shuffled whole"
    reasons |= dict.fromkeys(("search.sampler", "search.seed"), "without search.trials")
    if not config.model.student.lora.is_on:
        keys = ("model.student.lora.alpha", "model.student.lora.sync")
        reasons |= dict.fromkeys(keys, "without model.student.lora.rank: no adapters are trained")
    return [f"{key} has no effect {reason}" for key, reason in reasons.items() if key in typed]


def _limits(config: Config, sections: tuple[str, ...] = ("",)) -> Iterator[str]:
    """Yield one line for each number outside the limits that its key declares."""
    for key, metadata in declared_keys(Config).items():
        limits = {name: metadata[name] for name in LIMITS if name in metadata}
        value = attrgetter(key)(config)
        if not limits or value is None or not key.startswith(sections):
            continue
        if not math.isfinite(value) or not all(LIMITS[name](value, bound) for name, bound in limits.items()):
            rule = " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in limits.items())
            yield f"{key}={value}: must be {rule}"


def _search(config: Config) -> Iterator[str]:
    if config.search.trials is not None:
        fix = "type it with `distill train -m` and a range or several values, or leave it out"
        yield f"search.trials={config.search.trials}: nothing is searched here; {fix}"


def _run(config: Config) -> Iterator[str]:
    name = config.run.name
    if name is not None and (name in ("", ".", "..") or "/" in name):
        yield f"run.name={name}: must name one folder in run.root; give one without /, or leave it out"
    if not config.run.root:
        yield "run.root=: is empty; give the folder of runs, or leave it out"


def _lora(config: Config) -> Iterator[str]:
    lora, at = config.model.student.lora, "model.student.lora"
    if lora.targets is not None and not lora.is_on:
        yield f"{at}.targets: no adapters are trained; give {at}.rank, or leave it out"
    if lora.targets == []:
        yield f"{at}.targets=[]: names no layer; null is every linear layer"
    if lora.rank and lora.syncs_adapter and lora.rank > MAX_ENGINE_RANK:
        yield f"{at}.rank={lora.rank}: must be at most {MAX_ENGINE_RANK} in vLLM; lower it, or set {at}.sync=merged"


def _loss(config: Config) -> Iterator[str]:
    loss = config.loss
    yield from parameter_problems(loss.kl_type, loss.parameters, kwargs=loss.kwargs)
    if loss.tail is Tail.renormalize and loss.topk == 1:
        yield "loss.topk=1: the loss is always zero with loss.tail=renormalize; raise it, or choose loss.tail=bucket"


def _rollout(config: Config) -> Iterator[str]:
    rollout, max_prompt, records = config.rollout, config.data.max_prompt_tokens, config.eval.record_samples
    if rollout.on_policy_fraction < 1 and rollout.environment is not None:
        rule = f"all sequences are the student's with rollout.environment={rollout.environment}"
        yield f"rollout.on_policy_fraction={rollout.on_policy_fraction}: {rule}; set it to 1"
    if rollout.replay is not None and rollout.save_scores:
        yield "rollout.save_scores=true: a replay trains on scores that are recorded already; leave it out"
    if rollout.replay is not None and records and not validates(config):
        rule = "a replay without validation has no engine to sample with; set it to 0, or set eval.period"
        yield f"eval.record_samples={records}: {rule}"
    if rollout.max_turns > 1 and rollout.environment is None:
        yield f"rollout.max_turns={rollout.max_turns}: needs an environment that answers; set rollout.environment"
    if rollout.top_k == 0:
        yield "rollout.top_k=0: must be at least 1, or -1 for all tokens"
    room = rollout.max_sequence_length - rollout.max_new_tokens
    if room < (max_prompt or 1):
        whole = f"rollout.max_sequence_length={rollout.max_sequence_length}"
        limit = f" of up to data.max_prompt_tokens={max_prompt}" if max_prompt else ""
        rule = f"leaves {max(room, 0)} of {whole} tokens for a prompt{limit}"
        yield f"rollout.max_new_tokens={rollout.max_new_tokens}: {rule}; lower it, or raise rollout.max_sequence_length"


def _train(config: Config) -> Iterator[str]:
    train, rollout = config.train, config.rollout
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        yield f"train.betas={train.betas}: must be two numbers from 0 to below 1"
    if train.cpu_offload and train.offload_optimizer:
        yield "train.offload_optimizer=true: train.cpu_offload=true keeps it in host memory already; drop one"
    num_sequences = rollout.prompts_per_step * rollout.generations_per_prompt
    if train.global_batch_size >= 1 and num_sequences % train.global_batch_size:
        factors = f"{rollout.prompts_per_step} x rollout.generations_per_prompt={rollout.generations_per_prompt}"
        rule = f"must divide the {num_sequences} sequences of a step (rollout.prompts_per_step={factors})"
        yield f"train.global_batch_size={train.global_batch_size}: {rule}"
    if train.micro_batch_tokens < rollout.max_sequence_length:
        rule = f"must be at least rollout.max_sequence_length={rollout.max_sequence_length}, to hold one sequence"
        yield f"train.micro_batch_tokens={train.micro_batch_tokens}: {rule}; raise it, or lower the other"


def _mesh(config: Config) -> Iterator[str]:
    mesh = config.mesh
    if mesh.sequence_parallel and mesh.tensor == 1:
        yield "mesh.sequence_parallel=true: needs tensor-parallel ranks; raise mesh.tensor, or leave it out"
    if config.train.compile and mesh.tensor > 1:
        yield f"train.compile=true: gives wrong gradients with mesh.tensor={mesh.tensor} in this torch; turn one off"


def mesh_problems(config: Config, *, ranks_per_node: int) -> Iterator[str]:
    """Yield one line for each axis of the mesh that the ranks of the job cannot form."""
    sizes = {f"mesh.{name}": getattr(config.mesh, name) for name in ("tensor", "context", "replicate")}
    num_ranks, product = ranks_per_node * config.cluster.nodes, math.prod(sizes.values())
    data_ranks = num_ranks // max(config.mesh.tensor * config.mesh.context, 1)
    if product >= 1 and num_ranks % product:
        shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
        divisors = ", ".join(str(size) for size in range(1, num_ranks + 1) if num_ranks % size == 0)
        rule = f"their product {product} must divide the {num_ranks} ranks"
        yield f"{shown}: {rule}; choose sizes whose product is one of {divisors}, or another number of ranks"
    elif data_ranks > config.train.global_batch_size:
        rule = f"fewer sequences than the {data_ranks} ranks that share them"
        fix = "raise it, or lower cluster.ranks_per_node or cluster.gpus_per_node"
        yield f"train.global_batch_size={config.train.global_batch_size}: {rule}; {fix}"


def _data(config: Config) -> Iterator[str]:
    data = config.data
    for name, parts in (("prompt_template", ["question"]), ("teacher_prompt_template", ["question", "context"])):
        template = getattr(data, name)
        yield from (
            f"data.{name}={template!r}: must contain {{{part}}}" for part in parts if f"{{{part}}}" not in template
        )
    if not data.train and config.rollout.replay is None:
        yield "data.train: a source is needed; choose data=... (distill ls data)"
    if validates(config) and data.verifier is None:
        fix = "choose exact, or turn validation off with data.validation=null"
        yield f"data.verifier=null: validation needs one to judge the answers; {fix}"


def _eval(config: Config) -> Iterator[str]:
    if config.eval.repeat > 1 and config.eval.temperature == 0:
        yield f"eval.repeat={config.eval.repeat}: greedy answers are all the same; set eval.temperature above 0"


def _engine(config: Config) -> Iterator[str]:
    for role, needed in (("student", needed_length(config)), ("teacher", scored_length(config))):
        engine, at = getattr(config.engine, role), f"engine.{role}"
        if engine.max_model_len is not None and engine.max_model_len < needed:
            yield f"{at}.max_model_len={engine.max_model_len}: sequences have up to {needed} tokens; leave it out"
        for name in sorted(RESERVED_ENGINE_KWARGS & {str(key) for key in engine.kwargs}):
            yield f"{at}.kwargs.{name}: is set by distill, which relies on it; leave it out"


def _checkpoint(config: Config) -> Iterator[str]:
    checkpoint, at = config.checkpoint, f"checkpoint.metric={config.checkpoint.metric}"
    metric, known = find(checkpoint.metric), [metric.name for metric in METRICS if metric.ranks_checkpoints]
    if metric is None or metric.name not in known:
        rule = "no such metric" if metric is None else "does not rank checkpoints"
        fix = nearest(checkpoint.metric, known) or "; choose a train/, rollout/ or val/ metric (docs/metrics.md)"
        yield f"{at}: {rule}{fix}"
    elif metric.needs and config.rollout.replay is None and not attrgetter(metric.needs)(config):
        yield f"{at}: never recorded without {metric.needs}; set it, or choose another"
    elif metric.better is None and checkpoint.higher_is_better is None:
        yield f"checkpoint.higher_is_better=null: {at} has no better direction of its own; set true or false"
    if checkpoint.must_save_by is not None and parse_duration(checkpoint.must_save_by) is None:
        yield f"checkpoint.must_save_by={checkpoint.must_save_by}: must be DD:HH:MM:SS, such as 00:03:45:00"
