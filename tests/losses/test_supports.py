"""Every support, divergence and tail from the teacher's hidden states, against dense float64 distributions."""

import itertools
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distill_cli.losses.distill_loss import TAILS, DistillLoss
from distill_cli.losses.divergence import DIVERGENCES
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import linear_divergence
from distill_cli.losses.logit_transform import LogitTransform
from distill_cli.losses.teacher_chunk import TopK

from .reference import HeadLoss
from .supports import TOPK, VOCAB, Pair, dense_logits, distributions, make_pair, reference, run, sampled_of, weights_of

SUPPORTS = ("teacher", "student", "union", "full")
COMBINATIONS = [
    (support, kl_type, tail)
    for support in SUPPORTS
    for kl_type in DIVERGENCES
    for tail in (TAILS if support != "full" else ("bucket",))
]
ENDS = (4, 17, 25)
HEADS = {
    "plain": {},
    "cap": {"transform": LogitTransform(soft_cap=4.0), "teacher_transform": LogitTransform(scale=0.5)},
    "all": {
        "transform": LogitTransform(scale=1.6, soft_cap=5.0),
        "teacher_transform": LogitTransform(scale=0.7, soft_cap=6.0),
        "with_bias": True,
    },
}


@pytest.mark.parametrize(("support", "kl_type", "tail"), COMBINATIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("ends", [(), ENDS])
def test_loss_and_gradients_equal_dense(support, kl_type, tail, temperature, ends) -> None:
    pair = make_pair(**HEADS["all" if temperature == 1.0 else "plain"]).requires_grad()
    loss = DistillLoss(kl_type=kl_type, tail=tail)
    output = run(pair, loss, support=support, temperature=temperature, merged_eos_ids=ends)
    expected_N = reference(pair, support=support, kl_type=kl_type, tail=tail, temperature=temperature, ends=ends)
    close = {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(output.divergence_N, expected_N.detach(), **close)
    torch.testing.assert_close(output.loss_N, (weights_of(pair) * expected_N).detach(), **close)
    found = torch.autograd.grad(output.loss, pair.trained)
    right = torch.autograd.grad((weights_of(pair) * expected_N).sum(), pair.trained)
    for got, want in zip(found, right, strict=True):
        torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("head", HEADS)
def test_float32_is_close_to_float64(support: str, head: str) -> None:
    pair = make_pair(**HEADS[head], dtype=torch.float32).requires_grad()
    output = run(pair, DistillLoss(kl_type="mixed"), support=support)
    exact = pair.double().requires_grad()
    expected_N = reference(exact, support=support, kl_type="mixed", tail="bucket")
    torch.testing.assert_close(output.divergence_N.double(), expected_N.detach(), rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(output.loss, pair.trained)
    right = torch.autograd.grad((weights_of(pair) * expected_N).sum(), exact.trained)
    for got, want in zip(found, right, strict=True):
        assert float((got.double() - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize(("support", "kl_type", "tail"), COMBINATIONS)
def test_gradient_by_gradcheck(support: str, kl_type: str, tail: str) -> None:
    class Head_(torch.autograd.Function):
        """The head's backward runs once; gradcheck calls it several times."""

        @staticmethod
        def forward(ctx, *trained):
            with torch.enable_grad():
                own = [x.detach().requires_grad_() for x in trained]
                pair = replace(base, hidden_NH=own[0], head=replace(base.head, weight_VH=own[1], bias_V=own[2]))
                loss = run(pair, DistillLoss(kl_type=kl_type, tail=tail), support=support, merged_eos_ids=ENDS).loss
                ctx.grads = torch.autograd.grad(loss, own)
            return loss.detach()

        @staticmethod
        def backward(ctx, grad):
            return tuple(grad * one for one in ctx.grads)

    base = make_pair(tokens=3, **HEADS["all"]).requires_grad()
    assert torch.autograd.gradcheck(Head_.apply, tuple(base.trained), fast_mode=True)


@pytest.mark.parametrize("kl_type", DIVERGENCES)
@pytest.mark.parametrize("vocab_size", [VOCAB, VOCAB - 5])
@pytest.mark.parametrize("ends", [(), ENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_equals_top_k_of_all(kl_type: str, vocab_size: int, ends: tuple[int, ...], dtype: torch.dtype) -> None:
    """The teacher's top-k of all ids that it scores, as its engine gives it, and as it follows from hidden states."""
    pair, loss = make_pair(vocab_size=vocab_size, dtype=dtype, with_bias=True), DistillLoss(kl_type=kl_type)
    pair.head.bias_V[vocab_size:] -= 25  # padding of a vocabulary is unlikely
    p_NV, _ = distributions(pair.double(), ends=ends)
    kept = [token for token in range(vocab_size) if token not in ends[1:]]
    logp_NK = p_NV[:, kept].log().to(dtype)
    ids_NK = torch.tensor(kept).expand(len(logp_NK), -1)
    results = []
    for teacher in ("engine", "teacher", "full"):
        trained, options = pair.requires_grad(), {"merged_eos_ids": ends, "chunk_tokens": 4}
        if teacher == "engine":
            known = TopK(ids_NK, logp_NK, torch.zeros(len(logp_NK)))
            token_loss = HeadLoss(loss, weights_of(pair))
            sampled = sampled_of(pair)
            output = linear_divergence(
                trained.hidden_NH, trained.head, known, token_loss, sampled_ids_N=sampled, **options
            )
        else:
            output = run(trained, loss, support=teacher, topk=vocab_size, **options)
        results.append((output, torch.autograd.grad(output.loss, trained.trained)))
    for output, grads in results[1:]:
        for name in ("divergence_N", "kl_forward_N", "kl_reverse_N", "student_mass_N", "entropy_N"):
            torch.testing.assert_close(
                getattr(output, name), getattr(results[0][0], name), rtol=1e-6, atol=1e-6, msg=name
            )
        for got, want in zip(grads, results[0][1], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("vocab_size", [VOCAB, VOCAB - 5])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("ends", [(), ENDS])
def test_reported_values_equal_dense(support: str, vocab_size: int, temperature: float, ends: tuple[int, ...]) -> None:
    pair = make_pair(vocab_size=vocab_size, **HEADS["cap"])
    token_loss = HeadLoss(DistillLoss(kl_type="mixed"))
    token_loss.reads_teachability, seen = True, []
    token_loss.total = lambda divergence_n, weights_n, tokens, rows: seen.append(tokens.teachability_n) or divergence_n
    options = {"temperature": temperature, "merged_eos_ids": ends, "num_top": 3, "token_loss": token_loss}
    output = run(pair, token_loss.loss, support=support, **options)
    p_NV, q_NV = distributions(pair, temperature=temperature, ends=ends)
    sampled_N = sampled_of(pair)
    own_N = torch.where(torch.isin(sampled_N, torch.tensor(ends)), ends[0] if ends else 0, sampled_N)
    q1_NV = dense_logits(pair.hidden_NH, pair.head).log_softmax(-1)
    theirs, ours = (x_NV[:, :vocab_size].topk(TOPK).indices for x_NV in (p_NV, q_NV))
    mass = {
        "teacher": theirs,
        "student": ours,
        "union": torch.cat([theirs, ours], 1),
        "full": torch.arange(vocab_size).expand(len(p_NV), -1),
    }[support]
    inside_NV = torch.zeros_like(p_NV).scatter(1, mass, 1)
    right = {
        "entropy_N": -torch.xlogy(q_NV, q_NV).sum(-1),
        "teacher_entropy_N": -torch.xlogy(p_NV, p_NV).sum(-1),
        "argmax_N": q_NV.argmax(-1),
        "teacher_argmax_N": p_NV.argmax(-1),
        "sampled_logp_N": q1_NV.gather(1, sampled_N[:, None])[:, 0],
        "teacher_sampled_logp_N": p_NV.gather(1, own_N[:, None])[:, 0].log(),
        "top_ids_NM": q_NV.topk(3).indices,
        "top_logp_NM": q_NV.topk(3).values.log(),
        "teacher_top_ids_NM": p_NV.topk(3).indices,
        "teacher_top_logp_NM": p_NV.topk(3).values.log(),
        "teacher_mass_N": (p_NV * inside_NV).sum(-1),
        "student_mass_N": (q_NV * inside_NV).sum(-1),
    }
    for name, value in right.items():
        torch.testing.assert_close(
            getattr(output, name), value, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: n + text
        )
    torch.testing.assert_close(torch.cat(seen), p_NV.gather(1, ours).sum(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("support", SUPPORTS)
def test_sampled_token_has_a_gradient(support: str) -> None:
    """A loss of the sampled token's log-probability beside the divergence, ends merged or not."""
    for ends in ((), ENDS):
        pair = make_pair(**HEADS["all"]).requires_grad()
        token_loss = HeadLoss(DistillLoss(kl_type="mixed"))
        token_loss.total = lambda divergence_n, weights_n, tokens, rows: divergence_n + 0.3 * tokens.sampled_logp_n
        output = run(pair, token_loss.loss, support=support, merged_eos_ids=ends, token_loss=token_loss)
        sampled_N1 = sampled_of(pair)[:, None]
        logq_N = dense_logits(pair.hidden_NH, pair.head).log_softmax(-1).gather(1, sampled_N1)[:, 0]
        expected_N = reference(pair, support=support, kl_type="mixed", tail="bucket", ends=ends) + 0.3 * logq_N
        torch.testing.assert_close(output.loss_N, expected_N.detach())
        found = torch.autograd.grad(output.loss, pair.trained)
        for got, want in zip(found, torch.autograd.grad(expected_N.sum(), pair.trained), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("tokens", [0, 1])
def test_one_token_and_none(support: str, tokens: int) -> None:
    pair = make_pair(tokens=tokens).requires_grad()
    output = run(pair, DistillLoss(kl_type="mixed"), support=support, num_top=2)
    output.loss.backward()
    assert output.loss_N.shape == (tokens,)
    assert pair.hidden_NH.grad.shape == pair.hidden_NH.shape
    assert bool((pair.head.weight_VH.grad == 0).all()) == (tokens == 0)


def test_full_support_keeps_no_logits() -> None:
    from .test_linear_divergence import Noted

    pair = make_pair(tokens=200, **HEADS["cap"]).requires_grad()
    with Noted() as noted:
        run(pair, DistillLoss(kl_type="jsd"), support="full", chunk_tokens=8).loss.backward()
    assert max(size for _, size in noted.made) == max(4 * 8 * VOCAB, 200 * pair.hidden_NH.shape[1])


def compare_on_rank(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    cases = itertools.product(SUPPORTS, ("mixed", "jsd"), (VOCAB, VOCAB - 5, VOCAB // 2), ((), (17, 4), (4, 15)))
    for support, kl_type, vocab_size, ends in cases:
        ends = tuple(one for one in ends if one < vocab_size)
        tail = "zero" if ends and support != "full" else "bucket"
        loss, options = (
            DistillLoss(kl_type=kl_type, tail=tail),
            {"support": support, "merged_eos_ids": ends, "num_top": 3},
        )
        options["temperature"] = 0.8 if tail == "zero" else 1.0
        whole = make_pair(vocab_size=vocab_size, **HEADS["all"])
        shard = cut(whole, rank).requires_grad()
        whole = whole.requires_grad()
        expected = run(whole, loss, **options)
        output = run(shard, loss, group=dist.group.WORLD, **options)
        for one in (expected, output):
            one.loss.backward()
        dist.all_reduce(shard.hidden_NH.grad)
        case = (support, kl_type, vocab_size, ends)
        close = {"rtol": 1e-9, "atol": 1e-9, "msg": lambda text, case=case: f"{case}: {text}"}
        for field in fields(output):
            got, want = getattr(output, field.name), getattr(expected, field.name)
            torch.testing.assert_close(got, want, **close)
        torch.testing.assert_close(shard.hidden_NH.grad, whole.hidden_NH.grad, **close)
        torch.testing.assert_close(shard.head.weight_VH.grad, whole.head.weight_VH.grad.chunk(2)[rank], **close)
        torch.testing.assert_close(shard.head.bias_V.grad, whole.head.bias_V.grad.chunk(2)[rank], **close)
    dist.destroy_process_group()


def cut(pair: Pair, rank: int) -> Pair:
    """The pair with a rank's half of both heads; of the teacher's the rows that it has there."""
    ids = slice(rank * VOCAB // 2, (rank + 1) * VOCAB // 2)

    def part(head: Head) -> Head:
        return replace(head, weight_VH=head.weight_VH[ids], bias_V=None if head.bias_V is None else head.bias_V[ids])

    return replace(pair, head=part(pair.head), teacher_head=part(pair.teacher_head))


def test_two_shards_equal_the_whole(tmp_path: Path) -> None:
    mp.spawn(compare_on_rank, args=(str(tmp_path / "rendezvous"),), nprocs=2)


def test_identical_models_have_no_divergence() -> None:
    pair = make_pair()
    same = replace(pair, teacher_Nh=pair.hidden_NH, teacher_head=pair.head)
    for support, kl_type, tail in COMBINATIONS:
        output = run(same, DistillLoss(kl_type=kl_type, tail=tail), support=support)
        if tail != "zero":
            assert float(output.divergence_N.abs().max()) < 1e-12, (support, kl_type, tail)
