"""Teachers' heads that ranks share give the log-probabilities of the whole ones."""

import pytest
import torch

from tests.student.forked import run_cases
from tests.student.head_rank import hidden_and_ids, make_head

LAYOUTS = {
    "one rank": (1, {}),
    "shard=2": (2, {}),
    "shard=3": (3, {}),
    "tensor=2": (2, {"tensor": 2}),
    "shard=2, tensor=2": (4, {"tensor": 2}),
    "replicate=2, tensor=2": (4, {"tensor": 2, "replicate": 2}),
    "context=2": (2, {"context": 2}),
}
HEADS = {
    "whole": {"rows": 24, "vocab_size": 24, "with_bias": True},
    "padded": {"rows": 26, "vocab_size": 23, "with_bias": False},
    "ends before the last ranks": {"rows": 11, "vocab_size": 11, "with_bias": True},
}
"""Teacher heads with `rows` ids, scored below `vocab_size`; the student has 24 ids."""
CASES = {
    f"{layout}, {head}": {"ranks": ranks, "mesh": mesh, "seed": 0, **HEADS[head]}
    for layout, (ranks, mesh) in LAYOUTS.items()
    for head in HEADS
}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_shared_heads_equal_whole_ones() -> None:
    for (name, case), found in zip(
        CASES.items(), run_cases("tests.student.head_rank", list(CASES.values())), strict=True
    ):
        hidden, ids = hidden_and_ids(case["vocab_size"])
        for seed, logp in enumerate(found):
            logits = make_head(case | {"seed": seed}).part((0, case["vocab_size"])).logits(hidden) / 1.3
            expected = logits.log_softmax(-1).gather(1, ids)
            torch.testing.assert_close(
                logp.double(), expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
