"""Optimizer state that rests elsewhere: it is moved, and what is learned stays the same to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from distill_cli.student.optimizer import OptimizerOffload, build_optimizer

CPU = torch.device("cpu")


class Holder(torch.nn.Module):
    def __init__(self, param: torch.nn.Parameter) -> None:
        super().__init__()
        self.param = param


class Spy(OptimizerOffload):
    """Notes where each move went."""

    def move(self, device: torch.device) -> None:
        self.moves = [*getattr(self, "moves", []), device]
        super().move(device)


def train(device: torch.device, *, offload: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer, Spy | None]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)).to(device)
    optimizer = build_optimizer(module, lr=1e-2)
    spy = Spy(optimizer, rest=CPU, work=device) if offload else None
    for step in range(4):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step)).to(device)
        module(x).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer, spy


def assert_same(device: torch.device) -> None:
    plain, plain_optimizer, _ = train(device, offload=False)
    module, optimizer, spy = train(device, offload=True)
    assert spy.moves == [device, CPU] * 4
    pairs = zip(module.parameters(), plain.parameters(), strict=True)
    for param, other in pairs:
        assert torch.equal(param, other)
        for name in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[param][name]
            assert state.device == CPU
            assert torch.equal(state, plain_optimizer.state[other][name].cpu())


def test_offloaded_state_learns_the_same() -> None:
    assert_same(CPU)


def test_moving_copies_and_loading_moves_too() -> None:
    _, optimizer, spy = train(CPU, offload=True)
    state = next(iter(optimizer.state.values()))
    before, values = state["exp_avg"].data_ptr(), state["exp_avg"].clone()
    held = state["exp_avg"]
    spy.move(CPU)
    assert state["exp_avg"].data_ptr() != before
    assert torch.equal(state["exp_avg"], values)
    del held
    optimizer.load_state_dict(optimizer.state_dict())
    assert spy.moves[-1] == CPU
    assert len(spy.moves) == 4 * 2 + 2


def test_sharded_state_moves_in_place() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
        optimizer = torch.optim.AdamW([param], lr=0.1)
        spy = Spy(optimizer, rest=CPU, work=CPU)
        param.grad = torch.ones_like(param)
        optimizer.step()
        moment = optimizer.state[param]["exp_avg"]
        held, values = moment.to_local(), moment.to_local().clone()
        spy.move(CPU)
        assert optimizer.state[param]["exp_avg"] is moment
        assert moment.to_local().data_ptr() != held.data_ptr()
        assert torch.equal(moment.to_local(), values)
        assert dcp_state.get_optimizer_state_dict(Holder(param), optimizer)["state"]
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
def test_offloaded_state_leaves_the_gpu() -> None:
    assert_same(torch.device("cuda"))
    torch.cuda.empty_cache()
