"""One vLLM engine in this process: build it, sample from it, put it to sleep, close it."""

import logging
import os
import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch.distributed as dist

from distill_cli.engines import vllm_patches
from distill_cli.engines.base import AnsweringEngine, OnEnd, Request, Then
from distill_cli.engines.cpu_sampling import SCORE_FROM
from distill_cli.engines.family_settings import format_arguments, read_config, supplied_fields
from distill_cli.engines.process_setup import (
    keep_config_classes,
    keep_process_state,
    on_cpu,
    placeholder_torchvision,
    prepare_process,
)
from distill_cli.engines.settings import ADAPTER_RANKS, CPU_KV_CACHE_BYTES, EngineSettings, SamplingSettings
from distill_cli.engines.vllm_patches import Interrupted
from distill_cli.errors import ConfigError, DistillError
from distill_cli.types import Sample

log = logging.getLogger(__name__)


class VllmEngine(AnsweringEngine):
    """`vllm.LLM` in a process that stays intact; errors state what failed, and leave the engine usable.

    As it is, it answers with the weights of its folder, for evaluations; `VllmSampler` and `VllmTeacher` extend it.
    Every rank builds its engines in the same order, after `init_process_group` (vLLM makes subgroups of it), and
    closes them before `destroy_process_group`.
    """

    sleep_level = 1
    """What sleep does to the weights: 1 keeps them in host memory, 2 drops them."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        role: str = "the engine",
        should_stop: Callable[[], bool] | None = None,
        **kwargs: Any,
    ) -> None:
        """Load the model.

        Args:
            role: its name in messages, as in "the sampler".
            should_stop: called between two tokens; if it returns true, all requests are dropped, and the results are
                empty. An engine that is shared by several ranks does not call it: they would stop at different tokens.
            kwargs: arguments of `vllm.LLM` for this role; `settings.kwargs` override them.
        """
        if not dist.is_initialized():
            raise DistillError(f"{role} needs torch.distributed: call init_process_group before engines are built")
        prepare_process()
        vllm_patches.apply_patches()
        self.role = role
        self.settings = settings
        self.num_ranks = settings.tensor_parallel
        self.asleep = False
        self.frees_memory = settings.sleep_mode and not on_cpu()
        self.lora_request: Any = None
        """`vllm.LoRARequest` of every request: the adapter to answer with."""
        self.llm = load(settings, role=role, **kwargs)
        if settings.vocab_size is not None:
            self.call_worker(vllm_patches.cut_vocabulary, settings.vocab_size)
        self._steps = vllm_patches.WatchedSteps(self.llm, should_stop if settings.tensor_parallel == 1 else None)
        limit = vllm_patches.num_positions(self.llm.model_config)
        if settings.max_model_len > limit:  # vLLM's own check is off, see `prepare_process`
            has = f"{settings.path} has {limit} positions"
            self.refuse(f"max_model_len of {role} is {settings.max_model_len}: {has}, lower it")

    def refuse(self, problem: str) -> NoReturn:
        """Close the engine and raise ConfigError."""
        self.close()
        raise ConfigError(problem)

    @property
    def vocab_size(self) -> int:
        """Number of ids that are sampled and scored."""
        return min(self.llm.model_config.get_vocab_size(), self.settings.vocab_size or sys.maxsize)

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        seeds: Sequence[int],
        sampling: SamplingSettings,
        on_end: OnEnd | None = None,
    ) -> list[Sample]:
        """Return one answer to each prompt, in their order.

        Args:
            prompts: token ids; shorter than `settings.max_model_len`.
            seeds: one a prompt, any integers. Prompt, seed and weights determine the answer; prompts that share a seed
                get correlated answers.
            on_end: called with an answer's index and the answer between two tokens of the others.

        Returns:
            Samples whose `logp` is raw: at temperature 1 over the whole vocabulary, whatever `sampling` contains, and
            None without `sampling.logp`. If the engine was interrupted, they have no tokens.

        Raises:
            DistillError: a bad request, or a failure in the engine, which stays usable.
        """
        requests = [Request(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        params = self._params_of(requests, sampling)

        def ended(index: int, output: Any) -> None:
            assert on_end is not None
            on_end(index, to_sample(output, logp=sampling.logp))

        try:
            outputs = self.generate(prompts, params, on_end=None if on_end is None else ended)
            return [to_sample(output, logp=sampling.logp) for output in outputs]
        except Interrupted:
            return [Sample([], [] if sampling.logp else None, "length") for _ in prompts]

    def sample_chains(self, requests: Sequence[Request], *, sampling: SamplingSettings, then: Then) -> None:
        """Answer requests; the next request of a chain begins between two tokens of the others.

        Raises:
            DistillError: see `sample`.
        """
        chains = list(range(len(requests)))  # of each request, in the order in which the engine gets them

        def ended(number: int, output: Any) -> None:
            chain = chains[number]
            if (request := then(chain, to_sample(output, logp=sampling.logp))) is not None:
                chains.append(chain)
                self.enqueue([request.token_ids], self._params_of([request], sampling))

        try:
            params = self._params_of(requests, sampling)
            self.generate([request.token_ids for request in requests], params, on_end=ended)
        except Interrupted:
            return

    def _params_of(self, requests: Sequence[Request], sampling: SamplingSettings) -> list[Any]:
        """Return the `vllm.SamplingParams` of requests. Raises DistillError for a bad request."""
        if sampling.stop and self.llm.model_config.skip_tokenizer_init:  # vLLM would ignore them
            raise DistillError(f"{self.role} has no tokenizer (skip_tokenizer_init): it cannot stop at strings")
        max_len = self.settings.max_model_len
        self.check_token_ids([request.token_ids for request in requests], max_len=max_len - 1)
        limits = [sampling.max_new_tokens if one.max_new_tokens is None else one.max_new_tokens for one in requests]
        return [
            sampling_params(sampling, seed=request.seed, max_tokens=min(limit, max_len - len(request.token_ids)))
            for request, limit in zip(requests, limits, strict=True)
        ]

    def enqueue(self, prompts: Sequence[list[int]], params: Sequence[Any]) -> None:
        """Add requests to those that `generate` is running, between two of their tokens."""
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        self.llm.enqueue(inputs, list(params), use_tqdm=False, lora_request=self.lora_request)

    def generate(
        self, prompts: Sequence[list[int]], params: Sequence[Any], *, on_end: Callable[[int, Any], None] | None = None
    ) -> list[Any]:
        """Run requests until they end; return one `vllm.RequestOutput` for each prompt, in their order.

        Args:
            on_end: called with the index of a request that has ended, and its output.

        Raises DistillError if vLLM refuses a request or fails in a step, and `Interrupted`; the engine stays usable.
        """
        self.check_awake()
        if not prompts:
            return []
        self._steps.watch(on_end)
        try:
            inputs = [{"prompt_token_ids": ids} for ids in prompts]
            return self.llm.generate(inputs, list(params), use_tqdm=False, lora_request=self.lora_request)
        except BaseException as error:
            vllm_patches.abort_requests(self.llm)
            if isinstance(error, Exception) and not isinstance(error, DistillError):
                raise DistillError(f"{self.role} failed ({self.settings.path}): {reason(error)}") from error
            raise

    def check_token_ids(self, sequences: Sequence[list[int]], *, max_len: int, vocab_size: int | None = None) -> None:
        """Refuse what would fail inside a step: an empty or too long sequence, an id outside the vocabulary."""
        size = self.vocab_size if vocab_size is None else vocab_size
        for index, ids in enumerate(sequences):
            if not 1 <= len(ids) <= max_len:
                raise DistillError(f"{self.role}: sequence {index} has {len(ids)} tokens, allowed are 1 to {max_len}")
            if min(ids) < 0 or max(ids) >= size:
                raise DistillError(f"{self.role}: sequence {index} has token ids outside 0 to {size - 1}")

    def check_awake(self) -> None:
        """Raise DistillError if the engine is asleep: vLLM would wait forever."""
        if self.asleep:
            raise DistillError(f"{self.role} is asleep: wake() comes before its next use")

    def call_worker(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(worker, *args)`, called in this process, so that arguments may be live objects."""
        self.check_awake()
        return self.llm.collective_rpc(function, args=args)[0]

    def sleep(self) -> None:
        """Give the device's memory back; does nothing without `settings.sleep_mode`, and frees nothing on a CPU."""
        if self.frees_memory and not self.asleep:
            self.llm.sleep(level=self.sleep_level)
        self.asleep = self.settings.sleep_mode

    def wake(self) -> None:
        """Take the memory again; does nothing if the engine is awake."""
        try:
            if self.frees_memory and self.asleep:
                self.llm.wake_up()
        except Exception as error:
            what = f"{self.role} could not take its memory again ({self.settings.path}): {reason(error)}"
            fix = "lower gpu_memory_utilization of this engine, or set train.offload_optimizer=true"
            raise DistillError(f"{what}; if the GPU is full, {fix}") from error
        self.asleep = False

    def close(self) -> None:
        """Free the engine; closing again does nothing."""
        if self.llm is None:
            return
        try:
            # Freeing memory that sleep has unmapped leaves an error in vLLM's allocator (`my_free` in its
            # csrc/cumem_allocator.cpp): the next engine of the process that may sleep would get no memory.
            self.wake()
        except DistillError as error:  # the GPU may be full; the engine is closed nevertheless
            log.warning("%s was closed asleep: %s", self.role, error)
        llm, self.llm = self.llm, None
        vllm_patches.shut_down(llm)
        del llm  # no reference may remain to what must be freed
        vllm_patches.release_memory()


