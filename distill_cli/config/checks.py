"""Check what a key's type cannot express: limits, and keys that contradict each other.

Reads nothing but the config, and the signature of a user's own divergence.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from operator import attrgetter
from typing import Any

from distill_cli.config.choices import nearest
from distill_cli.config.credentials import secret_problems
from distill_cli.config.derived import (
    ends_by_epochs,
    needed_length,
    parse_duration,
    scored_length,
    validates,
)
from distill_cli.config.execution_schema import Roles
from distill_cli.config.fields import LIMITS, declared_keys
from distill_cli.config.layout_checks import Problems, role_problems
from distill_cli.config.loss_schema import Alignment, LossConfig, Support, Tail
from distill_cli.config.schema import HIDDEN, Config
from distill_cli.config.teacher_jobs import job_config, job_key, own_key_problems, teacher_nodes
from distill_cli.config.teachers import model_key, teacher_configs, teacher_problems
from distill_cli.config.variation import plain
from distill_cli.errors import ConfigError
from distill_cli.losses import divergence, token_weight
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
    if wrong := _lines(config, _lengths):
        return wrong
    found = [
        *_lines(config, _limits, _rollout, _carry_over, role_problems, _train, _data, _eval, _checkpoint, _run),
        *_teacher_dependent(config),
        *secret_problems(asdict(config)),
    ]
    if wrong := list(teacher_problems(config)):
        return found + wrong
    if config.model.teachers:
        for name, alone in teacher_configs(config).items():
            own = [*_lines(alone, _limits), *_teacher_dependent(alone)]
            found += [f"model.teachers.{name}: {problem}" for problem in own if problem not in found]
    return found + _job_problems(config)


def _job_problems(config: Config) -> list[str]:
    """Return the problems of the jobs that serve teachers."""
    if problems := list(own_key_problems(config)):
        return problems
    own, known = config.cluster.slurm.teacher, set(_lines(config, _limits))
    found = {name: _lines(job_config(config, name), _limits) for name in teacher_nodes(config)}
    return [
        job_key(problem, own=own, model=model_key(name))
        for name, problems in found.items()
        for problem in problems
        if problem not in known and problem.startswith("cluster.")
    ]


def _teacher_dependent(config: Config) -> list[str]:
    """Return the problems of keys that a teacher may have of its own."""
    return [*_lines(config, _models, _engine, _loss), *_parameter_problems(config.loss)]


def _parameter_problems(loss: LossConfig) -> list[str]:
    """Return the problems of the parameters of the loss's functions, which share `loss.kwargs`."""
    families = [(divergence.SIGNATURES, loss.kl_type, loss.parameters)]
    if loss.token_weight is not None:
        families.append((token_weight.SIGNATURES, loss.token_weight, loss.weight_parameters))
    found: list[str] = []
    for family, name, parameters in families:
        of_others = set[str]()
        for other, its_name, _ in families:
            if other is not family:
                with suppress(ConfigError):
                    of_others |= other.taken(its_name, loss.kwargs).keys()
        kwargs = {one: value for one, value in loss.kwargs.items() if one not in of_others}
        found += family.problems(name, parameters, kwargs=kwargs)
    return list(dict.fromkeys(found))


