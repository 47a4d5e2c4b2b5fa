"""How the global batch is cut up changes neither loss, nor gradient norm, nor parameters."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "train_rank.py"


def train(out: Path, *, ranks: int, micro_batch_tokens: int, checkpointing: bool = False, bf16: bool = False) -> tuple:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
        *(str(SCRIPT), str(out), str(micro_batch_tokens), str(checkpointing), str(bf16)),
    ]
    subprocess.run(command, check=True, env=None, capture_output=True, timeout=300)
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    return train(tmp_path_factory.mktemp("equality") / "one.pt", ranks=1, micro_batch_tokens=10_000)


@pytest.mark.parametrize(
    ("ranks", "micro_batch_tokens", "checkpointing"),
    [
        (1, 40, True),
        (2, 10_000, False),
        (2, 40, False),  # several micro-batches, and not as many on each rank
        (3, 60, True),
    ],
)
def test_the_same_on_other_ranks_and_micro_batches(
    one_rank: tuple, tmp_path: Path, ranks: int, micro_batch_tokens: int, checkpointing: bool
) -> None:
    losses, norms, params = train(
        tmp_path / "out.pt", ranks=ranks, micro_batch_tokens=micro_batch_tokens, checkpointing=checkpointing
    )
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(one_rank[0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(one_rank[1]), rtol=1e-5, atol=0)
    assert params.keys() == one_rank[2].keys()
    for name, param in params.items():
        torch.testing.assert_close(param, one_rank[2][name], rtol=1e-4, atol=1e-5)


def test_bf16_computes_close_to_float32_and_keeps_float32_parameters(one_rank: tuple, tmp_path: Path) -> None:
    losses, norms, params = train(tmp_path / "out.pt", ranks=2, micro_batch_tokens=60, bf16=True)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(one_rank[0]), rtol=0.02, atol=0)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(one_rank[1]), rtol=0.1, atol=0)
    assert all(param.dtype == torch.float32 for param in params.values())
