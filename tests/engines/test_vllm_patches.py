"""The names inside vLLM that we need: present in this version, and listed if missing."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import vllm  # noqa: F401

from distill_cli.engines import cpu_sampling, model_patches, reach, vllm_patches
from distill_cli.engines.reach import REACHES, Reach
from distill_cli.engines.vllm_patches import apply_patches
from distill_cli.errors import DistillError


@pytest.mark.parametrize("platform", ["cpu", "adapter"])
def test_this_vllm_has_all_names(platform: str) -> None:
    reach.check_names(platform=platform)


def test_missing_names_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = (
        Reach("vllm.v1.engine.core", ("no_such_name",), "keep_process_group"),
        Reach("vllm.no_such_module", ("old_name", "new_name"), "load_weights"),
        replace(next(known for known in REACHES if known.used_by == "abort_requests"), parameter="no_such_argument"),
        Reach("vllm.elsewhere", ("gone",), "pooled_bytes", only="cuda"),
        Reach("vllm.newer", ("gone",), "route_in_one_group", replacement=str, optional=True),
    )
    monkeypatch.setattr(reach, "REACHES", (*REACHES, *lost))
    with pytest.raises(DistillError) as raised:
        reach.check_names(platform="cpu")
    named = str(raised.value)
    for part in (
        "vllm.v1.engine.core.no_such_name (keep_process_group)",
        "vllm.no_such_module.old_name or vllm.no_such_module.new_name (load_weights)",
        "argument no_such_argument of vllm.v1.engine.llm_engine.LLMEngine.abort_request (abort_requests)",
    ):
        assert part in named
    assert "vllm.elsewhere" not in named  # needed on GPUs alone
    assert "vllm.newer" not in named


def test_missing_optional_name_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Reach("vllm.newer", ("gone",), "route_in_one_group", replacement=str, optional=True)
    monkeypatch.setattr(reach, "REACHES", (known,))
    reach.replace_names(platform="cpu")


def test_a_name_may_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """`CuMemAllocator.instance` is None until the first engine with sleep mode."""
    import vllm.v1.engine.core as module

    monkeypatch.setattr(module, "nothing_yet", None, raising=False)
    monkeypatch.setattr(reach, "REACHES", (Reach("vllm.v1.engine.core", ("nothing_yet",), "pooled_bytes"),))
    reach.check_names(platform="cuda")


@pytest.mark.parametrize("spelling", ["get_rename_mapper", "get_unstacked_mapper"])
def test_either_spelling_of_the_rename_mapper(spelling: str) -> None:
    mapper = type("Mapper", (), {spelling: lambda self: "renaming alone"})()
    assert vllm_patches.rename_mapper(mapper) == "renaming alone"
    assert vllm_patches.rename_mapper(None) is None


def test_numbers_drawn_ahead_are_the_requests_own() -> None:
    """While requests come, go and change places."""
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    apply_patches()

    def vllms_own(_self: object, logits: torch.Tensor, generators: dict, *_limits: object) -> tuple:
        seeds = [torch.randint(0, 2**31, (1,), generator=generators[place]).item() for place in range(len(logits))]
        return torch.ops._C.fused_gumbel_argmax(logits, torch.tensor(seeds)), None

    sampler = SimpleNamespace(logprobs_mode="raw_logprobs", use_fp64_gumbel=False)
    sides = [
        (partial(cpu_sampling.draw_ahead(vllms_own), sampler), [torch.Generator() for _ in range(8)]),
        (partial(vllms_own, sampler), [torch.Generator() for _ in range(8)]),
    ]
    for _, generators in sides:
        for seed, generator in enumerate(generators):
            generator.manual_seed(seed)
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    for step in range(200):
        alive = [place for place in range(8) if (step + place) % 9 != 7][: 8 - step // 40]
        alive = alive[::-1] if step % 3 else alive
        first, second = (
            sample(logits[: len(alive)], {place: generators[one] for place, one in enumerate(alive)}, None, None)[0]
            for sample, generators in sides
        )
        assert first.equal(second), step
    assert TopKTopPSampler.forward_cpu.__name__ == "sample_with_drawn"


def test_requests_without_a_seed_are_left_to_vllm() -> None:
    sampler = SimpleNamespace(logprobs_mode="raw_logprobs", use_fp64_gumbel=False)
    sample = cpu_sampling.draw_ahead(lambda *arguments: "vLLM's")
    assert sample(sampler, torch.zeros(2, 5), {0: torch.Generator()}, None, None) == "vLLM's"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_in_one_call_are_equal(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.layernorm import RMSNorm

    apply_patches()
    norm, calls = RMSNorm.__new__(RMSNorm), []
    torch.nn.Module.__init__(norm)
    generator = torch.Generator().manual_seed(0)
    norm.weight = torch.nn.Parameter(torch.randn(32, generator=generator, dtype=dtype), requires_grad=False)
    norm.variance_epsilon, norm.variance_size_override = 1e-6, None
    norm.has_weight = norm.pass_weight = norm.pass_weight_add = True

    def native(_self: object, x: torch.Tensor, residual: torch.Tensor | None = None) -> object:
        calls.append(1)
        total = x.float() if residual is None else x.float() + residual.float()
        out = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * norm.weight
        return out.to(dtype) if residual is None else (out.to(dtype), total.to(dtype))

    forward = model_patches.normalize_in_one_call(native)
    x, residual = (torch.randn(6, 4, 32, generator=generator, dtype=dtype) for _ in range(2))
    heads = x.transpose(0, 1)  # not contiguous, as queries and keys are
    for inputs in ((x,), (heads,), (x, residual), (heads, residual.transpose(0, 1))):
        expected, calls_before = native(norm, *inputs), len(calls)
        found = forward(norm, *(one.clone(memory_format=torch.preserve_format) for one in inputs))
        torch.testing.assert_close(found, expected)
        in_one_call = dtype == torch.float32 and (len(inputs) == 1 or inputs[0].is_contiguous())
        assert len(calls) == calls_before + (not in_one_call)
    assert RMSNorm.forward_native.__name__ == "forward"
