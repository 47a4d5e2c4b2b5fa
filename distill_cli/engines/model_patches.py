"""What is replaced in vLLM's model code, so that every family loads, and transformers stays as it is in this process.

Declared and checked like `vllm_patches`, which puts it in place. Importing this module imports neither vLLM nor torch.
"""

from __future__ import annotations

import sys
from typing import Any

from distill_cli.engines.reach import reaches

BACKEND = "vllm.model_executor.models.transformers.base"
"""vLLM's Transformers backend: it runs families that have no model of vLLM's own, with the classes of transformers."""
CPU_ROUTER = "vllm.model_executor.layers.fused_moe.router.cpu_router"


@reaches("vllm.model_executor.models.registry", "_run_in_subprocess", replaced=True)
def inspect_in_this_process(_run: Any) -> Any:
    """Read a model class's traits in this process, which imports its module a moment later anyway.

    Symptom: the first engine of an architecture takes 12 s longer, as long as its subprocess imports vLLM. It is there
    to leave CUDA uninitialised in this process, and a rank has initialised it.
    No longer needed when: in-process engines inspect without a subprocess.
    """
    return lambda function: function()


@reaches("vllm.transformers_utils.config", "_register_config_class", replaced=True)
def register_config_subclass(register: Any) -> Any:
    """Register a subclass where vLLM would rename a config class of transformers; `engine.load` removes it again.

    Symptom: after an engine of kimi_k2, `DeepseekV3Config` has its `model_type`, which `save_pretrained` writes.
    No longer needed when: vLLM registers classes of its own alone.
    """

    def register_subclass(model_type: str, config_class: type) -> None:
        if (
            config_class.__module__.startswith("transformers.")
            and getattr(config_class, "model_type", "") != model_type
        ):
            config_class = type(config_class.__name__, (config_class,), {})
        register(model_type, config_class)

    return register_subclass


@reaches("vllm.model_executor.models.config", "MambaModelConfig.verify_and_update_config", only="cpu", replaced=True)
def reuse_no_prefix_of_states(verify: Any) -> Any:
    """Turn prefix caching off for models with recurrent states, as nothing is prefilled in pieces here. CPU only.

    Symptom: `Chunked prefill is required for mamba cache mode 'align'`; `engine.load` turns it off on CPUs.
    No longer needed when: requests with a seed can be prefilled in pieces on CPUs.
    """

    def verify_without_prefixes(vllm_config: Any) -> None:
        if not vllm_config.scheduler_config.enable_chunked_prefill:
            vllm_config.cache_config.enable_prefix_caching = False
        verify(vllm_config)

    return staticmethod(verify_without_prefixes)


@reaches("vllm.model_executor.layers.rotary_embedding.base", "RotaryEmbedding.forward_cpu", only="cpu", replaced=True)
def rotate_heads_flat(forward: Any) -> Any:
    """Pass queries and keys [T, heads, size] to the rotation as [T, heads * size], the one layout it reads. CPU only.

    Symptom: lfm2's log-probabilities are off by 1, silently: the kernel takes the rows of the first tokens for all.
    No longer needed when: vLLM's CPU kernel reads three dimensions, as the one for GPUs does.
    """

    def forward_flat(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        inputs = query, key
        flat = [x if x is None or x.dim() <= positions.dim() + 1 else x.flatten(-2) for x in inputs]
        rotated = forward(self, positions, *flat)
        return tuple(x if x is None else x.view(like.shape) for x, like in zip(rotated, inputs, strict=True))

    return forward_flat


@reaches("vllm.model_executor.layers.layernorm", "RMSNorm.forward_native", only="cpu", replaced=True)
def normalize_in_one_call(native: Any) -> Any:
    """Use vLLM's own kernel for norms in float32 where it fits. CPU only.

    Symptom: a norm is eight small operators, together a seventh of a small model's time per token.
    No longer needed when: vLLM's kernels for CPUs have a place among the implementations of `vllm.ir.ops.rms_norm`.
    """
    import torch

    def forward(self: Any, x: Any, residual: Any = None) -> Any:
        weight = self.weight
        if x.dtype != torch.float32 or weight.dtype != x.dtype or self.variance_size_override or not self.has_weight:
            return native(self, x, residual)
        if residual is not None and x.is_contiguous() and residual.is_contiguous():
            torch.ops._C.fused_add_rms_norm(x, residual, weight, self.variance_epsilon)
            return x, residual
        if residual is not None:
            return native(self, x, residual)
        x = x.contiguous()
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, self.variance_epsilon)
        return out

    return forward


@reaches("vllm.model_executor.layers.activation", "XIELU.__init__", replaced=True)
def make_xielu_of_model_type(init: Any) -> Any:
    """Give apertus' activation parameters the model's type, where vLLM keeps them in bfloat16.

    Symptom: log-probabilities in float32 are off by 1e-3.
    No longer needed when: `XIELU` takes the type of the model.
    """
    import torch

    def init_of_model_type(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{"dtype": torch.get_default_dtype()} | kwargs)

    return init_of_model_type


