"""Packed attention against transformers' own, document by document."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from distill_cli.errors import DistillError
from distill_cli.parallel.context import Documents
from distill_cli.student import attention, document_batches


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: tuple[int, ...], window: int | None
) -> torch.Tensor:
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    document = torch.bucketize(torch.arange(length), torch.tensor(bounds[1:]), right=True)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    allowed = (document[:, None] == document[None]) & (j <= i) & (i - j < (window or length + 1))
    scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, window: int | None = None
) -> torch.Tensor:
    mask = attention.PackedMask(documents, attention.Sight(window=window))
    out, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, mask)
    return out.transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("bounds", [(0, 9), (0, 1, 9), (0, 4, 5, 9)])
def test_documents_do_not_see_each_other(bounds: tuple[int, ...], window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 9, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(1, 2, 9, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    out = attend(q, k, v, Documents(bounds), window)
    torch.testing.assert_close(out, dense(q, k, v, bounds, window))


SIGHTS = [attention.Sight(), attention.Sight(window=3), attention.Sight(chunk=4)]


def dense_scores(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sight: attention.Sight, scores: attention.Scores
) -> torch.Tensor:
    """One document's attention, by its definition."""
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None]
    allowed = (j <= i) & (i - j < (sight.window or 99)) & (i // (sight.chunk or 99) == j // (sight.chunk or 99))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    raw = q @ k.transpose(-1, -2) * scores.scale
    raw = raw if scores.soft_cap is None else scores.soft_cap * torch.tanh(raw / scores.soft_cap)
    exp = raw.exp() * allowed
    total = exp.sum(-1, keepdim=True)
    if scores.sinks_H is not None:
        total = total + scores.sinks_H.exp()[:, None, None]
    return exp / total @ v


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("rows", [2, 512])
def test_caps_and_sinks_are_exact(rows: int, sight: attention.Sight, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_ROWS", rows)  # several parts of a document, as in a long one
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8), (4,)]
    q, k, v, sinks = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    scores = attention.Scores(0.5, soft_cap=2.0, sinks_H=sinks)
    bounds = (0, 6, 9)
    mask = attention.PackedMask(Documents(bounds), sight)
    out, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, mask, 0.5, softcap=2.0, s_aux=sinks)
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    expected = torch.cat([dense_scores(q[:, :, p], k[:, :, p], v[:, :, p], sight, scores) for p in parts], dim=2)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((out.transpose(1, 2) * weight).sum(), (q, k, v, sinks))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v, sinks))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_short_documents_in_one_call(
    sight: attention.Sight, soft_cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_batches, "SHORT", 6)
    documents = Documents((0, 4, 5, 9, 20, 26, 29, 33, 35))
    batches = document_batches.batches_of(documents.spans[0], torch.device("cpu"))
    assert batches.sizes == ((1, 11, 11), (1, 6, 6), (4, 4, 4), (1, 2, 2), (1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 35, 4, 8), (1, 35, 2, 8), (1, 35, 2, 8)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).transpose(1, 2) for s in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = attention.PackedMask(documents, sight)
    out, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, mask, softcap=soft_cap)
    scores = attention.Scores(8**-0.5, soft_cap)
    parts = [slice(a, b) for a, b in pairwise(documents.bounds)]
    expected = torch.cat([dense_scores(q[:, :, p], k[:, :, p], v[:, :, p], sight, scores) for p in parts], dim=2)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((out.transpose(1, 2) * weight).sum(), leaves)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("size", [1, 2])
