"""A rank that samples alone (`cluster.roles=split`): build its engine, and do what the ranks that train command."""

from __future__ import annotations

import logging
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

from distill_cli.data.order import PromptBatches, PromptOrder, PromptStream
from distill_cli.machine.processes import StopFlag
from distill_cli.ranks import build_source as parts
from distill_cli.ranks.build_engines import build_sampler, engine_settings, leave, train_sampling
from distill_cli.rollout.remote import IncomingWeights, serve
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.workers import RolloutWorker
from distill_cli.student.model import build_lm
from distill_cli.train.validation import Score

log = logging.getLogger(__name__)

POLL_S = 0.5


def sampler_rank(rank: parts.Rank, *, checkpoint: Path | None) -> None:
    """Build a rank's engine, and sample until the ranks that train end it. A collective.

    Args:
        checkpoint: the checkpoint that the run continues from; None starts at step 1.
    """
    for signum in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)  # the ranks that train may finish a step and save first
    resolved, config, bridge, begin = rank.resolved, rank.resolved.config, rank.role.bridge, time.perf_counter()
    assert bridge is not None
    assert bridge.weights is not None
    order, validator, stop = parts.build_order(rank), parts.build_validator(rank), StopFlag()
    assert isinstance(order, PromptOrder | PromptStream), "config.checks refuses a replay"
    _, published = build_lm(resolved.student.folder, trust_remote_code=config.model.trust_remote_code)
    settings = replace(engine_settings(resolved, "student"), untouched=published.untouched, sleep_mode=False)
    sampler = build_sampler(resolved, settings, scores=False, should_stop=stop.is_set)
    log.info("engine ready in %.1f s", time.perf_counter() - begin)
    stages, weights = Stages(rank.parallel, stop), IncomingWeights(bridge.weights)
    responder = parts.build_responder(rank, train_sampling(resolved), max_tokens=config.rollout.max_sequence_length)
    worker = RolloutWorker(sampler, weights.unknown, lambda: weights.version, responder, stages)
    batches = PromptBatches(order)
    in_flight = parts.read_in_flight(checkpoint, batches)

    def validate(worker: RolloutWorker) -> Score:
        assert validator is not None, "the run does not validate"
        with worker.ready() as engine:
            return validator.run(engine)

    def watch() -> None:
        while not bridge.commands.is_closing():
            time.sleep(POLL_S)
        stop.fail("the run ends")

    threading.Thread(target=watch, name="closing", daemon=True).start()
    writer = parts.build_writer(rank, order, batches, worker)
    serve(writer, weights, bridge, in_flight=in_flight, validate=validate)
    leave()
