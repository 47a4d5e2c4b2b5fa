"""A rank's side of `test_load.py`: torchrun --nproc-per-node 2 load_rank.py FOLDER."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from distill_cli.config.schema import MeshConfig, TrainConfig
from distill_cli.losses.divergence import DistillLoss
from distill_cli.parallel.mesh import layout
from distill_cli.student import attention
from distill_cli.student.load import load_weights
from distill_cli.student.model import Student, build_lm, wrap
from tests.student.train_rank import made_up_model

CASES = [  # family, tied, stored dtype, largest file, mesh, offload
    ("qwen3", True, torch.bfloat16, "1GB", MeshConfig(), False),
    ("llama", False, torch.float32, "20KB", MeshConfig(tensor=2), False),
    ("gemma3_text", True, torch.bfloat16, "20KB", MeshConfig(tensor=2, sequence_parallel=True), False),
    ("qwen2", True, torch.float32, "1GB", MeshConfig(replicate=2), False),
    ("mistral", False, torch.bfloat16, "20KB", MeshConfig(), True),
]


def check(folder: Path, case: tuple) -> None:
    family, tied, dtype, size, mesh, offload = case
    if dist.get_rank() == 0:
        made_up_model(family, tied=tied).to(dtype).save_pretrained(folder, max_shard_size=size)
    dist.barrier()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parallel = layout(mesh, device=torch.device("cpu"))
    lm = build_lm(folder)
    assert all(param.is_meta for param in lm.parameters())
    student = Student(lm, loss=DistillLoss(kl_type="mixed"), temperature=1.0, parallel=parallel)
    wrap(student, parallel, TrainConfig(cpu_offload=offload))
    load_weights(student, lm, folder, device=torch.device("cpu"))
    expected = dict(reference.named_parameters())
    loaded = dict(lm.named_parameters())
    assert loaded.keys() == expected.keys(), loaded.keys() ^ expected.keys()
    for name, param in loaded.items():
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        assert torch.equal(whole, expected[name]), f"{family}: {name}"
    for name, buffer in lm.named_buffers():
        whole = buffer.full_tensor() if isinstance(buffer, DTensor) else buffer
        assert torch.equal(whole, reference.get_buffer(name)), f"{family}: {name}"


def main() -> None:
    attention.register()
    dist.init_process_group("gloo")
    for index, case in enumerate(CASES):
        check(Path(sys.argv[1]) / str(index), case)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
