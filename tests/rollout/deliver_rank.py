"""A rank of `test_early_scores`: it scores every n-th place, and gathers what each rank was sent."""

from typing import Any

import torch.distributed as dist

from distill_cli.rollout.early_scores import deliver
from tests.rollout.test_early_scores import scores_of
from tests.student.forked import case_ranks


def delivered(case: dict[str, Any]) -> list[dict[int, list[float]]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    own = {place: scores_of([place] * (place + 1)) for place in range(rank, 8, size)}
    found = {place: scores.sampled_logp.tolist() for place, scores in deliver(own, case["needed"]).items()}
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, dict(sorted(found.items())))
    assert [sorted(one) for one in everyone] == [sorted(places) for places in case["needed"]]
    return everyone


if __name__ == "__main__":
    case_ranks(delivered)
