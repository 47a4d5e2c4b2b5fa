"""A rank that scores alone (`cluster.roles=split`): build a teacher's engine, and score for the ranks that train."""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import replace

from distill_cli.config.variation import override
from distill_cli.engines.rank_teacher import serve_ranks
from distill_cli.folders.run_dir import RunDir
from distill_cli.ranks import build_source as parts
from distill_cli.ranks.build_engines import build_teacher, leave

log = logging.getLogger(__name__)


def scorer_rank(rank: parts.Rank, run: RunDir) -> None:
    """Build a rank's engine, and score until the ranks that train end it. A collective."""
    for signum in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)  # the ranks that train may finish a step and save first
    begin, bridge = time.perf_counter(), rank.role.bridge
    assert bridge is not None
    name, alone = list(rank.resolved.by_teacher().items())[rank.role.teacher]
    awake = replace(alone, config=override(alone.config, {"engine.teacher.sleep": False}))
    teacher = build_teacher(awake, run.servers(name), works_apart=False)
    log.info("engine ready in %.1f s", time.perf_counter() - begin)
    serve_ranks(teacher, bridge.links.get(rank.role.teacher, []), is_closing=bridge.commands.is_closing)
    leave()
