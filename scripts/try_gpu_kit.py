#!/usr/bin/env python3
"""Try the device code of an unpacked kit on this machine's GPU, and put the uncut libraries in place if it fails.

    python /opt/kit/try_gpu_kit.py      # takes about a minute; the kit carries this file

`make_gpu_kit.py` removes code for other GPUs from vLLM's libraries. A child process computes one bfloat16 kernel of
each library that dense decoders use and compares it with torch. If that fails and the kit's folder `original` holds
the uncut libraries (`make_gpu_kit.py --originals`), they replace the cut ones and are tried in turn; if they fail too,
the cut ones are restored and the exit status is 1. Without a GPU nothing changes.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

KIT = Path(__file__).parent
ORIGINALS = KIT / "original"
NO_GPU = 77
"""Exit status of the child if torch sees no GPU."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", action="store_true", help="compute the kernels in this process")
    if parser.parse_args().child:
        return compute()
    status = run_child()
    if status == NO_GPU:
        print("torch sees no GPU here: nothing was tried, and the libraries are unchanged")
        return 0
    if status == 0:
        print("the kit's kernels compute the right numbers")
        return 0
    originals = sorted(path.relative_to(ORIGINALS) for path in ORIGINALS.rglob("*.so"))
    if not originals:
        print(f"the kit's kernels failed (exit status {status}), and {ORIGINALS} is empty", file=sys.stderr)
        return 1
    swap(originals)
    status = run_child()
    if status == 0:
        print(f"the cut libraries failed; the uncut ones are in place and compute the right numbers: {originals}")
        return 0
    swap(originals)
    print(f"the uncut libraries failed too (exit status {status}); the cut ones are in place again", file=sys.stderr)
    return 1


def swap(names: list[Path]) -> None:
    """Exchange the libraries in the kit with those in `original`."""
    for name in names:
        aside = KIT / f"{name}.aside"
        (KIT / name).rename(aside)
        (ORIGINALS / name).rename(KIT / name)
        aside.rename(ORIGINALS / name)


def run_child() -> int:
    path = os.pathsep.join(filter(None, [str(KIT), os.environ.get("PYTHONPATH")]))
    argv = [sys.executable, str(Path(__file__).resolve()), "--child"]
    return subprocess.run(argv, env={**os.environ, "PYTHONPATH": path}).returncode


def compute() -> int:
    """Compare one kernel of each library with torch; return the exit status, 0 if all agree."""
    import torch

    if not torch.cuda.is_available():
        return NO_GPU
    importlib.import_module("vllm._custom_ops")
    flash = importlib.import_module("vllm.vllm_flash_attn")
    torch.manual_seed(0)
    x_TD = torch.randn(64, 1024, dtype=torch.bfloat16, device="cuda")
    weight_D = torch.rand(1024, dtype=torch.bfloat16, device="cuda")
    normed_TD, gated = torch.empty_like(x_TD), torch.empty_like(x_TD[:, :512])
    torch.ops._C.rms_norm(normed_TD, x_TD, weight_D, 1e-6)
    torch.ops._C.silu_and_mul(gated, x_TD)
    query, key, value = torch.randn(3, 64, 8, 128, dtype=torch.bfloat16, device="cuda")
    bounds = torch.tensor([0, 64], dtype=torch.int32, device="cuda")
    attended = flash.flash_attn_varlen_func(
        query, key, value, 64, bounds, 64, cu_seqlens_k=bounds, causal=True, fa_version=3
    )
    heads = (x.transpose(0, 1)[None] for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1)
    pairs = {
        "rms_norm": (normed_TD, torch.nn.functional.rms_norm(x_TD, (1024,), weight_D, 1e-6)),
        "silu_and_mul": (gated, torch.nn.functional.silu(x_TD[:, :512]) * x_TD[:, 512:]),
        "flash attention 3": (attended, expected),
    }
    off = {
        name: ((ours.float() - theirs.float()).abs() / (1 + theirs.float().abs())).max().item()
        for name, (ours, theirs) in pairs.items()
    }
    print(", ".join(f"{name} off by {most:.2g}" for name, most in off.items()), flush=True)
    return int(not all(most < 0.03 for most in off.values()))  # NaN fails


if __name__ == "__main__":
    sys.exit(main())