def _loss(config: Config) -> Problems:
    loss, rollout = config.loss, config.rollout
    if loss.support is Support.full and loss.tail is not Tail.bucket:
        yield "loss.tail", "nothing is outside of loss.support=full; leave it out"
    if loss.alignment is not Alignment.bytes and (loss.needs_hidden or rollout.saves_hidden):
        yield "loss.alignment", "compares the teacher's top-k; set loss.support=teacher, and no save_scores=hidden"
    if loss.alignment is Alignment.rank and loss.policy_gradient:
        yield (
            "loss.policy_gradient",
            "needs the teacher's probability of a token, of which loss.alignment=rank has none",
        )
    terms = ("divergence_weight", "policy_gradient", "likelihood", "reward", "penalty")
    weights = {name: getattr(loss, name) for name in terms}
    if not any(weights.values()):
        yield "loss.divergence_weight", f"nothing is trained; set one of {', '.join(weights)} above 0"
    if not loss.divergence_weight and not loss.policy_gradient:
        for name in ("token_weight", "token_clip"):
            if getattr(loss, name) is not None:
                yield f"loss.{name}", "changes the divergence, whose weight is 0; leave it out"
    for name in ("policy_gradient", "likelihood", "reward", "penalty"):
        if weights[name] and loss.temperature != 1:
            yield f"loss.{name}", f"sampled tokens have no temperature: loss.temperature={loss.temperature:g} must be 1"
    if loss.likelihood and rollout.on_policy_fraction == 1 and rollout.guard_above is None:
        yield "loss.likelihood", "is of tokens that the student did not write: lower rollout.on_policy_fraction, to 0"
    if rollout.saves_hidden and config.model.teacher.is_student:
        yield "rollout.save_scores", "the head of model.teacher.path=student is another at each step; set true"
    for name in ("policy_gradient", "reward", "penalty"):
        if weights[name] and rollout.on_policy_fraction == 0:
            yield f"loss.{name}", "is of tokens that the student samples: raise rollout.on_policy_fraction"
    if loss.reward:
        if rollout.generations_per_prompt < 2:
            yield "loss.reward", "compares answers to a prompt; set rollout.generations_per_prompt to 2 or more"
        if config.data.verifier is None and rollout.environment is None:
            yield "loss.reward", "needs a data.verifier, or an environment that rewards"


def evaluation_problems(config: Config) -> list[str]:
    """Return the problems of an evaluation, which trains nothing, as `config_problems` does those of a run."""
    problems = _lines(config, _limits, _eval, _engine, _benchmark)
    return [problem for problem in problems if problem.startswith(("data.", "eval.", "engine.", "cluster."))]


def chat_problems(config: Config) -> list[str]:
    """Return the problems of what a chat reads, as `config_problems` does those of a run."""
    problems = _lines(config, _lengths) or _lines(config, _limits, _data, _engine_kwargs)
    read = ("data.prompt_template", "rollout.", "engine.", "cluster.", "train.seed")
    return [problem for problem in problems if problem.startswith(read)]


def serving_problems(config: Config) -> list[str]:
    """Return the problems of what a scoring server reads, as `config_problems` does those of a run."""
    problems = _lines(config, _limits, _engine_kwargs)
    length = config.engine.teacher.max_model_len
    if length is not None and length < 1:
        problems.append(f"engine.teacher.max_model_len={length}: must be at least 1; leave it out")
    return [problem for problem in problems if problem.startswith(("engine.teacher.", "cluster."))]


def _lines(config: Config, *checks: Callable[[Config], Problems]) -> list[str]:
    values = plain(config)

    def shown(key: str) -> str:
        value = values.get(key)
        return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)

    return [f"{key}={shown(key)}: {rule}" for check in checks for key, rule in check(config)]


def inert_overrides(config: Config, overrides: Sequence[str]) -> list[str]:
    """Return a warning for each override that has no effect given the other choices."""
    typed = {override.lstrip("+").split("=", 1)[0] for override in overrides}
    needed = {key: data["only_with"] for key, data in declared_keys(Config).items() if "only_with" in data}
    reasons = {key: f"without {other}" for key, other in needed.items() if not _any_set(config, other)}
    for family, chosen in (
        (divergence.SIGNATURES, config.loss.kl_type),
        (token_weight.SIGNATURES, config.loss.token_weight),
    ):
        for name in family.parameters:
            if f"loss.{name}" in typed and (chosen is None or name not in family.parameters_of(chosen)):
                readers = " and ".join(one for one in family.functions if name in family.parameters_of(one))
                value = "null" if chosen is None else chosen
                reasons[f"loss.{name}"] = f"with {family.key}={value}: it is a parameter of {readers}"
    if config.cluster.roles is Roles.shared:
        reasons["engine.student.ranks"] = "with cluster.roles=shared: every rank samples"
        reasons["engine.teacher.ranks"] = "with cluster.roles=shared: every rank scores"
    if not seed_matters(config):
        reasons["train.seed"] = "in a replay of all weights in the recorded order: add rollout.replay_shuffle=true"
    if not ends_by_epochs(config):
        reasons["train.max_epochs"] = "with rollout.carry_over=true: train.max_steps ends the run"
    if config.data.train.get("streaming"):
        reasons["train.max_epochs"] = "on a source that is streamed: train.max_steps ends the run"
    else:
        reasons["data.shuffle_buffer"] = "on a source that is not streamed: it is shuffled whole"
    return [f"{key} has no effect {reason}" for key, reason in reasons.items() if key in typed]


