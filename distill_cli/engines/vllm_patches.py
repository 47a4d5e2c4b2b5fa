"""Everything inside vLLM that we replace, call or read beyond its documented interface: one function each.

vLLM expects a process to itself, and takes no tensors that are already in memory. Each function below names the symptom
without it and the sign that it is no longer needed; the decorator above it declares the names that it depends on, which
`apply_patches` looks up when the first engine is built: one error lists all that are missing. A function that is
declared with `replaced` returns the replacement of a name, given the original.
`scripts/check_vllm_versions.py` searches unpacked releases for the same names without importing anything. What is
replaced in vLLM's model code is in `model_patches`, `cpu_gdn` and `cpu_mamba`; in its sampling on CPUs, in
`cpu_sampling`; for hidden states in `hidden_states`.

Importing this module imports neither vLLM nor torch.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from distill_cli.engines import (  # noqa: F401, they declare their names
    cpu_gdn,
    cpu_mamba,
    cpu_sampling,
    hidden_states,
    model_patches,
)
from distill_cli.engines.process_setup import import_without_scipy, on_cpu
from distill_cli.engines.reach import check_names, reaches, replace_names

if TYPE_CHECKING:
    import torch

KEEP_TENSORS = {"distill_keep_tensors": True}
"""`SamplingParams.extra_args` of a request whose log-probabilities stay tensors."""

QUEUES = "vllm.distributed.device_communicators.shm_broadcast"
CPU_COMMUNICATOR = "vllm.distributed.device_communicators.cpu_communicator"
MODEL_UTILS = "vllm.model_executor.models.utils"
CUMEM = "vllm.device_allocator.cumem"
PARALLEL_STATE = "vllm.distributed.parallel_state"

ADAPTER_ID = 1
"""The sampler has one adapter, which each sync replaces."""


@cache
def apply_patches() -> None:
    """Check every name that this platform needs, then replace what must be replaced; once a process.

    Raises:
        DistillError: names are missing; nothing is replaced then.
    """
    import_without_scipy("vllm.entrypoints.llm")  # vLLM needs it for audio alone
    platform = "cpu" if on_cpu() else "cuda"
    check_names(platform=platform)
    replace_names(platform=platform)


# what is replaced


@reaches("vllm.v1.engine.output_processor", "LogprobsProcessor", replaced=True)
@reaches("vllm.v1.engine.logprobs", "LogprobsProcessor.from_new_request")
@reaches("vllm.v1.engine.logprobs", "LogprobsProcessor._update_prompt_logprobs")
@reaches("vllm.v1.engine.logprobs", "LogprobsProcessor._update_sample_logprobs")
def keep_logprobs_as_tensors(processor_class: Any) -> Any:
    """Keep the log-probabilities of requests marked with `KEEP_TENSORS` as the worker's tensors.

    Symptom: vLLM's front end makes a Python object of every candidate of every token, and decodes each to text, which
    costs several times the forward pass (`scripts/bench_score.py`).
    No longer needed when: `prompt_logprobs` can be had as tensors; `flat_logprobs` with `detokenize=False` is a first
    step, still 13% of Python objects.
    """

    class TensorLogprobsProcessor(processor_class):
        """vLLM's collector of one request's log-probabilities, with a short path for marked requests.

        The output of a marked request has `prompt_logprobs`, a list of vLLM's tensor tuples (one per chunk of the
        prompt), and `outputs[0].logprobs`, a list of floats.
        """

        keeps_tensors = False

        @classmethod
        def from_new_request(cls, tokenizer: Any, request: Any) -> TensorLogprobsProcessor:
            processor = super().from_new_request(tokenizer, request)
            if KEEP_TENSORS.items() <= (request.sampling_params.extra_args or {}).items():
                processor.keeps_tensors, processor.prompt_logprobs, processor.logprobs = True, [], []
            return processor

        def _update_prompt_logprobs(self, prompt_logprobs_tensors: Any) -> None:
            if self.keeps_tensors:
                self.prompt_logprobs.append(prompt_logprobs_tensors)
            else:
                super()._update_prompt_logprobs(prompt_logprobs_tensors)

        def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
            if self.keeps_tensors:
                _ids, logp, *_ = logprobs_lists
                if len(logp) == 1:  # the sampled token comes first
                    self.logprobs.append(logp.item(0))
                else:
                    self.logprobs.extend(logp[:, 0].tolist())
            else:
                super()._update_sample_logprobs(logprobs_lists)

    return TensorLogprobsProcessor


@reaches("vllm.v1.engine.core", "cleanup_dist_env_and_memory", replaced=True)
def keep_process_group(_cleanup: Any) -> Any:
    """Leave the default process group alone when an engine is shut down.

    Symptom: closing one engine destroys the trainer's process group and every other engine of the process.
    No longer needed when: `EngineCore.shutdown` of an in-process engine leaves groups that it did not make.
    """
    return release_memory


@reaches(PARALLEL_STATE, "initialize_model_parallel", replaced=True)
@reaches(PARALLEL_STATE, "init_model_parallel_group")
@reaches(PARALLEL_STATE, "_EP")
def always_group_experts(initialize: Any) -> Any:
    """Make the group that models with experts need, whatever the first engine's model is.

    Symptom: with a dense student, a teacher with experts fails: `expert parallel group is not initialized`.
    No longer needed when: a second engine of the process makes the groups that the first did not need.
    """

    def initialize_all(*args: Any, **kwargs: Any) -> None:
        import torch.distributed as dist
        from vllm.distributed import parallel_state

        initialize(*args, **kwargs)
        if parallel_state._EP is None:  # else the ranks of an engine, too, as vLLM makes it
            world, size = parallel_state.get_world_group(), parallel_state.get_tp_group().world_size
            ranks = [list(range(first, first + size)) for first in range(0, world.world_size, size)]
            backend = dist.get_backend(world.device_group)
            parallel_state._EP = parallel_state.init_model_parallel_group(
                ranks, world.local_rank, backend, group_name="ep"
            )

    return initialize_all


@reaches(QUEUES, "MessageQueue.create_from_process_group", replaced=True)
def broadcast_without_queue(_create: Any) -> Any:
    """Make no message queue in shared memory for a group of ranks; vLLM broadcasts through the process group then.

    Symptom: shared memory and a socket for objects that no engine here broadcasts; a killed rank leaves both behind.
    No longer needed when: `external_launcher` engines create no `MessageQueue`.
    """
    return staticmethod(lambda *_args, **_kwargs: None)


@reaches(CPU_COMMUNICATOR, "CpuCommunicator._all_group_ranks_share_shm_group_name", only="cpu", replaced=True)
def avoid_shared_memory(_share_name: Any) -> Any:
    """Let ranks that share an engine on CPUs meet over gloo instead of named shared memory. CPU only.

    Symptom: the name is the same in every run: a second run on the machine fails, and so does each one after a run that
    was killed.
    No longer needed when: the name of vLLM's shared-memory group differs from run to run.
    """
    return lambda *_args, **_kwargs: False


@reaches("vllm.model_executor.layers.vocab_parallel_embedding", "get_masked_input_and_mask", only="cpu", replaced=True)
def mask_without_compiler(compiled: Any) -> Any:
    """Run the masking of a vocabulary-parallel embedding as it is written. CPU only.

    Symptom: it is compiled at the first token that ranks embed together, for seconds, and is no faster afterwards.
    No longer needed when: `enforce_eager` keeps vLLM from compiling it.
    """
    return inspect.unwrap(compiled)


def release_memory(*_args: Any, **_kwargs: Any) -> None:
    """Free the memory that a closed engine held, and nothing else."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# what is called or read: the engine


