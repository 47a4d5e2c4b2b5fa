"""`distill serve`: compose and check what a scoring server reads, and start it."""

import json
import os
import signal
from collections.abc import Callable, Sequence

from distill_cli.config.compose import check_overrides, compose
from distill_cli.config.fields import has_property, is_within
from distill_cli.config.schema import Config
from distill_cli.config.teachers import ONLY
from distill_cli.engines.from_config import settings_of
from distill_cli.engines.server_info import ServerInfo
from distill_cli.engines.settings import EngineSettings
from distill_cli.engines.wire import TOKEN
from distill_cli.errors import ConfigError, refuse
from distill_cli.jobs.engine_setup import cpu_kv_cache, engine_environment
from distill_cli.jobs.new_runs import require_here
from distill_cli.jobs.preflight import Facts, preflight_serving
from distill_cli.machine.hardware import installed_version, threads_of_rank
from distill_cli.models import model_files, model_pair
from distill_cli.serving.engine_processes import EngineProcesses
from distill_cli.serving.server import CPU_BUDGET, GPU_BUDGET, Listen, ScoringServer, check_listen

ALONE = ("engine.teacher.gpu_memory_utilization=0.9",)
"""What differs from training unless it is typed: the engine has the device to itself."""
READ = ("model", "experiment", "engine", "model.teacher", "model.trust_remote_code", "engine.teacher")
"""Groups and keys that are read, with those of `cluster` that an evaluation reads."""
UNREAD = ("data.train", "data.validation")
"""Dictionaries that are not: a value may be missing in them."""
MAX_TOPK = 128
MAX_QUEUED_TOKENS = 2**20
MOST_POSITIONS = 32768
"""Longest sequence unless engine.teacher.max_model_len is given: models have up to a million positions, whose KV cache
fits no device."""
MAX_ANSWER_BYTES = 2**28


def serve(
    overrides: Sequence[str],
    *,
    listen: Listen,
    max_topk: int | None = None,
    max_queued_tokens: int = MAX_QUEUED_TOKENS,
    fixed_batches: bool = False,
) -> int:
    """Serve `model.teacher` until a signal; return 0.

    Raises:
        ConfigError: an override is refused, the model cannot be served, or the address would be unsafe.
        DistillError: an engine failed.
    """
    check_listen(listen, os.environ.get(TOKEN))
    serve_config(
        compose_server(overrides),
        listen=listen,
        max_topk=max_topk,
        max_queued_tokens=max_queued_tokens,
        fixed_batches=fixed_batches,
    )
    return 0


def serve_config(
    config: Config,
    *,
    listen: Listen,
    max_topk: int | None,
    max_queued_tokens: int = MAX_QUEUED_TOKENS,
    fixed_batches: bool = False,
    on_listen: Callable[[str], object] | None = None,
    signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM),
) -> int:
    """Serve the only teacher of a config until one of these signals; return its number.

    Args:
        max_topk: largest top-k of a request; None is 128, or the vocabulary.
        on_listen: see `ScoringServer`.

    Raises:
        ConfigError: the model cannot be served, or the address would be unsafe.
        DistillError: an engine failed.
    """
    facts = preflight_serving(config)
    assert facts.teachers is not None
    assert facts.ranks is not None
    model = facts.teachers[ONLY]
    topk = min(MAX_TOPK, model.vocab_size) if max_topk is None else max_topk
    if topk > model.vocab_size:
        raise ConfigError(f"--max-topk {topk}: the vocabulary has {model.vocab_size} ids; lower it")
    settings = engine_settings(facts)
    info = describe(facts, settings, max_topk=topk, max_queued_tokens=max_queued_tokens)
    env = engine_environment(facts.config.cluster, on_gpus=facts.ranks.on_gpus)
    processes = EngineProcesses(settings, num_ranks=facts.ranks.per_node, on_gpus=facts.ranks.on_gpus, env=env)
    print(f"loading   {info.name}", flush=True)
    server = ScoringServer(
        info,
        model.folder,
        listen=listen,
        processes=processes,
        budget=GPU_BUDGET if facts.ranks.on_gpus else CPU_BUDGET,
        token=os.environ.get(TOKEN),
        fixed_batches=fixed_batches,
        on_ready=lambda address: print_ready(info, facts, address),
        on_listen=on_listen,
        signals=signals,
    )
    return server.run()


