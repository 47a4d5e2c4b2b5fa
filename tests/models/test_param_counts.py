"""Parameters by hand, with experts stored one by one and stacked."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from distill_cli.models.param_counts import count, count_active

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 1}


def test_experts_one_by_one_and_stacked(make_model: Callable[..., Path]) -> None:
    folder = make_model("s", **EXPERTS)
    layer = "model.layers.0.mlp"
    each = {f"{layer}.experts.{number}.up_proj.weight": torch.zeros(2, 3) for number in range(4)}
    others = {f"{layer}.shared_expert.up_proj.weight": torch.zeros(2, 3), "visual.blocks.0.weight": torch.zeros(9, 9)}
    save_file({**each, **others}, folder / "model.safetensors")
    assert (count(folder), count_active(folder)) == (4 * 6 + 6, 6 + 6)
    stacked = {"model.layers.0.block_sparse_moe.input_linear.weight": torch.zeros(4, 2, 3)}
    save_file({**stacked, **others}, folder / "model.safetensors")
    assert (count(folder), count_active(folder)) == (4 * 6 + 6, 6 + 6)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 8}))
    assert count_active(folder) == count(folder)