def test_flex_kernels_mask_is_equal(size: int, sight: attention.Sight) -> None:
    """Without a gradient: flex attention has none on CPUs."""
    generator, bounds = torch.Generator().manual_seed(0), (0, 6, 7, 16)
    q, k, v = (torch.randn(1, heads, 16, 8, generator=generator) for heads in (4, 4, 4))
    sinks = torch.randn(4, generator=generator)
    scores = attention.Scores(0.5, soft_cap=2.0, sinks_H=sinks)
    for rank in range(size):
        documents = Documents(bounds, rank=rank, size=size)
        for span in documents.spans:
            rows = documents.take(q, 2)[:, :, span.begin :][:, :, : span.query_bounds[-1]]
            parts = rows, *(x[:, :, slice(*span.keys)] for x in (k, v))
            cpu = torch.device("cpu")
            block_mask = attention._block_mask(span, sight, cpu)
            out, aux = flex_attention(
                *parts, score_mod=attention.soft_capped(2.0), block_mask=block_mask, scale=0.5,
                return_aux=AuxRequest(lse=True),
            )  # fmt: skip
            expected = attention._attend_eagerly(*parts, span, scores, sight)
            torch.testing.assert_close(attention.with_sinks(out, aux.lse, sinks), expected, rtol=1e-4, atol=1e-5)


def test_masks_are_described() -> None:
    config = Qwen3Config(
        use_sliding_window=True, sliding_window=3, attention_chunk_size=4, attn_implementation=attention.NAME
    )
    attention.register()
    inputs = {
        "config": config, "inputs_embeds": torch.zeros(1, 9, 2), "attention_mask": torch.ones(1, 9, dtype=torch.bool),
        "past_key_values": None, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]]),
    }  # fmt: skip
    documents = Documents((0, 3, 9))
    attend = partial(attention.packed_attention, torch.nn.Identity(), *torch.zeros(3, 1, 2, 9, 8))
    with attention.documents_of(documents):
        masks = [make(**inputs) for make in (create_causal_mask, create_sliding_window_causal_mask)]
        masks.append(create_chunked_causal_mask(**inputs))
        both_ways = create_bidirectional_mask(config=config, inputs_embeds=torch.zeros(1, 9, 2), attention_mask=None)
        attend(masks[0])
    assert masks == [attention.PackedMask(documents, sight) for sight in (SIGHTS[0], SIGHTS[1], SIGHTS[2])]
    with pytest.raises(DistillError, match="not causal"):
        attend(both_ways)
    with pytest.raises(DistillError, match="does not pass its mask"):
        attend(None)


def test_attention_of_its_own_is_refused() -> None:
    with (
        pytest.raises(DistillError, match="documents are mixed up; set train.packing=false"),
        attention.documents_of(Documents((0, 3, 9))),
    ):
        pass
    with attention.documents_of(Documents((0, 3, 6), is_rows=True)):
        pass


@pytest.mark.parametrize("argument", ["position_bias", "block_indices"])
def test_unknown_tensors_are_refused(argument: str) -> None:
    mask, q = attention.PackedMask(Documents((0, 3)), attention.Sight()), torch.zeros(1, 1, 3, 8)
    with pytest.raises(DistillError, match=f"Identity passes {argument} to attention, which is not known here"):
        attention.packed_attention(torch.nn.Identity(), q, q, q, mask, **{argument: torch.zeros(1)})
    attention.packed_attention(torch.nn.Identity(), q, q, q, mask, position_ids=torch.arange(3), use_cache=False)


@pytest.mark.parametrize("read", [lambda m: m[0], lambda m: 1 + m, lambda m: m.dtype, lambda m: m + torch.zeros(1)])
def test_masks_are_not_read(read: Callable[[attention.PackedMask], object]) -> None:
    with pytest.raises(DistillError, match="reads the attention mask itself"):
        read(attention.PackedMask(Documents((0, 3)), attention.Sight()))


