"""Score on a `distill serve` of this machine what an engine in this process scores, and compare numbers and time.

Both engines run eagerly and keep their weights on the same GPU.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from gpu_stages.in_process import one_rank  # before torch

import torch  # isort: skip

from distill_cli.engines.served import ServedTeacher
from distill_cli.engines.settings import EngineSettings
from distill_cli.engines.teacher import VllmTeacher
from gpu_stages.command import Started, finish, start
from gpu_stages.figures import Stage, StageFailed
from gpu_stages.shapes import make_pair
from gpu_stages.throughput import words
from gpu_stages.timing import alternating_seconds

SHARE = 0.25
"""Each engine's share of the GPU."""
START_S = 180.0
ROUNDED = 2e-2
"""Largest mean difference of log-probabilities that bfloat16's rounding explains."""
EXACT = 1e-4


def run(stage: Stage) -> None:
    _, folder = make_pair(stage.scratch, device=stage.device, rehearse=stage.rehearse)
    length, number, topk = (64, 4, 16) if stage.rehearse else (640, 64, 64)
    keys = (f"engine.teacher.max_model_len={2 * length}", f"engine.teacher.gpu_memory_utilization={SHARE}")
    small = ("engine.teacher.kv_cache_gib=0.25",) if stage.rehearse else ()
    begin = time.perf_counter()
    server = start(
        stage,
        *("serve", "--port=0", f"model.teacher.path={folder}", "model.teacher.dtype=bfloat16", *keys),
        *("engine.teacher.enforce_eager=true", *small),
        verb_only=True,
    )
    try:
        teacher = ServedTeacher([address(server)], topk=topk)
        stage.record("distill serve, 4B: seconds to its first answer", time.perf_counter() - begin, "s")
        with one_rank(stage.device):
            compare(stage, teacher, folder, length=length, number=number, topk=topk)
        teacher.close()
    finally:
        server.process.terminate()
    finish(server)  # with status 0: it stopped as asked


def address(server: Started) -> str:
    """Wait until the server has printed its address, and return it."""
    begin = time.monotonic()
    while (found := re.search(r"^address +(\S+)", server.output.read_text(), re.M)) is None:
        if server.process.poll() is not None:
            finish(server)
            raise StageFailed("distill serve ended before it had an address")
        if time.monotonic() - begin > START_S:
            raise StageFailed(f"distill serve had no address after {START_S:.0f} s")
        time.sleep(0.1)
    return found[1]


def compare(stage: Stage, served: ServedTeacher, folder: Path, *, length: int, number: int, topk: int) -> None:
    settings = EngineSettings(
        str(folder),
        max_model_len=2 * length,
        gpu_memory_utilization=SHARE,
        kv_cache_bytes=64 << 20 if stage.rehearse else None,
        enforce_eager=True,
    )
    local = VllmTeacher(settings, topk=topk)
    sequences, starts = words(number, length), [length // 5] * number
    pairs = zip(*(one.score(sequences, response_starts=starts) for one in (local, served)), strict=True)
    differences = torch.cat([(ours.sampled_logp - theirs.sampled_logp).abs() for ours, theirs in pairs])
    limit = EXACT if stage.rehearse else ROUNDED
    stage.record(
        "served and in-process scores: mean difference", float(differences.mean()), at_most=limit, wrong_if_missed=True
    )
    seconds = alternating_seconds(
        {
            "local": lambda: local.score(sequences, response_starts=starts),
            "served": lambda: served.score(sequences, response_starts=starts),
        },
        device=stage.device,
        rounds=5,
    )
    local.close()
    stage.record("served scoring, 4B", number * length / seconds["served"], "tokens/s")
    stage.record("of in-process scoring", seconds["local"] / seconds["served"] * 100, "%", at_least=90)