def load(settings: EngineSettings, *, role: str, **kwargs: Any) -> Any:
    """Return a `vllm.LLM`. Raises DistillError naming the model and vLLM's reason."""
    from vllm import LLM

    if os.path.isabs(settings.path) and not os.path.isdir(settings.path):
        # vLLM would look for it on the hub, and report a wrong name.
        raise DistillError(f"{role} could not load {settings.path}: there is no such folder")
    same = ("dtype", "quantization", "trust_remote_code", "max_model_len", "gpu_memory_utilization", "seed")
    implied = {name: getattr(settings, name) for name in same} | {
        "kv_cache_memory_bytes": settings.kv_cache_bytes or (CPU_KV_CACHE_BYTES if on_cpu() else None),
        "enforce_eager": on_cpu() if settings.enforce_eager is None else settings.enforce_eager,
        "enable_sleep_mode": settings.sleep_mode and not on_cpu(),
        # A prompt that is prefilled in pieces draws a token at each and takes the draw back, which torch's generators
        # on a CPU cannot: requests with a seed would fail.
        "enable_chunked_prefill": False if on_cpu() else None,
        "tensor_parallel_size": settings.tensor_parallel,
        # It takes the device of LOCAL_RANK, where the default would put every rank's engine on device 0, and cuts a
        # model over the existing ranks, where the others start processes of their own.
        "distributed_executor_backend": "external_launcher" if "LOCAL_RANK" in os.environ else "uni",
        "language_model_only": True,  # else a multimodal model needs its processor, and torchvision
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if settings.adapter:
        room = next(rank for rank in ADAPTER_RANKS if rank >= settings.adapter.rank)
        implied |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
    arguments = {**implied, **format_arguments(settings.path), **kwargs, **settings.kwargs}
    if isinstance(overrides := arguments.get("hf_overrides", {}), dict):
        arguments["hf_overrides"] = supplied_fields(read_config(settings.path)) | overrides
    try:
        with keep_process_state(), keep_config_classes(), placeholder_torchvision():
            if settings.kv_cache_bytes:
                os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override the setting
            return LLM(settings.path, **arguments)
    except Exception as error:
        raise DistillError(f"{role} could not load {settings.path}: {reason(error)}") from error


def sampling_params(sampling: SamplingSettings, *, seed: int, max_tokens: int) -> Any:
    """Return the `vllm.SamplingParams` of one request."""
    same = ("temperature", "top_p", "top_k", "ignore_eos")
    return request_params(
        **{name: getattr(sampling, name) for name in same},
        max_tokens=max_tokens,
        seed=fold_seed(seed),
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        logprobs=0 if sampling.logp else None,  # of the sampled token alone
        detokenize=bool(sampling.stop),
        skip_clone=True,  # each request has its own
    )


def request_params(*, score_from: int | None = None, marks: Mapping[str, Any] | None = None, **fields: Any) -> Any:
    """Return the `vllm.SamplingParams` of a request whose log-probabilities stay tensors.

    Args:
        score_from: first token of the prompt whose log-probabilities are read.
        marks: more of the request's `extra_args`.
    """
    from vllm import SamplingParams

    known = vllm_patches.KEEP_TENSORS | ({} if score_from is None else {SCORE_FROM: score_from})
    try:
        return SamplingParams(extra_args={**known, **(marks or {})}, **fields)
    except Exception as error:  # vLLM's validation errors have no common base in the supported versions
        raise DistillError(f"vLLM refuses the sampling settings: {reason(error)}") from error


def fold_seed(seed: int) -> int:
    """Hash a seed to 32 bits: torch's CPU generator drops the higher ones, and 0 and 2**32 would sample the same."""
    return zlib.crc32(str(seed).encode())


def to_sample(output: Any, *, logp: bool) -> Sample:
    """Return the answer of a `vllm.RequestOutput`."""
    completion = output.outputs[0]
    if completion.finish_reason not in ("stop", "length"):
        raise DistillError(f"vLLM ended a response with {completion.finish_reason!r}")
    return Sample(list(completion.token_ids), list(completion.logprobs) if logp else None, completion.finish_reason)


def reason(error: BaseException, *, max_length: int = 400) -> str:
    """Return an exception in one line, without the frame that pydantic puts around a message."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\d+ validation errors? for \w+ (Value error, )?", "", text).split(" [type=")[0]
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= max_length else text[: max_length - 3] + "..."
