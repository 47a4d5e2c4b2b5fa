import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.run import get_args_parser

from distill_cli.machine import torch_versions


@pytest.mark.parametrize("option", ["--shutdown-timeout", "--signals-to-handle", "--no-such-option"])
def test_torchrun_options_match_its_parser(option: str) -> None:
    assert torch_versions.torchrun_knows(option) == (option in get_args_parser()._option_string_actions)


def test_looking_up_options_imports_no_torch() -> None:
    code = "import sys; from distill_cli.machine import torch_versions; torch_versions.torchrun_knows('--x'); "
    code += "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("knows_groups", [True, False])
def test_heads_are_grouped_where_torch_can(knows_groups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel needs CUDA: check its arguments."""
    given = {}

    def with_groups(query, key, value, *, enable_gqa=False):
        given.update(key=key, enable_gqa=enable_gqa)

    def without_groups(query, key, value):
        given.update(key=key, enable_gqa=None)

    module = SimpleNamespace(varlen_attn=with_groups if knows_groups else without_groups)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    torch_versions._varlen_knows_groups.cache_clear()
    key = torch.arange(6.0).view(3, 2, 1)
    torch_versions.varlen_attention(torch.zeros(3, 4, 1), key, key)
    torch_versions._varlen_knows_groups.cache_clear()
    assert given["enable_gqa"] is (True if knows_groups else None)
    assert given["key"].shape[1] == (2 if knows_groups else 4)
    if not knows_groups:  # each query's head meets the key of its own group
        assert given["key"][0, :, 0].tolist() == [0, 0, 1, 1]
