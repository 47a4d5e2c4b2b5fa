"""Two tiny random models and an engine of each, shared by all tests here: an engine takes seconds to start."""

import copy
from contextlib import contextmanager
from dataclasses import replace

from distill_cli.engines.process_setup import prepare_process

prepare_process()  # before torch

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from distill_cli.engines.sampler import VllmSampler  # noqa: E402
from distill_cli.engines.settings import EngineSettings  # noqa: E402
from distill_cli.engines.teacher import VllmTeacher  # noqa: E402

from .reference import MAX_LEN, make_model  # noqa: E402


@pytest.fixture(scope="package")
def process_group(tmp_path_factory):
    with group_of_one(tmp_path_factory.mktemp("store")):
        yield


@contextmanager
def group_of_one(folder):
    """The process group that engines of this process need."""
    from vllm.distributed import parallel_state

    store = dist.FileStore(str(folder / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models as small as these only wait for a second thread
    yield
    torch.set_num_threads(num_threads)
    parallel_state.destroy_model_parallel()  # else vLLM's groups would outlive ours, and other files' engines find them
    parallel_state.destroy_distributed_environment()
    assert not dist.is_initialized()


@pytest.fixture(scope="package")
def settings(tmp_path_factory):
    """Settings of an engine without its model."""
    return EngineSettings(
        path="", max_model_len=MAX_LEN, dtype="float32", kv_cache_bytes=32 << 20, kwargs={"skip_tokenizer_init": True}
    )


@pytest.fixture(scope="package")
def student_settings(tmp_path_factory, settings):
    return replace(settings, path=str(tmp_path_factory.mktemp("student")))


@pytest.fixture(scope="package")
def teacher_settings(tmp_path_factory, settings):
    return replace(settings, path=str(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="package")
def student(student_settings):
    return make_model(student_settings.path, hidden_size=128, seed=1)


@pytest.fixture(scope="package")
def teacher(teacher_settings):
    return make_model(teacher_settings.path, hidden_size=96, seed=2)


@pytest.fixture(scope="package")
def sampler(process_group, student, student_settings):
    sampler = VllmSampler(student_settings)
    yield sampler
    sampler.close()


@pytest.fixture(scope="package")
def scorer(process_group, teacher, teacher_settings):
    scorer = VllmTeacher(teacher_settings, topk=16)
    yield scorer
    scorer.close()


@pytest.fixture
def changed_student(student, sampler):
    """The student after a step of training; the sampler has its first weights again afterwards."""
    changed = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(3)
    for parameter in changed.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    yield changed
    sampler.sync(student.named_parameters(), version=0)
