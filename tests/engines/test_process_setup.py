import importlib
import os
import sys

import pytest
import torch
import torch.distributed as dist

from distill_cli.engines.process_setup import hide_broken_packages, keep_process_state
from distill_cli.engines.teacher import VllmTeacher

from .reference import random_sequences

pytestmark = pytest.mark.slow


def test_process_state_is_kept(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("NUMEXPR_MAX_THREADS", raising=False)
    set_num_threads, num_threads, random_state = torch.set_num_threads, torch.get_num_threads(), torch.get_rng_state()
    with keep_process_state():
        os.environ.update(LOCAL_WORLD_SIZE="1", NUMEXPR_MAX_THREADS="9")
        torch.set_num_threads(num_threads + 1)
        torch.set_num_threads = print
        torch.manual_seed(1234)
    assert os.environ["LOCAL_WORLD_SIZE"] == "4"
    assert "NUMEXPR_MAX_THREADS" not in os.environ
    assert torch.set_num_threads is set_num_threads
    assert torch.get_num_threads() == num_threads
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_engine_leaves_the_process_intact(scorer, teacher_settings, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    random_state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    other = VllmTeacher(teacher_settings, topk=4)
    assert os.environ["LOCAL_WORLD_SIZE"] == "3"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == num_threads
    other.close()
    other.close()
    assert dist.is_initialized()
    dist.all_reduce(torch.ones(1))
    (scores,) = scorer.score(random_sequences([9]), response_starts=[3])
    assert scores.topk_ids.shape == (6, 16)


def test_a_broken_package_looks_absent(tmp_path, monkeypatch):
    (tmp_path / "brokenpackage").mkdir()
    (tmp_path / "brokenpackage" / "__init__.py").write_text(
        "from . import part\nraise RuntimeError('operator brokenpackage::nms does not exist')"
    )
    (tmp_path / "brokenpackage" / "part.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        hide_broken_packages(("brokenpackage", "json", "notinstalled"))
        assert importlib.util.find_spec("brokenpackage") is None
        assert importlib.util.find_spec("json") is not None
        assert "notinstalled" not in sys.modules
        assert "brokenpackage.part" not in sys.modules
        with pytest.raises(ImportError):
            importlib.import_module("brokenpackage")
    finally:
        sys.modules.pop("brokenpackage", None)