def test_heads_of_two_sizes_in_one() -> None:
    """As varlen attention takes them: latent attention has values of another size than queries and keys."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 5, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, 2, 5, 7, generator=generator, dtype=torch.float64)
    padded = attention.same_head_size(q, k, v)
    assert [x.shape[-1] for x in padded] == [16] * 3
    out = torch.nn.functional.scaled_dot_product_attention(*padded, is_causal=True, scale=12**-0.5)[..., :7]
    torch.testing.assert_close(out, dense(q, k, v, (0, 5), None))


@pytest.mark.parametrize(
    ("sizes", "sight", "kernel"),
    [
        ((128, 128), attention.Sight(window=8), attention._attend_varlen),
        ((192, 128), attention.Sight(), attention._attend_varlen),
        ((128, 128), attention.Sight(chunk=8), attention._attend_flex),
        ((512, 512), attention.Sight(), attention._attend_by_document),
    ],
)
def test_kernels_on_gpus(sizes: tuple[int, int], sight: attention.Sight, kernel: attention.Kernel) -> None:
    query, value = (SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 2, 3, size)) for size in sizes)
    assert attention.choose_kernel(query, value, attention.Scores(1.0), sight) is kernel


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("size", [1, 2])
def test_flash_attention_on_gpus_is_equal(size: int, window: int | None) -> None:
    generator, documents = torch.Generator().manual_seed(0), Documents((0, 7, 8, 64))
    q = torch.randn(1, 4, 64, 32, generator=generator)
    k, v = (torch.randn(1, 2, 64, 32, generator=generator) for _ in range(2))
    for rank in range(size):  # a context rank's queries are fewer than its keys
        for span in Documents(documents.bounds, rank=rank, size=size).spans:
            rows = Documents(documents.bounds, rank=rank, size=size).take(q, 2)[:, :, span.begin :][
                :, :, : span.query_bounds[-1]
            ]
            parts = rows, *(x[:, :, slice(*span.keys)] for x in (k, v))
            plain, sight = attention.Scores(32**-0.5), attention.Sight(window=window)
            expected = attention._attend_by_document(*parts, span, plain, sight)
            leaves = [x.to("cuda", torch.bfloat16).requires_grad_() for x in parts]
            out = attention._attend_varlen(*leaves, span, plain, sight)
            torch.testing.assert_close(out.float().cpu(), expected, rtol=0.02, atol=0.02)
            out.float().sum().backward()
            assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.gpu
def test_float32_on_gpus_holds_no_scores() -> None:
    length, heads, documents = 2048, 8, Documents((0, 2048))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, length, 64, generator=generator) for h in (heads, 2, 2))
    expected = attend(q, k, v, documents)
    leaves = [x.cuda().requires_grad_() for x in (q, k, v)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend(*leaves, documents)
    out.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < heads * length**2 * 4 / 2
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-4)


def test_bounds_go_to_the_device_once() -> None:
    cpu = torch.device("cpu")
    bounds = attention._on_device((0, 3, 9), cpu)
    assert bounds.tolist() == [0, 3, 9]
    assert bounds.dtype == torch.int32
    assert attention._on_device((0, 3, 9), cpu) is bounds


def test_packed_model_matches_documents_alone() -> None:
    """In float32: transformers computes rotary angles and norms in float32 for any dtype of the weights, and their
    rounding depends on processor and shape. The tests above compare attention alone in float64."""
    attention.register()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, attn_implementation=attention.NAME,
    )  # fmt: skip
    packed = Qwen3ForCausalLM(config).eval()
    plain = copy.deepcopy(packed)  # with a config of its own: a shared one would take our attention away from `packed`
    plain.set_attn_implementation("eager")
    assert packed.config._attn_implementation == attention.NAME
    documents = [torch.randint(0, 50, (n,)) for n in (5, 1, 7)]

    @torch.no_grad()
    def logits_of_row(bounds: tuple[int, ...]) -> torch.Tensor:
        with attention.documents_of(Documents(bounds)):
            return packed(
                input_ids=torch.cat(documents)[None],
                position_ids=torch.cat([torch.arange(len(d)) for d in documents])[None],
                attention_mask=torch.ones(1, bounds[-1], dtype=torch.bool),
                use_cache=False,
            ).logits[0]

    with torch.no_grad():
        alone = torch.cat([plain(input_ids=d[None], use_cache=False).logits[0] for d in documents])
    torch.testing.assert_close(logits_of_row((0, 5, 6, 13)), alone, rtol=1e-4, atol=1e-4)
    # One wrong bound moves a logit by far more than rounding does.
    assert (logits_of_row((0, 5, 13)) - alone).abs().max() > 0.1