def seed_matters(config: Config) -> bool:
    """Whether anything is drawn from train.seed: in a replay the order, new adapters, or sampled validation."""
    samples = validates(config) and config.eval.temperature > 0
    is_replay, shuffles = config.rollout.replay is not None, config.rollout.replay_shuffle
    return not is_replay or shuffles or config.model.student.lora.is_on or samples


def _any_set(config: Config, keys: str) -> bool:
    """Whether a key is set, or one of several (`a or b`)."""
    return any(attrgetter(key)(config) for key in keys.split(" or "))


def _limits(config: Config) -> Problems:
    """Yield each number outside the limits that its key declares."""
    for key, metadata in declared_keys(Config).items():
        limits = {name: metadata[name] for name in LIMITS if name in metadata}
        value = attrgetter(key)(config)
        is_within = value is None or all(LIMITS[name](value, bound) for name, bound in limits.items())
        if limits and not (is_within and math.isfinite(value or 0)):
            yield key, "must be " + " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in limits.items())


def _run(config: Config) -> Problems:
    name = config.run.name
    if name is not None and (name in ("", ".", "..") or "/" in name):
        yield "run.name", "must name one folder in run.root; give one without /, or leave it out"
    if not config.run.root:
        yield "run.root", "is empty; give the folder of runs, or leave it out"
    if config.search.trials is not None:
        yield "search.trials", "nothing is searched here; leave it out, or type it with `distill train -m` and a range"


def _models(config: Config) -> Problems:
    lora, at = config.model.student.lora, "model.student.lora"
    teacher = config.model.teacher
    if teacher.path is None and not teacher.addresses and not config.model.teachers:
        yield "model.teacher.path", "a value is needed; give a folder or a hub name, or model.teacher.url"
    moving = {"ema": teacher.ema is not None, "refresh": teacher.refresh > 1}
    for name, is_given in moving.items():
        if is_given and not teacher.is_student:
            yield f"model.teacher.{name}", "only model.teacher.path=student has weights that move; set that"
    if all(moving.values()):
        yield "model.teacher.refresh", "model.teacher.ema moves the teacher at every step; leave one of them out"
    if teacher.url is not None and not _are_addresses(teacher.url):
        yield "model.teacher.url", "must be an address such as http://127.0.0.1:8008, or a list of some"
    if teacher.has_own_tokenizer and teacher.is_student:
        yield "model.teacher.tokenizer", "model.teacher.path=student has the student's; leave it out"
    if teacher.has_own_tokenizer and config.rollout.environment is not None:
        rule = "an environment's messages are in the student's template, which this teacher does not read"
        yield "model.teacher.tokenizer", f"{rule}; leave out rollout.environment"
    if teacher.nodes > 0 and not teacher.has_files:
        other = "path=student" if teacher.is_student else "url"
        yield "model.teacher.nodes", f"model.teacher.{other} needs no job of its own; leave one of them out"
    if teacher.is_served and 0 < config.cluster.hang_timeout_s <= teacher.patience_s:
        rule = f"must be less than cluster.hang_timeout_s={config.cluster.hang_timeout_s:g}, which ends a silent run"
        yield "model.teacher.patience_s", f"{rule}; lower it, or raise the other"
    if lora.targets is not None and not lora.is_on:
        yield f"{at}.targets", f"no adapters are trained; give {at}.rank, or leave it out"
    if lora.targets == []:
        yield f"{at}.targets", "names no layer; null is every linear layer"
    if lora.rank and lora.syncs_adapter and lora.rank > MAX_ENGINE_RANK:
        yield f"{at}.rank", f"must be at most {MAX_ENGINE_RANK} in vLLM; lower it, or set {at}.sync=merged"
    if config.loss.tail is Tail.renormalize and config.loss.topk == 1:
        yield "loss.topk", "the loss is always zero with loss.tail=renormalize; raise it, or choose loss.tail=bucket"


