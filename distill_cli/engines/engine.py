"""One vLLM engine in this process: built, run, put to sleep, closed. `VllmSampler` and `VllmTeacher` each have one."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distill_cli.engines import vllm_patches
from distill_cli.engines.process_setup import is_prepared, keep_process_state, prepare_process
from distill_cli.engines.settings import ADAPTER_RANKS, CPU_KV_CACHE_BYTES, EngineSettings, tensor_parallel_problem
from distill_cli.errors import ConfigError, DistillError
from distill_cli.models.model_files import read_config

log = logging.getLogger(__name__)


class Interrupted(BaseException):
    """The engine was asked to stop in the middle of its requests, which are gone."""


class Engine:
    """`vllm.LLM` with the process kept intact, and with errors that say what failed and leave it usable.

    Every rank builds its engines in the same order, after `init_process_group` (vLLM makes subgroups of it), and
    closes them before `destroy_process_group`.
    """

    def __init__(
        self, settings: EngineSettings, *, role: str, should_stop: Callable[[], bool] | None = None, **kwargs: Any
    ) -> None:
        """Load the model.

        Args:
            role: who it is in messages, as in "the sampler".
            should_stop: asked between two tokens; `generate` raises `Interrupted` when it says so. An engine that is
                shared by several ranks does not ask: they would not leave it at the same token.
            kwargs: what the role needs of `vllm.LLM`; `settings.kwargs` goes over it.
        """
        check_settings(settings, role=role)
        if not is_prepared():
            prepare_process()
        vllm_patches.apply_patches()
        self.role = role
        self.settings = settings
        self.asleep = False
        self.lora_request: Any = None
        """`vllm.LoRARequest` of every request: with the adapter that it names."""
        self.llm = load(settings, role=role, **kwargs)
        if settings.vocab_size is not None:
            self.call_worker(vllm_patches.cut_vocabulary, settings.vocab_size)
        if should_stop is not None and settings.tensor_parallel == 1:
            vllm_patches.call_between_tokens(self.llm, partial(check_stop, should_stop))
        try:
            check_length(settings, model_config=self.llm.model_config, role=role)
        except ConfigError:
            self.close()
            raise

    @property
    def vocab_size(self) -> int:
        """Ids that are sampled and scored."""
        return min(self.llm.model_config.get_vocab_size(), self.settings.vocab_size or sys.maxsize)

    @property
    def on_cpu(self) -> bool:
        from vllm.platforms import current_platform

        return current_platform.is_cpu()

    def generate(self, prompts: Sequence[list[int]], params: Sequence[Any]) -> list[Any]:
        """Run requests to their ends; one `vllm.RequestOutput` for each prompt, in their order.

        Raises DistillError where vLLM refuses a request or fails in a step, and `Interrupted`; the engine stays usable.
        """
        self.check_awake()
        if not prompts:
            return []
        try:
            inputs = [{"prompt_token_ids": ids} for ids in prompts]
            return self.llm.generate(inputs, list(params), use_tqdm=False, lora_request=self.lora_request)
        except BaseException as error:
            vllm_patches.abort_requests(self.llm)
            if isinstance(error, Exception):
                raise DistillError(f"{self.role} failed ({self.settings.path}): {reason(error)}") from error
            raise

    def check_token_ids(self, sequences: Sequence[list[int]], *, max_len: int) -> None:
        """Refuse what would fail inside a step: an empty or too long sequence, an id outside the vocabulary."""
        for index, ids in enumerate(sequences):
            if not 1 <= len(ids) <= max_len:
                raise DistillError(f"{self.role}: sequence {index} has {len(ids)} tokens, allowed are 1 to {max_len}")
            if min(ids) < 0 or max(ids) >= self.vocab_size:
                raise DistillError(f"{self.role}: sequence {index} has token ids outside 0 to {self.vocab_size - 1}")

    def check_awake(self) -> None:
        if self.asleep:  # vLLM would wait for ever
            raise DistillError(f"{self.role} is asleep: wake() comes before its next use")

    def call_worker(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(worker, *args)` where the model is: in this process, so arguments may be live objects."""
        self.check_awake()
        return self.llm.collective_rpc(function, args=args)[0]

    def sleep(self, *, level: int) -> None:
        """Give the device's memory back; level 1 keeps the weights in host memory, 2 drops them.

        Does nothing without `settings.sleep_mode`, and frees nothing on a CPU.
        """
        if not self.settings.sleep_mode or self.asleep:
            return
        if not self.on_cpu:
            self.llm.sleep(level=level)
        self.asleep = True

    def wake(self) -> None:
        """Take the memory again; without effect on an engine that is awake."""
        if not self.asleep:
            return
        if not self.on_cpu:
            try:
                self.llm.wake_up()
            except Exception as error:
                raise DistillError(
                    f"{self.role} could not take its memory again ({self.settings.path}): {reason(error)}; if the GPU "
                    "is full, lower gpu_memory_utilization of this engine, or set train.offload_optimizer=true"
                ) from error
        self.asleep = False

    def close(self) -> None:
        """Free the engine; closing again does nothing."""
        if self.llm is not None:
            if self.asleep and not self.on_cpu:
                try:
                    vllm_patches.wake_before_closing(self.llm)
                except Exception as error:  # the GPU may be full; it is closed all the same
                    log.warning("%s was closed asleep, since it could not wake: %s", self.role, reason(error))
            llm, self.llm = self.llm, None
            vllm_patches.shut_down(llm)
            del llm  # nothing may refer to what is to be freed
            vllm_patches.release_memory()


