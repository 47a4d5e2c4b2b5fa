"""Copies that follow the student: their values by hand, and the model's own weights after a loan."""

import torch
from torch import nn

from distill_cli.student.moving import MovingCopy


def trained(copy: MovingCopy) -> torch.Tensor:
    return copy.tensors()["teacher_copy_0.weight"]


def make() -> nn.Linear:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    return model


def test_running_mean_by_hand() -> None:
    model = make()
    first, copy = model.weight.detach().clone(), MovingCopy(model, ema=0.75)
    assert list(copy.tensors()) == ["teacher_copy_0.weight"]  # a frozen parameter needs no copy
    with torch.no_grad():
        model.weight += 1
    copy.follow(1)
    torch.testing.assert_close(trained(copy), first + 0.25)
    copy.follow(2)
    torch.testing.assert_close(trained(copy), first + 0.25 + 0.75 * 0.25)
    assert copy.moves == 2


def test_refresh_takes_every_nth_step() -> None:
    model = make()
    first, copy = model.weight.detach().clone(), MovingCopy(model, refresh=3)
    for step in range(1, 5):
        with torch.no_grad():
            model.weight += 1
        copy.follow(step)
        torch.testing.assert_close(trained(copy), first + (3 if step >= 3 else 0))
    assert copy.moves == 1


def test_model_gets_its_weights_back() -> None:
    model = make()
    first, copy = model.weight.detach().clone(), MovingCopy(model, ema=0.5)
    with torch.no_grad():
        model.weight *= 2
    with copy.in_place():
        assert model.weight.equal(first)
    assert model.weight.equal(2 * first)
    copy.loaded()
    assert copy.moves == 1