@reaches(CPU_ROUTER, "CPURouter.__init__", only="cpu", replaced=True, optional=True)
def route_in_one_group(init: Any) -> Any:
    """Choose experts in one group where they are scored by sigmoids or with a correction bias. CPU only.

    Symptom: ernie4_5_moe's log-probabilities are off by 0.7, silently, as the bias is left out; minimax_m2 fails.
    No longer needed when: vLLM's `CPURouter` corrects the scores of ungrouped experts.
    """

    def init_grouped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        corrected = self.scoring_func == "sigmoid" or self.e_score_correction_bias is not None
        known = self.scoring_func in ("softmax", "sigmoid") and self.custom_routing_function is None
        if corrected and known and not self.use_grouped_topk:
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1

    return init_grouped


@reaches("vllm.model_executor.layers.logits_processor", "LogitsProcessor.forward", replaced=True)
def add_bias_of_head(forward: Any) -> Any:
    """Add the bias of a head that has one.

    Symptom: phimoe's log-probabilities are off by 0.3, silently: vLLM loads the bias and leaves it out.
    No longer needed when: vLLM's phimoe passes it, as its other models do.
    """

    def forward_with_bias(
        self: Any, lm_head: Any, hidden_states: Any, embedding_bias: Any = None, **kwargs: Any
    ) -> Any:
        bias = getattr(lm_head, "bias", None) if embedding_bias is None else embedding_bias
        return forward(self, lm_head, hidden_states, bias, **kwargs)

    return forward_with_bias


@reaches("vllm.model_executor.models.gemma3n", "Gemma3nSelfDecoder.forward", replaced=True)
@reaches("vllm.model_executor.models.gemma3n", "Gemma3nSelfDecoder.get_per_layer_input_embeddings")
def embed_per_layer(forward: Any) -> Any:
    """Embed gemma3n's tokens for each layer if nothing else has.

    Symptom: log-probabilities of gemma3n_text are off by 0.3, silently: only the multimodal wrapper embeds them.
    No longer needed when: `Gemma3nForCausalLM` passes `per_layer_inputs`.
    """

    def forward_with_inputs(self: Any, input_ids: Any, *args: Any, per_layer_inputs: Any = None, **kwargs: Any) -> Any:
        if per_layer_inputs is None and input_ids is not None:
            embedded = self.get_per_layer_input_embeddings(input_ids)
            per_layer_inputs = embedded.unflatten(-1, (self.config.num_hidden_layers, -1))
        return forward(self, input_ids, *args, per_layer_inputs=per_layer_inputs, **kwargs)

    return forward_with_inputs


@reaches("vllm.triton_utils.dispatcher", "_rebind_kernels", only="cpu", replaced=True, optional=True)
def look_past_llvmlite(rebind: Any) -> Any:
    """Look for kernels in every module but numba's LLVM binding, whose objects have any attribute. CPU only.

    Symptom: if numba was imported before the first engine: `'_lib_fn_wrapper' object has no attribute 'get'`.
    No longer needed when: vLLM reads an object's `__dict__` if it is one.
    """

    def rebind_others(overrides: Any) -> None:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "llvmlite"}
        try:
            rebind(overrides)
        finally:
            sys.modules.update(hidden)

    return rebind_others


# the Transformers backend


@reaches(BACKEND, "Base._decorate_cls_for_torch_compile", replaced=True)
def note_decorated_classes(decorate: Any) -> Any:
    """Note what a class of transformers was before vLLM decorates it, for `restore_decorated_classes`."""

    def note_and_decorate(self: Any, cls: type, *args: Any, **kwargs: Any) -> None:
        self.__dict__.setdefault("classes_before", []).append((cls, cls.__bases__, dict(vars(cls))))
        decorate(self, cls, *args, **kwargs)

    return note_and_decorate


@reaches(BACKEND, "Base.__init__", replaced=True)
def restore_decorated_classes(init: Any) -> Any:
    """Give the engine's modules classes of their own, and transformers' classes back as they were.

    vLLM decorates the decoder's class for `torch.compile` in place: it adds a base, and replaces `__init__` and
    `__call__`. Here the decorations move to a subclass when the model is built.

    Symptom: the trainer's model of the same family fails, built before the engine (`no attribute 'do_not_compile'`) or
    after it (`Current vLLM config is not set`).
    No longer needed when: vLLM decorates a subclass.
    """

    def init_and_restore(self: Any, **kwargs: Any) -> None:
        try:
            init(self, **kwargs)
        finally:
            for cls, bases, before in reversed(self.__dict__.pop("classes_before", [])):
                decorated = restore_class(cls, bases, before)
                for module in self.modules():
                    if type(module) is cls:
                        module.__class__ = decorated

    return init_and_restore


def restore_class(cls: type, bases: tuple[type, ...], before: dict[str, Any]) -> type:
    """Undo the changes of a class; return a subclass, of the same name, that has them.

    Args:
        bases: `cls.__bases__` as they were.
        before: `vars(cls)` as it was.
    """
    added_bases = [base for base in cls.__bases__ if base not in bases]
    changed = {name: value for name, value in vars(cls).items() if before.get(name) is not value}
    for name in changed:
        if name in before:
            setattr(cls, name, before[name])
        else:
            delattr(cls, name)
    cls.__bases__ = bases
    # transformers looks up by the printed class which outputs a model records
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, *added_bases), names | changed)