def check_stop(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Interrupted


def check_settings(settings: EngineSettings, *, role: str) -> None:
    """Raise what can be known before anything is loaded."""
    if not dist.is_initialized():
        raise DistillError(f"{role} needs torch.distributed: call init_process_group before engines are built")
    config = Path(settings.path, "config.json")
    model = read_config(config.parent) if config.is_file() else {}
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    problem = tensor_parallel_problem(settings.tensor_parallel, model=model, num_ranks=num_ranks)
    if problem:
        raise ConfigError(f"tensor_parallel of {role} is {settings.tensor_parallel}: {problem}")


def check_length(settings: EngineSettings, *, model_config: Any, role: str) -> None:
    """Refuse sequences longer than the model's positions: vLLM's own check is off, see `prepare_process`."""
    limit = vllm_patches.num_positions(model_config)
    if settings.max_model_len > limit:
        raise ConfigError(
            f"max_model_len of {role} is {settings.max_model_len}: {settings.path} has {limit} positions, lower it"
        )


def load(settings: EngineSettings, *, role: str, **kwargs: Any) -> Any:
    """-> `vllm.LLM`; raises DistillError naming the model and vLLM's reason."""
    from vllm import LLM
    from vllm.platforms import current_platform

    if os.path.isabs(settings.path) and not os.path.isdir(settings.path):
        # vLLM would ask the hub for it, and complain of a wrong name.
        raise DistillError(f"{role} could not load {settings.path}: there is no such folder")
    on_cpu = current_platform.is_cpu()
    implied = {
        "revision": settings.revision,
        "tokenizer_revision": settings.revision,
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "trust_remote_code": settings.trust_remote_code,
        "max_model_len": settings.max_model_len,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "kv_cache_memory_bytes": settings.kv_cache_bytes or (CPU_KV_CACHE_BYTES if on_cpu else None),
        "enforce_eager": on_cpu if settings.enforce_eager is None else settings.enforce_eager,
        "enable_sleep_mode": settings.sleep_mode and not on_cpu,
        # A prompt that is prefilled in pieces draws a token at each and takes the draw back, which torch's generators
        # on a CPU cannot: requests with a seed would fail.
        "enable_chunked_prefill": False if on_cpu else None,
        "tensor_parallel_size": settings.tensor_parallel,
        # It takes the device of LOCAL_RANK, where the default would put every rank's engine on device 0, and cuts a
        # model over the ranks that are there, where the others start processes of their own.
        "distributed_executor_backend": "external_launcher" if "LOCAL_RANK" in os.environ else "uni",
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": settings.seed,
    }
    if settings.adapter:
        room = next(rank for rank in ADAPTER_RANKS if rank >= settings.adapter.rank)
        implied |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
    try:
        with keep_process_state():
            if settings.kv_cache_bytes:
                os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over the setting
            return LLM(settings.path, **{**implied, **kwargs, **settings.kwargs})
    except Exception as error:
        raise DistillError(f"{role} could not load {settings.path}: {reason(error)}") from error


def request_params(**fields: Any) -> Any:
    """-> `vllm.SamplingParams` of a request whose log-probabilities stay tensors."""
    from vllm import SamplingParams

    try:
        return SamplingParams(extra_args=dict(vllm_patches.KEEP_TENSORS), **fields)
    except Exception as error:  # vLLM's errors of validation have no common base in the versions that we allow
        raise DistillError(f"vLLM refuses the sampling settings: {reason(error)}") from error


def reason(error: BaseException, *, max_length: int = 400) -> str:
    """An exception in one line, without the frame that pydantic puts around a message."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\d+ validation errors? for \w+ (Value error, )?", "", text).split(" [type=")[0]
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= max_length else text[: max_length - 3] + "..."