class Interrupted(BaseException):
    """The engine was stopped in the middle of its requests, which are dropped."""


@reaches("vllm.v1.engine.llm_engine", "LLMEngine.step")
@reaches("vllm.utils.counter", "Counter")
@reaches("vllm.entrypoints.llm", "LLM.enqueue")
class WatchedSteps:
    """Act between the steps of an engine (one token of every request).

    Symptom: `LLM.generate` returns when the last answer ends, minutes after a signal requested the run's stop, and
    after most answers have ended.
    No longer needed when: `generate` takes a callback.
    """

    def __init__(self, llm: Any, should_stop: Callable[[], bool] | None) -> None:
        """Call `should_stop`, if given, before each step of `llm`, and raise `Interrupted` if it is true."""
        self._llm, self._step, self._should_stop = llm, llm.llm_engine.step, should_stop
        self._on_end: Callable[[int, Any], None] | None = None
        self._first = 0
        llm.llm_engine.step = self._watched

    def watch(self, on_end: Callable[[int, Any], None] | None) -> None:
        """Call `on_end` with the place of each request of the next `generate`, and its output, when it has ended."""
        self._on_end, self._first = on_end, self._llm.request_counter.counter  # requests are numbered as they come

    def _watched(self) -> Any:
        if self._should_stop is not None and self._should_stop():
            raise Interrupted
        outputs = self._step()
        if self._on_end is not None:
            for output in outputs:
                if output.finished:
                    self._on_end(int(output.request_id) - self._first, output)
        return outputs


@reaches("vllm.v1.engine.llm_engine", "LLMEngine.abort_request", parameter="internal")
def abort_requests(llm: Any) -> None:
    """Drop every pending request.

    Symptom: after an exception inside a step the next `generate` waits for the old requests for ever.
    No longer needed when: `LLM.generate` aborts its own requests when it raises.
    """
    engine = llm.llm_engine
    engine.abort_request(list(engine.output_processor.request_states), internal=True)