def _are_addresses(url: Any) -> bool:
    """Whether this is an address or a list of different ones; what they are is checked when they are asked."""
    if isinstance(url, str):
        return bool(url.strip())
    return isinstance(url, list) and bool(url) and all(isinstance(one, str) for one in url) and len({*url}) == len(url)


def _lengths(config: Config) -> Problems:
    value = config.rollout.max_new_tokens
    fix = "must be a number of tokens, at least 1, or a schedule such as {0: 256, 100: 1024}"
    numbers = [*value.keys(), *value.values()] if isinstance(value, dict) else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in numbers):
        yield "rollout.max_new_tokens", fix
    elif isinstance(value, dict) and (0 not in value or min(value) < 0):
        yield "rollout.max_new_tokens", f"a schedule begins at 0, and counts steps; {fix}"
    elif min(config.rollout.length_schedule.values()) < 1:
        yield "rollout.max_new_tokens", fix


def _carry_over(config: Config) -> Problems:
    rollout, loss = config.rollout, config.loss
    if not rollout.carry_over:
        return
    other = "an answer is trained on in parts"
    if loss.reward:
        yield "loss.reward", f"with rollout.carry_over {other}, before its reward is known; leave one of them out"
    weight = loss.token_weight
    if weight is not None and "length" in token_weight.SIGNATURES.positional_of(weight):
        yield "loss.token_weight", f"with rollout.carry_over {other}, before its length is known; choose another"
    if rollout.stop:
        yield "rollout.stop", "with rollout.carry_over a string may be cut in two; use rollout.stop_token_ids"
    if rollout.on_policy_fraction < 1:
        yield "rollout.on_policy_fraction", "with rollout.carry_over all answers are the student's; set it to 1"
    if rollout.guard_above is not None:
        yield "rollout.guard_above", "with rollout.carry_over all answers are the student's; leave it out"
    if rollout.token_budget < rollout.num_sequences:
        slots = f"{rollout.num_sequences} answers are written at a time"
        yield "rollout.tokens_per_step", f"{slots}, each at least a token a step; raise it"


def _rollout(config: Config) -> Problems:
    rollout = config.rollout
    if rollout.staleness and rollout.score_while_sampling:
        yield "rollout.score_while_sampling", "with rollout.staleness answers are scored steps later; leave it out"
    if rollout.on_policy_fraction < 1 and rollout.environment is not None:
        yield "rollout.on_policy_fraction", "with rollout.environment all sequences are the student's; set it to 1"
    if rollout.guard_above is not None and rollout.environment is not None:
        yield "rollout.guard_above", "with rollout.environment all sequences are the student's; leave it out"
    if rollout.save_scores not in (True, False, HIDDEN):
        yield "rollout.save_scores", f"must be true, false or {HIDDEN}"
    if rollout.replay is not None and rollout.save_scores:
        yield "rollout.save_scores", "a replay trains on scores that are recorded already; leave it out"
    if rollout.replay is not None and config.eval.record_samples and not validates(config):
        yield "eval.record_samples", "a replay without validation has no sampler; set it to 0, or set eval.period"
    if rollout.max_turns > 1 and rollout.environment is None:
        yield "rollout.max_turns", "needs an environment that answers; set rollout.environment"
    if rollout.top_k == 0:
        yield "rollout.top_k", "must be at least 1, or -1 for all tokens"
    whole, limit = rollout.max_sequence_length, config.data.max_prompt_tokens
    if (room := whole - rollout.longest_answer) < (limit or 1):
        prompt = f"a prompt of up to data.max_prompt_tokens={limit}" if limit else "a prompt"
        rule = f"leaves {max(room, 0)} of rollout.max_sequence_length={whole} tokens for {prompt}"
        yield "rollout.max_new_tokens", f"{rule}; lower it, or raise rollout.max_sequence_length"


