"""Full support at a real vocabulary against its four bare matrix products and dense logits, and a run that has it.

`bench_full_support.py` makes the inputs and has the products and the dense logits. The engine's hidden states are those
of the embedded pair: a run with loss.support=full must have the loss of one with the teacher's top-k of all tokens.
"""

from __future__ import annotations

import argparse
from functools import partial

import bench_full_support as bench
import torch

from distill_cli.losses.distill_loss import DistillLoss
from gpu_stages.command import metrics, timed
from gpu_stages.figures import Stage
from gpu_stages.timing import alternating_seconds, most_expensive, peak_bytes

SIZES = {"tokens": 8_192, "vocab": 151_936, "hidden": 2_048, "teacher_hidden": 2_560, "topk": 64}
REHEARSED = {"tokens": 128, "vocab": 5_000, "hidden": 32, "teacher_hidden": 48, "topk": 16}
CHECKED_TOKENS = 256
SHORT = (
    *("train.max_steps=2", "eval.period=0", "eval.at_start=false", "eval.at_end=false", "eval.record_samples=0"),
    *("engine.student.enforce_eager=true", "engine.teacher.enforce_eager=true", "rollout.prompts_per_step=16"),
    "train.global_batch_size=16",
)


def run(stage: Stage) -> None:
    sizes, dtype = (REHEARSED, "float32") if stage.rehearse else (SIZES, "bfloat16")
    args = argparse.Namespace(**sizes, dtype=dtype, device=stage.device, support="full", kl_type="mixed")
    inputs = bench.make_inputs(args, tokens=args.tokens)

    def ours() -> None:
        inputs[0].grad = inputs[1].grad = None
        bench.run("fused", args, inputs)

    bare, rounds = partial(bench.products, args, inputs), 3 if stage.rehearse else 10
    seconds = alternating_seconds({"ours": ours, "bare": bare}, device=stage.device, rounds=rounds)
    peaks = {"ours": peak_bytes(ours, device=stage.device)}
    inputs[0].grad = inputs[1].grad = None
    peaks["dense"] = peak_bytes(partial(bench.run, "dense", args, inputs), device=stage.device)
    stage.record("full support, forward and backward", seconds["ours"] * 1e3, "ms")
    stage.record("its four bare products", seconds["bare"] * 1e3, "ms")
    stage.record("its time over the products'", seconds["ours"] / seconds["bare"], at_most=1.3)
    stage.record("full support, peak memory", peaks["ours"] / 2**20, "MiB")
    if not stage.rehearse:
        stage.record("its peak over that of dense logits", peaks["ours"] / peaks["dense"], at_most=0.2)
        stage.table("kernels", most_expensive(ours, device=stage.device))
    check_losses(stage, args, inputs)
    check_run(stage)


def check_losses(stage: Stage, args: argparse.Namespace, inputs: tuple[torch.Tensor, ...]) -> None:
    """Compare a few tokens with float64; a compiled block that is wrong shows here."""
    loss = DistillLoss(kl_type=args.kl_type)
    hidden_NH, weight_VH, teacher_Nh, teacher_Vh = inputs
    some = hidden_NH[:CHECKED_TOKENS].detach().requires_grad_(), weight_VH, teacher_Nh[:CHECKED_TOKENS], teacher_Vh
    exact = tuple(one.detach().double().requires_grad_(one.requires_grad) for one in some)
    expected = bench.dense(args, exact, loss)
    (grad,) = torch.autograd.grad(expected, exact[:1])
    found = bench.fused(args, some, loss)
    (ours,) = torch.autograd.grad(found, some[:1])
    off = abs(float(found.detach() / expected.detach()) - 1)
    stage.record("full support's loss off a plain float64 one", off, at_most=1e-4, wrong_if_missed=True)
    error = float((ours.double() - grad).norm() / grad.norm())
    stage.record("its gradient off", error, at_most=2e-2, wrong_if_missed=True)


def check_run(stage: Stage) -> None:
    runs, losses = stage.scratch / "runs", {}
    for name, *support in (("full", "loss.support=full"), ("all", "loss.topk=512")):
        timed(stage, *SHORT, *support, f"run.name=support_{name}", f"run.root={runs}")
        losses[name] = [row["train/loss"] for row in metrics(runs / f"support_{name}") if row["step"] > 0]
    apart = abs(losses["full"][0] / losses["all"][0] - 1)
    what = "loss of a run with hidden states off one with the top-k of all tokens"
    stage.record(what, apart, at_most=1e-5 if stage.rehearse else 5e-2, wrong_if_missed=True)
