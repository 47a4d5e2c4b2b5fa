"""Packed attention against transformers' own, document by document."""

import copy

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from distill_cli.parallel.context import Documents
from distill_cli.student import attention


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
    out, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, None, documents=documents, sliding_window=window)
    return out.transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("bounds", [(0, 9), (0, 1, 9), (0, 4, 5, 9)])
def test_documents_do_not_see_each_other(bounds: tuple[int, ...], window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 9, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(1, 2, 9, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    out = attend(q, k, v, Documents(bounds), window)
    torch.testing.assert_close(out, dense(q, k, v, bounds, window))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("size", [1, 2])
def test_flash_attention_on_gpus_is_equal(size: int, window: int | None) -> None:
    generator, documents = torch.Generator().manual_seed(0), Documents((0, 7, 8, 64))
    q = torch.randn(1, 4, 64, 32, generator=generator)
    k, v = (torch.randn(1, 2, 64, 32, generator=generator) for _ in range(2))
    for rank in range(size):  # a context rank's queries are fewer than its keys
        for span in Documents(documents.bounds, rank=rank, size=size).spans():
            rows = Documents(documents.bounds, rank=rank, size=size).take(q, 2)[:, :, span.begin :][
                :, :, : span.query_bounds[-1]
            ]
            parts = rows, *(x[:, :, slice(*span.keys)] for x in (k, v))
            expected = attention._attend_by_document(*parts, span, None, window)
            leaves = [x.to("cuda", torch.bfloat16).requires_grad_() for x in parts]
            out = attention._attend_varlen(*leaves, span, None, window)
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
        return packed(
            input_ids=torch.cat(documents)[None],
            position_ids=torch.cat([torch.arange(len(d)) for d in documents])[None],
            documents=Documents(bounds),
            use_cache=False,
        ).logits[0]

    with torch.no_grad():
        alone = torch.cat([plain(input_ids=d[None], use_cache=False).logits[0] for d in documents])
    torch.testing.assert_close(logits_of_row((0, 5, 6, 13)), alone, rtol=1e-4, atol=1e-4)
    # One wrong bound moves a logit by far more than rounding does.
    assert (logits_of_row((0, 5, 13)) - alone).abs().max() > 0.1