def _train(config: Config) -> Problems:
    train, rollout, mesh = config.train, config.rollout, config.mesh
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        yield "train.betas", "must be two numbers from 0 to below 1"
    if train.cpu_offload and train.offload_optimizer:
        yield "train.offload_optimizer", "train.cpu_offload=true keeps it in host memory already; drop one"
    if train.global_batch_size >= 1 and rollout.num_sequences % train.global_batch_size:
        factors = f"{rollout.prompts_per_step} prompts x {rollout.generations_per_prompt} generations"
        yield "train.global_batch_size", f"must divide the {rollout.num_sequences} sequences of a step ({factors})"
    if train.micro_batch_tokens < rollout.max_sequence_length:
        limit = f"rollout.max_sequence_length={rollout.max_sequence_length}"
        yield "train.micro_batch_tokens", f"must be at least {limit}; raise it, or lower the other"
    for name in ("tensor", "context"):
        if mesh.expert > 1 and getattr(mesh, name) > 1:
            yield "mesh.expert", f"cannot be combined with mesh.{name}={getattr(mesh, name)}; set one of them to 1"
    if mesh.sequence_parallel and mesh.tensor == 1:
        yield "mesh.sequence_parallel", "needs tensor-parallel ranks; raise mesh.tensor, or leave it out"
    if train.compile and mesh.tensor > 1:
        yield "train.compile", f"gives wrong gradients with mesh.tensor={mesh.tensor} in this torch; turn one off"


def _data(config: Config) -> Problems:
    data = config.data
    for name, parts in (("prompt_template", ["question"]), ("teacher_prompt_template", ["question", "context"])):
        template = getattr(data, name)
        yield from ((f"data.{name}", f"must contain {{{one}}}") for one in parts if f"{{{one}}}" not in template)
    if not data.train and config.rollout.replay is None:
        yield "data.train", "a source is needed; choose data=... (distill ls data)"


def _benchmark(config: Config) -> Problems:
    if not config.data.validation:
        yield "data.validation", "a source is needed; choose data=... (distill ls data)"
    if config.data.verifier is None:
        yield "data.verifier", "an evaluation needs one to judge the answers; choose one"


def _eval(config: Config) -> Problems:
    if config.eval.repeat > 1 and config.eval.temperature == 0:
        yield "eval.repeat", "greedy answers are all the same; set eval.temperature above 0"


def _engine(config: Config) -> Problems:
    lengths = {"student": needed_length(config), "teacher": scored_length(config)}
    if config.model.teacher.has_own_tokenizer:  # what is longer is left out of the loss
        del lengths["teacher"]
    for role, needed in lengths.items():
        engine, at = getattr(config.engine, role), f"engine.{role}"
        if engine.max_model_len is not None and engine.max_model_len < needed:
            yield f"{at}.max_model_len", f"sequences have up to {needed} tokens; leave it out"
    yield from _engine_kwargs(config)


def _engine_kwargs(config: Config) -> Problems:
    for role in ("student", "teacher"):
        engine, at = getattr(config.engine, role), f"engine.{role}"
        for name in sorted(RESERVED_ENGINE_KWARGS & {str(key) for key in engine.kwargs}):
            yield f"{at}.kwargs.{name}", "is set by distill, which relies on it; leave it out"


def _checkpoint(config: Config) -> Problems:
    checkpoint = config.checkpoint
    metric, known = find(checkpoint.metric), [metric.name for metric in METRICS if metric.ranks_checkpoints]
    if metric is None or metric.name not in known:
        rule = "no such metric" if metric is None else "does not rank checkpoints"
        fix = nearest(checkpoint.metric, known) or "; choose a train/, rollout/ or val/ metric (docs/metrics.md)"
        yield "checkpoint.metric", f"{rule}{fix}"
    elif metric.needs and config.rollout.replay is None and not _any_set(config, metric.needs):
        yield "checkpoint.metric", f"never recorded without {metric.needs}; set it, or choose another"
    elif metric.better is None and checkpoint.higher_is_better is None:
        yield "checkpoint.higher_is_better", f"{checkpoint.metric} has no better direction; set true or false"
    if checkpoint.must_save_by is not None and parse_duration(checkpoint.must_save_by) is None:
        yield "checkpoint.must_save_by", "must be DD:HH:MM:SS, such as 00:03:45:00"
