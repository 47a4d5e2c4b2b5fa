"""What preflight says of a command, for the tests of its checks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from distill_cli.config.compose import compose
from distill_cli.errors import ConfigError
from distill_cli.jobs.preflight import preflight

MakeModel = Callable[..., Path]
FEW_RANKS = ["cluster.gpus_per_node=0", "cluster.ranks_per_node=6"]


def problems_of(*argv: str) -> str:
    (job,) = compose(argv)
    with pytest.raises(ConfigError) as caught:
        preflight(job.config)
    return str(caught.value)


def pair(student: Path, teacher: Path) -> list[str]:
    return [f"model.student.path={student}", f"model.teacher.path={teacher}", "loss.topk=4"]
