"""The names inside vLLM that we need: present in this version, and listed if missing."""

from dataclasses import replace

import pytest
import vllm  # noqa: F401

from distill_cli.engines import reach, vllm_patches
from distill_cli.engines.reach import REACHES, Reach
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
