"""The stages of `gpu_acceptance.py`, most costly mistakes first. No torch at import time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """One stage. `gpu_stages.<module>` defines `run(stage)`."""

    module: str
    title: str
    needs_s: float
    """Skip the stage if fewer seconds are left on a GPU: its first figures take about this long."""
    limit_s: float
    """Kill the stage after this many seconds."""
    rehearsal_s: float
    """Approximate duration of the rehearsal in seconds, on two CPU cores."""


STAGES = {
    "a": Spec("kernels", "tests of what runs on a GPU, without engines", 30, 90, 20),
    "b": Spec("head", "the fused head against its three matrix products", 20, 60, 10),
    "c": Spec("train_step", "training steps of a student of 1.7B", 50, 180, 20),
    "d": Spec("engines", "engines: check, sleep, wake, sync", 60, 240, 80),
    "e": Spec("default_run", "the default run; killed and resumed", 60, 240, 80),
    "f": Spec("throughput", "sampling, scoring and sync with 1.7B and 4B", 60, 240, 45),
    "g": Spec("whole_steps", "whole steps of 1.7B from 4B", 60, 240, 45),
    "h": Spec("served", "a served teacher of 4B against one in the process", 60, 180, 30),
    "i": Spec("supports", "full support against its four matrix products; a teacher's hidden states", 50, 180, 30),
}
