"""The ranks of `test_weights.py`: python -m tests.student.load_rank FOLDER."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from distill_cli.engines.weight_sync import Deferred, whole
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective
from distill_cli.parallel.mesh import layout
from distill_cli.student import attention
from distill_cli.student.adapters import A, B, add_adapters, initial_value, is_adapter, merged_parameters
from distill_cli.student.model import Student, build_lm, wrap
from distill_cli.student.weights import load_weights, placed
from tests.student.forked import fork_ranks
from tests.student.train_rank import made_up_model

SEQUENCE_PARALLEL = {"tensor": 2, "sequence_parallel": True}
CASES = [  # family, tied, stored dtype, largest file, mesh, offload
    ("qwen3", True, torch.bfloat16, "1GB", {}, False),
    ("llama", False, torch.float32, "20KB", {"tensor": 2}, False),
    ("gemma3_text", True, torch.bfloat16, "20KB", SEQUENCE_PARALLEL, False),
    ("qwen2", True, torch.float32, "1GB", {"replicate": 2}, False),
    ("mistral", False, torch.bfloat16, "20KB", {}, True),
]


def check(folder: Path, case: tuple) -> None:
    family, tied, dtype, size, mesh, offload = case
    if dist.get_rank() == 0:
        made_up_model(family, tied=tied).to(dtype).save_pretrained(folder, max_shard_size=size)
    dist.barrier()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parallel = layout(**mesh, device=torch.device("cpu"))
    lm, published = build_lm(folder)
    assert all(param.is_meta for param in lm.parameters())
    student = Student(lm, objective=Objective(DistillLoss(kl_type="mixed")), parallel=parallel)
    wrap(student, parallel, bf16=True, checkpointing="full", cpu_offload=offload)
    load_weights(lm, published, device=torch.device("cpu"))
    expected = dict(reference.named_parameters())
    loaded = dict(lm.named_parameters())
    assert loaded.keys() == expected.keys(), loaded.keys() ^ expected.keys()
    for name, param in loaded.items():
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        assert torch.equal(whole, expected[name]), f"{family}: {name}"
    for name, buffer in lm.named_buffers():
        whole = buffer.full_tensor() if isinstance(buffer, DTensor) else buffer
        assert torch.equal(whole, reference.get_buffer(name)), f"{family}: {name}"


def check_adapters(folder: Path, mesh: dict[str, Any]) -> None:
    """Every layout begins with the same adapters, and adds them up to what one process would."""
    parallel = layout(**mesh, device=torch.device("cpu"))
    lm, published = build_lm(folder)
    add_adapters(lm, rank=3, alpha=6.0, bf16=True)
    student = Student(lm, objective=Objective(DistillLoss(kl_type="mixed")), parallel=parallel)
    wrap(student, parallel, bf16=True, checkpointing="full")
    load_weights(lm, published, device=torch.device("cpu"), seed=7)
    generator, params = torch.Generator().manual_seed(0), dict(lm.named_parameters())
    expected = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    for name, param in params.items():
        assert param.requires_grad == is_adapter(name)
        assert param.dtype == (torch.float32 if is_adapter(name) else torch.bfloat16)
        if name.endswith(A):
            assert torch.equal(whole(param), initial_value(name, param.shape, seed=7))
        if name.endswith(B):
            assert not whole(param).any()
            value = torch.randn(param.shape, generator=generator)
            param.data.copy_(placed(param, value, device=torch.device("cpu")).data)
            layer = name.removesuffix(B)
            a = initial_value(layer + A, params[layer + A].shape, seed=7)
            expected[layer + "weight"] = expected[layer + "weight"].bfloat16().float() + 2 * value @ a
    merged = {n: whole(p.make() if isinstance(p, Deferred) else p) for n, p in merged_parameters(lm)}
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value.float(), expected[name], rtol=1e-5, atol=1e-5)


def check_all() -> None:
    for index, case in enumerate(CASES):
        check(Path(sys.argv[1]) / str(index), case)
    for mesh in ({}, SEQUENCE_PARALLEL):
        check_adapters(Path(sys.argv[1]) / "0", mesh)  # whose values are bfloat16's


def main() -> None:
    attention.register()
    fork_ranks(2, check_all)


if __name__ == "__main__":
    main()
