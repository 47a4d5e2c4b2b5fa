"""Compare the fused head with the plain one: peak memory, time, and the gradient's error.

    python scripts/bench_loss.py                        # 2,048 tokens, V = 151,936, hidden 512, k = 64
    python scripts/bench_loss.py --device cuda --dtype bfloat16 --hidden 2048

Each head is measured in a fresh process. Peak memory is the growth of the peak of resident memory on a CPU, of the
allocator's peak on a GPU; it includes the weight's gradient. The error is the norm of the difference from the float64
gradient, over the norm of the latter, on a small case.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from distill_cli.losses.distill_loss import TAILS, DistillLoss
from distill_cli.losses.divergence import DIVERGENCES
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import linear_divergence
from distill_cli.losses.objective import BatchLoss, Facts, Objective
from distill_cli.losses.teacher_chunk import TopK

SMALL = {"tokens": 64, "vocab": 1000, "hidden": 32, "topk": 16}


def fused(hidden_NH, weight_VH, ids_NK, teacher_logp_NK, loss: DistillLoss) -> torch.Tensor:
    teacher = TopK(ids_NK, teacher_logp_NK, teacher_logp_NK[:, 0])
    token_loss, sampled_ids_N = token_loss_of(loss, hidden_NH), ids_NK[:, 0]
    return linear_divergence(hidden_NH, Head(weight_VH), teacher, token_loss, sampled_ids_N=sampled_ids_N).loss


def token_loss_of(loss: DistillLoss, hidden_NH: torch.Tensor) -> BatchLoss:
    """Return the mean over tokens, as training has it."""
    zeros_N = torch.zeros(hidden_NH.shape[0], dtype=torch.int64, device=hidden_NH.device)
    facts = Facts(zeros_N, zeros_N.float(), zeros_N.bool(), zeros_N, zeros_N + 1, zeros_N.float())
    num_tokens = torch.tensor(float(len(zeros_N)), device=zeros_N.device)
    return BatchLoss({}, Objective(loss), facts, num_loss_tokens=num_tokens)


def materialised(hidden_NH, weight_VH, ids_NK, teacher_logp_NK, loss: DistillLoss) -> torch.Tensor:
    """Return the loss by log_softmax over all logits, for autograd."""
    logp_NV = (hidden_NH @ weight_VH.t()).to(teacher_logp_NK.dtype).log_softmax(-1)
    logp_NK = logp_NV.gather(1, ids_NK)
    rest_N = (1 - logp_NK.exp().sum(-1)).clamp_min(1e-7).log()
    # Only the `zero` tail reads the entropy, which would cost two more [tokens, vocabulary].
    entropy_N = -(logp_NV.exp() * logp_NV).sum(-1) if loss.tail == "zero" else rest_N
    return loss(teacher_logp_NK, torch.cat([logp_NK, rest_N[:, None]], dim=-1), entropy_N).mean()


VARIANTS: dict[str, Callable[..., torch.Tensor]] = {"materialised": materialised, "fused": fused}


def make_inputs(sizes: dict[str, int], *, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    tokens, vocab, hidden, topk = (sizes[name] for name in ("tokens", "vocab", "hidden", "topk"))
    hidden_NH = torch.randn(tokens, hidden, generator=generator)
    weight_VH = torch.randn(vocab, hidden, generator=generator).mul_(2 / hidden**0.5)
    ids_NK = torch.randint(vocab, (tokens, 1), generator=generator).add(torch.arange(topk) * (vocab // topk)) % vocab
    # The rest of the teacher's distribution is one more logit.
    teacher_logp_NK = torch.randn(tokens, topk + 1, generator=generator).mul_(2).log_softmax(-1)
    hidden_NH, weight_VH = (x.to(device, dtype).requires_grad_() for x in (hidden_NH, weight_VH))
    return hidden_NH, weight_VH, ids_NK.to(device), teacher_logp_NK[:, :-1].to(device)


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one forward and backward pass in this process, which should be fresh; return peak MiB and seconds."""
    torch.set_num_threads(args.threads)
    inputs = make_inputs(vars(args), device=args.device, dtype=getattr(torch, args.dtype))
    loss = DistillLoss(kl_type=args.kl_type, tail=args.tail)
    warm = make_inputs(SMALL, device=args.device, dtype=getattr(torch, args.dtype))
    VARIANTS[name](*warm, loss).backward()  # libraries load on first use
    on_gpu = args.device == "cuda"
    before_mib = peak_mib(on_gpu=on_gpu, reset=True)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    VARIANTS[name](*inputs, loss).backward()
    if on_gpu:
        torch.cuda.synchronize()
    times = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - wall_s}
    return {"peak_mib": peak_mib(on_gpu=on_gpu) - before_mib, **times, "gradient_error": gradient_error(name, loss)}


def peak_mib(*, on_gpu: bool, reset: bool = False) -> float:
    """Return the peak memory so far; with `reset`, restart the peak at the memory held now and return that."""
    if not on_gpu:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
    if reset:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 2**20


def gradient_error(name: str, loss: DistillLoss) -> float:
    """Return the relative error of the float32 gradient against float64, on the CPU."""
    gradients = []
    for function, dtype in ((VARIANTS[name], torch.float32), (materialised, torch.float64)):
        hidden_NH, weight_VH, ids_NK, teacher_logp_NK = make_inputs(SMALL, device="cpu", dtype=torch.float32)
        hidden_NH, weight_VH = (x.detach().to(dtype).requires_grad_() for x in (hidden_NH, weight_VH))
        function(hidden_NH, weight_VH, ids_NK, teacher_logp_NK.to(dtype), loss).backward()
        gradients.append(torch.cat([hidden_NH.grad.flatten(), weight_VH.grad.flatten()]).double())
    ours, exact = gradients
    return float((ours - exact).norm() / exact.norm())


def print_table(args: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    weight_mib = args.vocab * args.hidden * getattr(torch, args.dtype).itemsize / 2**20
    print(
        f"{args.tokens} tokens, V={args.vocab}, hidden {args.hidden}, k={args.topk}, {args.kl_type}/{args.tail}, "
        f"{args.dtype} on {args.device}, {args.threads} threads; the weight's gradient alone is {weight_mib:.0f} MiB"
    )
    columns = ("peak_mib", "cpu_s", "wall_s", "gradient_error")
    print(f"{'':14}" + "".join(f"{column:>16}" for column in columns))
    for name, result in results.items():
        print(f"{name:14}" + "".join(f"{result[column]:>16.4g}" for column in columns))
    ratios = {column: results["fused"][column] / results["materialised"][column] for column in columns[:3]}
    print(f"{'ratio':14}" + "".join(f"{ratio:>16.3f}" for ratio in ratios.values()))


def each_alone(variants: Iterable[str], script: str) -> dict[str, dict[str, float]]:
    """Return what `script --only VARIANT` prints as JSON: each variant in a process of its own, with fresh memory."""
    command = [sys.executable, script, *sys.argv[1:], "--only"]
    return {one: json.loads(subprocess.check_output([*command, one], text=True)) for one in variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in {"tokens": 2048, "vocab": 151_936, "hidden": 512, "topk": 64, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--kl-type", choices=tuple(DIVERGENCES), default="mixed")
    parser.add_argument("--tail", choices=TAILS, default="bucket")
    parser.add_argument("--only", choices=tuple(VARIANTS), help="measure one in this process, print JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    print_table(args, each_alone(VARIANTS, __file__))


if __name__ == "__main__":
    main()
