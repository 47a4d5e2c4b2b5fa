"""The student's vLLM engine in the trainer's process, where a sync of weights is a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from distill_cli.engines import vllm_patches
from distill_cli.engines.adapter_sync import adapter_request, check_adapter, whole_tensors
from distill_cli.engines.base import Sampler
from distill_cli.engines.engine import Engine, reason
from distill_cli.engines.reach import check_names
from distill_cli.engines.sample_requests import sample
from distill_cli.engines.settings import EngineSettings, SamplingSettings
from distill_cli.engines.weight_sync import Deferred, check_names_and_shapes, expected_shapes, full_tensors
from distill_cli.errors import DistillError
from distill_cli.types import Sample

NO_WEIGHTS = -1
"""`VllmSampler.version` after sleep, which drops the weights."""


class VllmSampler(Sampler):
    """Samples the student in this process.

    For example:
        sampler = VllmSampler(settings)
        samples = sampler.sample(prompts, seeds=seeds, sampling=SamplingSettings(max_new_tokens=256))
        sampler.sync(model.named_parameters(), version=step)
    """

    def __init__(self, settings: EngineSettings, *, should_stop: Callable[[], bool] | None = None) -> None:
        """Load the student; `should_stop` is `Engine`'s."""
        self.version = 0
        self._is_broken = False
        self._engine = Engine(settings, role="the sampler", should_stop=should_stop)
        if settings.adapter:
            check_names(platform="adapter")
        self.num_ranks = settings.tensor_parallel
        model_config = self._engine.llm.model_config
        self._dtype: torch.dtype = model_config.dtype
        self._expected, self._optional = expected_shapes(
            model_config.hf_config, trust_remote_code=settings.trust_remote_code
        )

    def sample(self, prompts: Sequence[list[int]], *, seeds: Sequence[int], sampling: SamplingSettings) -> list[Sample]:
        """One answer to each prompt, in their order; see `distill_cli.engines.sample_requests.sample`."""
        self._check_usable()
        if self.version == NO_WEIGHTS:
            raise DistillError("the sampler has no weights since it slept: sync() comes before its next use")
        return sample(self._engine, prompts, seeds=seeds, sampling=sampling)

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor | Deferred]], *, version: int) -> None:
        """Replace the engine's weights with the trainer's. A collective where they are DTensors.

        Names and shapes are compared with the model's before anything is copied. Pass DTensors as they are
        (`model.named_parameters()`): their global shapes are known without communication, and they are gathered here
        one after the other, so that one full parameter lives at a time.

        Args:
            named_tensors: every parameter under its name in transformers; tied ones may be left out. With
                `settings.adapter` the adapter's alone, under their names in peft: the weights stay as they were loaded.
            version: what `self.version` is afterwards.

        Raises:
            DistillError: a name or shape is wrong (the engine keeps its weights), or copying failed half-way (the
                engine refuses all further use).
        """
        self._check_usable()
        weights, adapter = list(named_tensors), self._engine.settings.adapter
        if adapter:
            check_adapter(weights, rank=adapter.rank, expected=self._expected)
        else:
            check_names_and_shapes(weights, expected=self._expected, optional=self._optional)
        self._is_broken = True
        try:
            if adapter:
                load = partial(vllm_patches.load_adapter, rank=adapter.rank, alpha=adapter.alpha)
                self._engine.call_worker(load, whole_tensors(weights))
                self._engine.lora_request = adapter_request()
            else:
                self._engine.call_worker(vllm_patches.load_weights, full_tensors(weights, dtype=self._dtype))
        except Exception as error:
            raise DistillError(f"sync of version {version} to the sampler failed: {reason(error)}") from error
        self._is_broken = False
        self.reset_prefix_cache()  # else old keys and values would answer for new weights
        self.version = version

    def reset_prefix_cache(self) -> None:
        """Forget what was asked: the next answers are those of an engine that is new."""
        self._check_usable()
        if not self._engine.llm.reset_prefix_cache():
            self._is_broken = True
            raise DistillError("the sampler's prefix cache could not be reset: requests are still running")

    def _check_usable(self) -> None:
        self._engine.check_awake()
        if self._is_broken:
            raise DistillError("the sampler's weights are incomplete since a sync failed half-way: build it again")

    def sleep(self) -> None:
        """Give the device's memory back, weights included: after `wake` the next `sync` brings them.

        Weights that no sync brings, with `settings.adapter`, wait in host memory.
        """
        keeps_weights = self._engine.settings.adapter is not None
        if self._engine.settings.sleep_mode and not keeps_weights:
            self.version = NO_WEIGHTS
        self._engine.sleep(level=1 if keeps_weights else 2)

    def wake(self) -> None:
        """Take the memory again; `sync` must come before the next `sample`."""
        self._engine.wake()

    def close(self) -> None:
        self._engine.close()