@reaches("vllm.v1.engine.output_processor", "RequestState.__init__", parameter="output_kind")
def show_each_token(llm: Any) -> None:
    """Let the outputs of each step have the tokens up to now of every pending request.

    Symptom: requests of `LLM.enqueue` have an output when they have ended, and none before.
    No longer needed when: `LLM.enqueue` leaves `SamplingParams.output_kind` as it is.
    """
    from vllm.sampling_params import RequestOutputKind

    for state in llm.llm_engine.output_processor.request_states.values():
        state.output_kind = RequestOutputKind.CUMULATIVE


@reaches("vllm.v1.engine.core_client", "InprocClient.shutdown")
def shut_down(llm: Any) -> None:
    """End an in-process engine; `release_memory` frees what it held, once nothing refers to it.

    Symptom: `LLM` has no close; deleting it leaves the KV cache to the garbage collector.
    No longer needed when: `LLM` has one.
    """
    llm.llm_engine.engine_core.shutdown()


def num_positions(model_config: Any) -> int:
    """Return how many positions a model has, rope scaling included.

    Symptom: `VLLM_ALLOW_LONG_MAX_MODEL_LEN`, which a scorer needs for one position more than its model has, turns off
    vLLM's own check.
    """
    derived = model_config.get_and_verify_max_len(None)
    return max(derived, getattr(model_config.hf_text_config, "max_position_embeddings", derived))


# what is called or read: inside the worker


@reaches("vllm.model_executor.layers.logits_processor", "LogitsProcessor")
def logits_processors(worker: Any) -> list[Any]:
    """Return the modules that scale the model's logits.

    Symptom: `prompt_logprobs` ignore the temperature in every `logprobs_mode`; a `scale` divided by it applies it.
    No longer needed when: a temperature for prompt log-probabilities exists.
    """
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    return [module for module in worker.get_model().modules() if isinstance(module, LogitsProcessor)]


def cut_vocabulary(worker: Any, size: int) -> None:
    """End the model's logits before id `size`: what follows gets no probability.

    Symptom: a model with more rows than its partner's vocabulary samples and scores ids that the partner lacks.
    No longer needed when: `allowed_token_ids` also normalises prompt log-probabilities, at no cost a token.
    """
    for module in logits_processors(worker):
        module.org_vocab_size = min(module.org_vocab_size, size)


@reaches("vllm.lora.lora_model", "LoRAModel.from_lora_tensors", only="adapter")
@reaches("vllm.lora.peft_helper", "PEFTHelper", only="adapter")
def load_adapter(worker: Any, tensors: Mapping[str, torch.Tensor], *, rank: int, alpha: float) -> Any:
    """Replace the adapter of the model; each rank of the engine keeps its part. Return its `vllm.LoRARequest`.

    Symptom: vLLM's own way in is a folder on disk, for each sync.
    No longer needed when: `LoRARequest` takes tensors.

    Args:
        tensors: on the CPU, under peft's names.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.request import LoRARequest

    manager = worker.model_runner.lora_manager
    lora = LoRAModel.from_lora_tensors(
        ADAPTER_ID,
        dict(tensors),
        PEFTHelper(r=rank, lora_alpha=alpha, target_modules=[]),  # type: ignore[arg-type]  # floats are divided as well
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=rename_mapper(getattr(worker.get_model(), "hf_to_vllm_mapper", None)),
    )
    adapters = manager._adapter_manager
    adapters.remove_adapter(ADAPTER_ID)
    adapters.add_adapter(lora)
    adapters.activate_adapter(ADAPTER_ID)
    return LoRARequest("student", ADAPTER_ID, "memory")  # no folder is behind it


@reaches(MODEL_UTILS, "WeightsMapper.get_rename_mapper", "WeightsMapper.get_unstacked_mapper", only="adapter")
def rename_mapper(mapper: Any) -> Any:
    """Return the part of a model's `WeightsMapper` that renames without stacking; None for None."""
    names = "get_rename_mapper", "get_unstacked_mapper"  # in 0.29 and later; before
    return next((getattr(mapper, name)() for name in names if hasattr(mapper, name)), None)


@reaches(CUMEM, "CuMemAllocator.instance", only="cuda")
@reaches(CUMEM, "CuMemAllocator.get_current_usage", only="cuda")
def pooled_bytes() -> int:
    """Return the bytes that an engine of this process that may sleep holds while awake, 0 without one.

    Symptom: torch counts them as allocated while the engine sleeps, too.
    No longer needed when: `torch.cuda.max_memory_allocated` leaves pluggable allocators' pools out.
    """
    module = sys.modules.get(CUMEM)
    allocator = module and module.CuMemAllocator.instance
    return allocator.get_current_usage() if allocator else 0
