"""A teacher in a second process answers as one in this process does, and ends when either process dies."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
import torch

from distill_cli.engines.companion import CompanionTeacher, needs_companion
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.teacher import VllmTeacher
from distill_cli.errors import ConfigError, DistillError
from tests.conftest import shared_memory_left

from .reference import VOCAB_SIZE, random_sequences

pytestmark = pytest.mark.slow


@pytest.mark.exhaustive
def test_a_companion_answers_until_it_dies(scorer, teacher_settings):
    left_before = shared_memory_left()
    companion = CompanionTeacher(teacher_settings, topk=16)
    sequences, starts = random_sequences([9, 60, 300, 17]), [3, 20, 100, 17]
    for ours, theirs in zip(
        companion.score(sequences, response_starts=starts),
        scorer.score(sequences, response_starts=starts),
        strict=True,
    ):
        for name in ("topk_ids", "topk_logp", "sampled_logp"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-5, rtol=0)
    for ours, theirs in zip(
        companion.score(sequences, response_starts=starts, hidden=True),
        scorer.score(sequences, response_starts=starts, hidden=True),
        strict=True,
    ):
        torch.testing.assert_close(ours.hidden, theirs.hidden, atol=1e-5, rtol=0)
    assert companion.head((3, 20)).weight.equal(scorer.head((3, 20)).weight)
    parts = [slice(0, 2), slice(2, 3), slice(3, 4)]
    waits = [companion.submit(sequences[part], response_starts=starts[part]) for part in parts]
    whole = companion.score(sequences, response_starts=starts)  # asked for last, and read first
    for part, wait in zip(parts[::2], waits[::2], strict=True):  # the second one's are never read
        for ours, theirs in zip(wait(), whole[part], strict=True):
            torch.testing.assert_close(ours.topk_logp, theirs.topk_logp, atol=1e-5, rtol=0)
            assert len(ours.sampled_logp) == len(theirs.sampled_logp)
    request = {"seeds": [1, 2], "sampling": SamplingSettings(max_new_tokens=8)}
    sampled = [engine.sample(sequences[:2], **request) for engine in (companion, scorer)]
    assert [sample.token_ids for sample in sampled[0]] == [sample.token_ids for sample in sampled[1]]
    assert companion.score([], response_starts=[]) == []
    with pytest.raises(DistillError, match="response 0 starts at 0"):
        companion.score(sequences[:1], response_starts=[0])
    many = [companion.submit(sequences * 40, response_starts=starts * 40) for _ in range(20)]  # more than sockets hold
    assert [len(wait()) for wait in many] == [160] * 20

    os.kill(companion._process.pid, signal.SIGKILL)
    with pytest.raises(DistillError, match=rf"the teacher \({teacher_settings.path}\) was killed by SIGKILL"):
        companion.score(sequences, response_starts=starts)
    companion.close()
    companion.close()
    assert not psutil.pid_exists(companion._process.pid)
    assert shared_memory_left() <= left_before


@pytest.mark.exhaustive
def test_loading_fails_alike_in_a_companion(process_group, settings):
    absent = replace(settings, path="/nowhere/at/all")
    message = []
    for make in (VllmTeacher, lambda *args, **kwargs: CompanionTeacher(*args, **kwargs).wait_ready()):
        with pytest.raises(DistillError) as caught:
            make(absent, topk=4)
        message.append((type(caught.value), str(caught.value)))
    assert message[0] == message[1]


def test_a_companion_reports_config_errors(process_group, teacher, teacher_settings):
    companion = CompanionTeacher(teacher_settings, topk=VOCAB_SIZE + 1)
    with pytest.raises(ConfigError, match="topk is 301"):
        companion.wait_ready()
    assert not psutil.pid_exists(companion._process.pid)


RANK = """
from distill_cli.engines.companion import start_process
process, connection = start_process({})
print(process.pid, flush=True)
process.wait()
"""


def test_a_companion_ends_with_its_rank():
    rank = subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True)
    companion = psutil.Process(int(rank.stdout.readline()))
    rank.kill()
    rank.wait()
    rank.stdout.close()
    companion.wait(60)
    assert not companion.is_running()


def test_when_a_companion_is_needed(settings):
    sleeping = replace(settings, sleep_mode=True)
    assert not needs_companion(settings, settings, on_gpu=True)
    assert needs_companion(settings, replace(settings, tensor_parallel=2), on_gpu=False)
    assert needs_companion(sleeping, sleeping, on_gpu=True)
    assert needs_companion(settings, sleeping, on_gpu=True)  # what both read would sleep with it
    assert not needs_companion(sleeping, settings, on_gpu=True)
    assert not needs_companion(sleeping, sleeping, on_gpu=False)
