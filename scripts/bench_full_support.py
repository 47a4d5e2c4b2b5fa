"""Compare loss.support=full with its bare matrix products, and with dense logits: time and peak memory.

    python scripts/bench_full_support.py                          # 8,192 tokens, V = 151,936, hidden 2,048 and 2,560
    python scripts/bench_full_support.py --device cuda --dtype bfloat16
    python scripts/bench_full_support.py --support union          # the same for another support

Forward and backward passes, each variant in a fresh process. `products` are the four matrix products that no way of
computing it avoids, in the same chunks, into the same buffers: both models' logits, and the gradients of hidden states
and weight. `dense` has all logits at once, for autograd; its memory grows by the token, so --dense-tokens of them are
measured, and what they add to the peak is scaled to all tokens. Peak memory is the growth of the peak of resident
memory on a CPU, of the allocator's peak on a GPU, over the inputs.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from bench_loss import each_alone, peak_mib, token_loss_of

from distill_cli.losses.chunks import chunk_size
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.divergence import DIVERGENCES
from distill_cli.losses.head import Head, add_product, logit_dtype, multiply
from distill_cli.losses.linear_divergence import linear_divergence
from distill_cli.losses.teacher_chunk import TeacherHidden

VARIANTS = ("products", "fused", "dense")


def make_inputs(args: argparse.Namespace, *, tokens: int) -> tuple[torch.Tensor, ...]:
    """Return hidden states and weights of student and teacher; the student's require gradients."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, args.dtype)
    made = []
    for size in (args.hidden, args.teacher_hidden):
        hidden_NH = torch.randn(tokens, size, generator=generator)
        weight_VH = torch.randn(args.vocab, size, generator=generator).mul_(2 / size**0.5)
        made += [hidden_NH.to(args.device, dtype), weight_VH.to(args.device, dtype)]
    for one in made[:2]:
        one.requires_grad_()
    return tuple(made)


def fused(args: argparse.Namespace, inputs: tuple[torch.Tensor, ...], loss: DistillLoss) -> torch.Tensor:
    hidden_NH, weight_VH, teacher_Nh, teacher_Vh = inputs
    teacher = TeacherHidden(teacher_Nh, Head(teacher_Vh), args.vocab, args.support, args.topk)
    sampled_ids_N = torch.zeros(len(hidden_NH), dtype=torch.int64, device=hidden_NH.device)
    token_loss = token_loss_of(loss, hidden_NH)
    return linear_divergence(hidden_NH, Head(weight_VH), teacher, token_loss, sampled_ids_N=sampled_ids_N).loss


def dense(_args: argparse.Namespace, inputs: tuple[torch.Tensor, ...], loss: DistillLoss) -> torch.Tensor:
    hidden_NH, weight_VH, teacher_Nh, teacher_Vh = inputs
    logq_NV = (hidden_NH @ weight_VH.t()).float().log_softmax(-1)
    with torch.no_grad():
        logp_NV = (teacher_Nh @ teacher_Vh.t()).float().log_softmax(-1)
    return loss.divergence(logp_NV, logq_NV).sum(-1).mean()


@torch.no_grad()
def products(args: argparse.Namespace, inputs: tuple[torch.Tensor, ...]) -> None:
    """The matrix products alone, as the fused head chunks them, on the operands that it has."""
    of_student, of_teacher = (Head(w).operands(h)[:2] for h, w in (inputs[:2], inputs[2:]))
    hidden_NH, weight_VH = of_student
    size, dtype = chunk_size(*weight_VH.shape, num_tokens=len(hidden_NH)), logit_dtype(weight_VH)
    buffers = torch.empty(2, size, len(weight_VH), dtype=dtype, device=weight_VH.device)
    grad_NH, grad_VH = torch.empty_like(hidden_NH), torch.zeros_like(weight_VH, dtype=dtype)
    for start in range(0, len(hidden_NH), size):
        rows = slice(start, start + size)
        logits_nV, teacher_nV = buffers[:, : len(hidden_NH[rows])]
        for out, (hidden, weight) in ((logits_nV, of_student), (teacher_nV, of_teacher)):
            multiply(hidden[rows], weight.t(), out=out)
        grad_nV = logits_nV.to(weight_VH.dtype)
        torch.mm(grad_nV, weight_VH, out=grad_NH[rows])
        add_product(grad_VH, grad_nV.t(), hidden_NH[rows])


def run(name: str, args: argparse.Namespace, inputs: tuple[torch.Tensor, ...]) -> None:
    loss = DistillLoss(kl_type=args.kl_type)
    if name == "products":
        products(args, inputs)
    else:
        {"fused": fused, "dense": dense}[name](args, inputs, loss).backward()


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one forward and backward pass in this process, which should be fresh; return peak MiB and seconds."""
    torch.set_num_threads(args.threads)
    tokens, on_gpu = args.dense_tokens if name == "dense" else args.tokens, args.device == "cuda"
    small = argparse.Namespace(**{**vars(args), "vocab": 1024})
    run(name, small, make_inputs(small, tokens=64))  # libraries load on first use, and GPUs compile
    inputs = make_inputs(args, tokens=tokens)
    if on_gpu:  # sizes matter to what is compiled
        run(name, args, tuple(one.detach().requires_grad_(one.requires_grad) for one in inputs))
    before = peak_mib(on_gpu=on_gpu, reset=True)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    run(name, args, inputs)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - wall_s}
    return {"peak_mib": peak_mib(on_gpu=on_gpu) - before, "tokens": tokens, **seconds}


def print_table(args: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    print(
        f"{args.tokens} tokens, V={args.vocab}, hidden {args.hidden} and {args.teacher_hidden}, "
        f"{args.support} support, {args.kl_type}, {args.dtype} on {args.device}, {args.threads} threads"
    )
    gradient_mib = args.vocab * args.hidden * 4 / 2**20  # the weight's, which does not grow with the tokens
    scaled = results["dense"]["peak_mib"] - gradient_mib
    dense_mib = gradient_mib + scaled * args.tokens / results["dense"]["tokens"]
    for name, result in results.items():
        peak = dense_mib if name == "dense" else result["peak_mib"]
        note = (
            f"  (scaled from {result['tokens']:.0f} tokens)"
            if name == "dense" and args.dense_tokens < args.tokens
            else ""
        )
        seconds = result["wall_s"] * args.tokens / result["tokens"]
        print(f"{name:10}{peak:10.0f} MiB{seconds:10.2f} s{note}")
    print(f"fused / products: {results['fused']['wall_s'] / results['products']['wall_s']:.3f} of the time")
    print(f"fused / dense:    {results['fused']['peak_mib'] / dense_mib:.3f} of the memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"tokens": 8192, "vocab": 151_936, "hidden": 2048, "teacher-hidden": 2560, "topk": 64, "threads": 2}
    for name, size in {**sizes, "dense-tokens": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--support", choices=("full", "union", "student", "teacher"), default="full")
    parser.add_argument("--kl-type", choices=tuple(DIVERGENCES), default="mixed")
    parser.add_argument("--only", choices=VARIANTS, help="measure one in this process, print JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    print_table(args, each_alone(VARIANTS, __file__))


if __name__ == "__main__":
    main()
