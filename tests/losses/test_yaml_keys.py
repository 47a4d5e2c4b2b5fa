"""conf/loss names every divergence, and sets exactly the keys that its function reads."""

import inspect

from distill_cli.config.compose import known_losses
from distill_cli.losses.divergence import DIVERGENCES


def test_every_divergence_has_a_yaml_that_sets_what_it_reads() -> None:
    reads = {
        name: set(inspect.signature(function).parameters) - {"logp", "logq"} for name, function in DIVERGENCES.items()
    }
    assert known_losses() == reads
