"""The student's vLLM engine in the trainer's process; a sync copies weights in memory."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill_cli.engines import reload, vllm_patches
from distill_cli.engines.base import OnEnd, Request, Sampler, Then
from distill_cli.engines.engine import VllmEngine, reason
from distill_cli.engines.reach import check_names
from distill_cli.engines.settings import EngineSettings, SamplingSettings
from distill_cli.engines.weight_sync import (
    Outgoing,
    adapter_shapes,
    check_names_and_shapes,
    expected_shapes,
    full_tensors,
    shapes_of,
    whole_tensors,
)
from distill_cli.errors import DistillError, Unrecoverable
from distill_cli.types import Sample

NO_WEIGHTS, UNSYNCED = -1, -2
"""`VllmSampler.version` after sleep, which drops the weights, and before the first sync."""


class VllmSampler(VllmEngine, Sampler):
    """Samples the student in this process.

    For example:
        sampler = VllmSampler(settings)
        samples = sampler.sample(prompts, seeds=seeds, sampling=SamplingSettings(max_new_tokens=256))
        sampler.sync(model.named_parameters(), version=step)
    """

    def __init__(
        self, settings: EngineSettings, *, should_stop: Callable[[], bool] | None = None, **kwargs: Any
    ) -> None:
        """Load the student; `should_stop` and `kwargs` are `VllmEngine`'s."""
        self.version = UNSYNCED
        self._is_broken = False
        self.sleep_level = 1 if settings.adapter else 2
        super().__init__(settings, role="the sampler", should_stop=should_stop, **kwargs)
        if settings.adapter:
            check_names(platform="adapter")
        self._expected = expected_shapes(Path(settings.path))
        self._loaded = {} if settings.adapter else self.call_worker(reload.digests)
        """What the engine's tensors were when it had read the model's files; empty once a sync was compared with it."""

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        seeds: Sequence[int],
        sampling: SamplingSettings,
        on_end: OnEnd | None = None,
    ) -> list[Sample]:
        """Return one answer to each prompt, in their order; see `VllmEngine.sample`."""
        self._check_weights()
        return super().sample(prompts, seeds=seeds, sampling=sampling, on_end=on_end)

    def sample_chains(self, requests: Sequence[Request], *, sampling: SamplingSettings, then: Then) -> None:
        """Answer requests and those that follow; see `VllmEngine.sample_chains`."""
        self._check_weights()
        super().sample_chains(requests, sampling=sampling, then=then)

    def sync(self, named_tensors: Iterable[Outgoing], *, version: int) -> None:
        """Replace the engine's weights with the trainer's. A collective if they are DTensors.

        Names and shapes are compared with the model's before anything is copied. Pass DTensors as they are
        (`model.named_parameters()`): their global shapes are known without communication, and they are gathered here
        one after another, so that only one full parameter exists at a time.

        Args:
            named_tensors: every tensor of the model's files under its name there, except `settings.untouched`. With
                `settings.adapter` only the adapter's, under their names in peft: the weights stay as they were loaded.
            version: the value of `self.version` afterwards.

        Raises:
            DistillError: a name or shape is wrong (the engine keeps its weights), or copying failed half-way (the
                engine refuses all further use).
            Unrecoverable: the first sync leaves a weight of the engine as it was, or changes one that is the same.
        """
        self._check_usable()
        weights, adapter = list(named_tensors), self.settings.adapter
        expected = self._expected
        if adapter:
            expected = adapter_shapes(weights, rank=adapter.rank, expected=expected)
        check_names_and_shapes(weights, expected=expected, optional=() if adapter else self.settings.untouched)
        self._is_broken, is_first = True, bool(self._loaded)
        try:
            if is_first:
                self.call_worker(reload.fill_with_nan, self._untouched_parts(shapes_of(weights)))
            if adapter:
                load = partial(vllm_patches.load_adapter, rank=adapter.rank, alpha=adapter.alpha)
                self.lora_request = self.call_worker(load, whole_tensors(weights))
            else:
                tensors = full_tensors(weights, dtype=self.llm.model_config.dtype)
                self.call_worker(reload.load_weights, tensors)
        except Exception as error:
            raise DistillError(f"sync of version {version} to the sampler failed: {reason(error)}") from error
        if is_first:
            self._check_arrival(version=version)
        self._is_broken = False
        self.reset_prefix_cache()  # else old keys and values would answer for new weights
        self.version = version

    def _check_arrival(self, *, version: int) -> None:
        """Check tensor by tensor that every weight of the engine came from the first sync, before which it was NaN.

        Version 0 is the weights of the model's files: the engine must then be what it was when it had loaded them.
        """
        lost, changed = self.call_worker(reload.nan_tensors), list[str]()
        if version == 0 and not lost:
            found = self.call_worker(reload.digests)
            changed = [name for name, digest in self._loaded.items() if found.get(name) != digest]
        self._loaded = {}
        for what, names in (("does not bring", lost), ("changes", changed)):
            if names:
                some = f"{len(names)} of the engine's tensors, such as {', '.join(names[:3])}"
                fix = "this vLLM cannot follow the training of this model; try another release, or another student"
                raise Unrecoverable(f"{self.settings.path}: a sync {what} {some}: {fix}")

    def _untouched_parts(self, sent: Sequence[tuple[str, torch.Size]]) -> frozenset[str]:
        """Return the parts of names, such as vision_tower, that only tensors have that no sync brings."""
        touched = {part for name, _ in sent for part in name.split(".")}
        return frozenset({part for name in self.settings.untouched for part in name.split(".")} - touched)

    def reset_prefix_cache(self) -> None:
        """Clear the prefix cache: the next answers are those of an engine that was just built."""
        self._check_usable()
        if not self.llm.reset_prefix_cache():
            self._is_broken = True
            raise DistillError("the sampler's prefix cache could not be reset: requests are still running")

    def _check_weights(self) -> None:
        self._check_usable()
        if self.version == NO_WEIGHTS:
            raise DistillError("the sampler has no weights since it slept: sync() comes before its next use")

    def _check_usable(self) -> None:
        self.check_awake()
        if self._is_broken:
            raise DistillError("the sampler's weights are incomplete since a sync failed half-way: build it again")

    def sleep(self) -> None:
        """Give the device's memory back, weights included: after `wake` the next `sync` brings them.

        With `settings.adapter` no sync brings the weights: they wait in host memory.
        """
        if self.settings.sleep_mode and self.sleep_level == 2:
            self.version = NO_WEIGHTS
        super().sleep()