def compose_server(overrides: Sequence[str]) -> Config:
    """Return the config of a server: of the teacher that is typed alone, or of a pair.

    Raises:
        ConfigError: an override is wrong, or a server does not read it.
    """
    check_overrides(overrides)
    typed = {word.lstrip("+").partition("=")[0]: word.partition("=")[2] for word in overrides}
    refuse(_unread_problems(overrides))
    path, chosen = typed.get("model.teacher.path"), list[str]()
    if path is not None and not path.startswith("package://") and not typed.keys() & {"model", "experiment"}:
        chosen.append("model=custom")  # the sizes of the embedded pair's engines are not the model's
    if path is not None:
        chosen.append(f"model.student.path={json.dumps(path)}")  # never looked at; `custom` has none
    jobs = compose([*chosen, *ALONE, *overrides], unread=UNREAD)
    if len(jobs) != 1:
        raise ConfigError("distill serve: takes no sweep; start a server for each model")
    require_here(jobs[0].config, "distill serve")
    return jobs[0].config


def _unread_problems(overrides: Sequence[str]) -> list[str]:
    problems = []
    for word in overrides:
        key = word.lstrip("+~").partition("=")[0]
        is_read = any(key == name or ("." in name and is_within(key, name)) for name in READ)
        if not is_read and not (is_within(key, "cluster") and has_property(Config, key, "evaluation")):
            fix = "give --max-topk" if key == "loss.topk" else "leave it out"
            problems.append(f"{word}: a scoring server does not read it; {fix}")
    return problems


def engine_settings(facts: Facts) -> EngineSettings:
    """Return the settings of the engines: long enough for the model, or for what a device holds."""
    assert facts.teachers is not None
    config, model = facts.config, facts.teachers[ONLY]
    assert facts.ranks is not None
    given = config.engine.teacher.max_model_len
    length = given or min(model.max_positions or MOST_POSITIONS, MOST_POSITIONS)
    settings = settings_of(
        config, "teacher", folder=model.folder, max_model_len=length, vocab_size=None, sleep_mode=False
    )
    if settings.kv_cache_bytes is None and not facts.ranks.on_gpus:
        kv_cache = cpu_kv_cache(model, dtype=config.model.teacher.dtype, length=length)
        settings = EngineSettings(**{**vars(settings), "kv_cache_bytes": kv_cache})
    return settings


def describe(facts: Facts, settings: EngineSettings, *, max_topk: int, max_queued_tokens: int) -> ServerInfo:
    """Return the description of the server. Raises ConfigError if a file of the model is damaged."""
    assert facts.teachers is not None
    model, ranks = facts.teachers[ONLY], facts.ranks
    assert ranks is not None
    return ServerInfo(
        version=installed_version("distill-cli") or "unknown",
        path=model.path,
        revision=model.revision,
        digest=model_files.fingerprint(model.folder),
        dtype=settings.dtype,
        quantization=settings.quantization,
        vocab_size=model.vocab_size,
        eos_ids=model.eos_ids,
        max_model_len=settings.max_model_len,
        max_topk=max_topk,
        chat_template=model_pair.chat_template(model.folder),
        special_tokens=model_pair.special_tokens(model.folder),
        num_engines=ranks.per_node // settings.tensor_parallel,
        max_queued_tokens=max_queued_tokens,
        max_answer_bytes=MAX_ANSWER_BYTES,
        hidden_size=model_files.hidden_size(model.folder),
    )


def print_ready(info: ServerInfo, facts: Facts, address: str) -> None:
    """Print what is served, where, and the override with which a run uses it."""
    assert facts.ranks is not None
    ranks = facts.ranks.per_node
    device = f"{ranks} GPUs" if facts.ranks.on_gpus else f"the CPU, {threads_of_rank(ranks)} threads a process"
    limits = f"{info.max_model_len} tokens a sequence, top-{info.max_topk}, {info.max_queued_tokens} tokens waiting"
    lines = {
        "model": info.name,
        "engines": f"{info.num_engines} on {device}",
        "limits": limits,
        "address": address,
        "use it": f"distill model.teacher.url={address} ...",
    }
    print(*(f"{name:<10}{line}" for name, line in lines.items()), sep="\n", flush=True)
