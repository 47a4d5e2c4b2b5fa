"""The command on GPUs, as typed: what is checked, trained, saved and gone on with there. Not run so far."""

from pathlib import Path

import pytest
import torch

from .conftest import SHORT, distill

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

BF16 = ("train.precision=bf16", "model.student.dtype=bfloat16", "model.teacher.dtype=bfloat16")
ONE, TWO = "cluster.gpus_per_node=1", "cluster.gpus_per_node=2"
AWAKE = ("engine.student.sleep=false", "engine.teacher.sleep=false")
LORA = ("model.student.lora.rank=8", "model.student.lora.sync=adapter")


@pytest.mark.parametrize(
    "settings",
    [
        (ONE,),  # float32
        (ONE, *BF16),
        (ONE, *BF16, "engine.student.sleep=false"),
        (ONE, *BF16, *AWAKE),  # the teacher scores answers as they end
        (ONE, *BF16, *AWAKE, "rollout.score_while_sampling=false"),  # both engines in the rank's process
        (ONE, *BF16, "train.activation_checkpointing=selective", "train.offload_optimizer=true"),
        (ONE, *BF16, "train.cpu_offload=true"),
        (ONE, *BF16, "train.compile=true"),
        (ONE, *BF16, *LORA),
        (TWO, *BF16, "mesh.context=2"),
        (TWO, *BF16, "mesh.tensor=2", "engine.student.tensor_parallel=2", "engine.teacher.tensor_parallel=2"),
        (TWO, *BF16, "engine.teacher.tensor_parallel=2"),
    ],
    ids=" ".join,
)
def test_all_is_as_it_should_be(tmp_path: Path, settings: tuple[str, ...]) -> None:
    if TWO in settings and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    done = distill(tmp_path, "check", *settings, timeout_s=900)
    assert done.status == 0, done.stdout + done.stderr


def test_cuda_graphs_resume_from_a_checkpoint(tmp_path: Path) -> None:
    short = (*SHORT, "eval.max_samples=16", "checkpoint.period=2", "tracker=none")
    done = distill(tmp_path, *short, *BF16, ONE, timeout_s=900)
    assert done.status == 0, done.stdout + done.stderr
    steps = [row for row in done.metrics if row["step"] > 0]
    assert len(steps) == 3
    for row in steps:  # after each sleep and sync; the first engines of a process are the ones that never slept
        assert row["rollout/engine_mismatch"] < 2e-2
        assert 0 < row["perf/peak_mem_gib"] < torch.cuda.mem_get_info()[1] / 2**30
        assert row["time/wake_s"] > 0
    gone_on = distill(tmp_path, "resume", "runs/latest", "train.max_steps=5", timeout_s=900)
    assert gone_on.status == 0, gone_on.stdout + gone_on.stderr
    assert gone_on.metrics[-1]["step"] == 5
    assert gone_on.metrics[-1]["rollout/engine_mismatch"] < 2e-2
