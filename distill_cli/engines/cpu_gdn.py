"""The gated delta rule of qwen3_next and qwen3_5 in float32 on CPUs, where vLLM's kernels take bfloat16 alone.

Declared and checked like `vllm_patches`. The mathematics is transformers' own torch code.

Shape letters: T tokens of a step, N sequences, D channels of the convolution, H heads of the values, K and V sizes of a
key's and a value's head.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from distill_cli.engines.reach import reaches

if TYPE_CHECKING:
    import torch

CONVOLUTION = "vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d"


@reaches("vllm.model_executor.layers.mamba.ops.cpu.gdn_attention", "cpu_gdn_attention_core", only="cpu", replaced=True)
@reaches("vllm.forward_context", "get_forward_context", only="cpu")
@reaches("vllm.utils.torch_utils", "_resolve_layer_name", only="cpu")
@reaches(CONVOLUTION, "causal_conv1d_fn_cpu", only="cpu", optional=True)
@reaches(CONVOLUTION, "causal_conv1d_update_cpu", only="cpu", optional=True)
def attend_in_float32(core: Any) -> Any:
    """Compute linear attention with torch if the model is float32. CPU only.

    Symptom: `CPU GDN attention requires BF16.`
    No longer needed when: vLLM's CPU kernels take float32.
    """
    import torch
    from vllm.forward_context import get_forward_context
    from vllm.utils.torch_utils import _resolve_layer_name

    def core_in_float32(mixed_qkv: Any, b: Any, a: Any, core_attn_out: Any, layer_name: Any) -> None:
        context: Any = get_forward_context()
        if mixed_qkv.dtype != torch.float32 or context.attn_metadata is None:
            core(mixed_qkv, b, a, core_attn_out, layer_name)
            return
        layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
        metadata = context.attn_metadata[layer.prefix]
        attend(layer, metadata, mixed_qkv, decay=a, rate=b, out_THV=core_attn_out)

    # vLLM registers it as an operator, whose schema torch reads from the annotations
    core_in_float32.__signature__ = inspect.signature(core, eval_str=True)  # type: ignore[attr-defined]
    return core_in_float32


def attend(
    layer: Any, metadata: Any, mixed_TD: torch.Tensor, *, decay: torch.Tensor, rate: torch.Tensor, out_THV: torch.Tensor
) -> None:
    """Write a step's linear attention to `out_THV`, and its states to the layer's cache.

    Args:
        layer: a `GatedDeltaNetAttention` of vLLM.
        metadata: its `GDNAttentionMetadata`: sequences that go on come before new ones.
        mixed_TD: queries, keys and values, before their convolution.
        decay, rate: [T, H], before their activations.
    """
    from torch.nn.functional import softplus

    if not metadata.num_actual_tokens:
        return
    slots_N, starts = metadata.non_spec_state_indices_tensor.long(), metadata.non_spec_query_start_loc.tolist()
    decay_TH = -layer.A_log.float().exp() * softplus(decay.float() + layer.dt_bias)
    inputs, num = (convolve(layer, metadata, mixed_TD), decay_TH, rate.sigmoid()), metadata.num_decodes
    if num:  # one token each
        apply_rule(layer, *(x[:num, None] for x in inputs), slots=slots_N[:num], out=out_THV[:num, None])
    for index in range(num, num + metadata.num_prefills):
        rows, slots = slice(starts[index], starts[index + 1]), slots_N[index : index + 1]
        if not metadata.has_initial_state[index]:
            layer.kv_cache[1][slots] = 0
        apply_rule(layer, *(x[None, rows] for x in inputs), slots=slots, out=out_THV[None, rows])


def convolve(layer: Any, metadata: Any, mixed_TD: torch.Tensor) -> torch.Tensor:
    """Return the causal convolution [T, D] of a step's tokens; the last inputs of each sequence go to the cache."""
    import torch
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
    from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_fn_cpu, causal_conv1d_update_cpu

    states = layer.kv_cache[0] if is_conv_state_dim_first() else layer.kv_cache[0].transpose(-1, -2)
    weight, bias = layer.conv1d.weight.squeeze(1), layer.conv1d.bias
    num, num_tokens = metadata.num_decodes, metadata.num_actual_tokens
    slots_N, parts = metadata.non_spec_state_indices_tensor, []
    if num:
        new = mixed_TD[:num].contiguous()
        parts.append(
            causal_conv1d_update_cpu(new, states, weight, bias, layer.activation, conv_state_indices=slots_N[:num])
        )
    if metadata.num_prefills:
        prefilled = causal_conv1d_fn_cpu(
            mixed_TD[num:num_tokens].T,
            weight,
            bias,
            states,
            metadata.non_spec_query_start_loc[num:] - num,
            cache_indices=slots_N[num:],
            has_initial_state=metadata.has_initial_state[num:],
            activation=layer.activation,
        )
        parts.append(prefilled.T)
    return torch.cat(parts)


def apply_rule(
    layer: Any,
    mixed_NTD: torch.Tensor,
    decay_NTH: torch.Tensor,
    rate_NTH: torch.Tensor,
    *,
    slots: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the gated delta rule's output [N, T, H, V] over sequences of one length, and their states to `slots`."""
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        torch_chunk_gated_delta_rule,
        torch_recurrent_gated_delta_rule,
    )

    sizes = [size // layer.tp_size for size in (layer.key_dim, layer.key_dim, layer.value_dim)]
    query, key, value = (
        part.unflatten(-1, (-1, size))
        for part, size in zip(
            mixed_NTD.split(sizes, dim=-1), (layer.head_k_dim, layer.head_k_dim, layer.head_v_dim), strict=True
        )
    )
    query, key = (x.repeat_interleave(layer.num_v_heads // layer.num_k_heads, dim=2) for x in (query, key))
    rule = torch_recurrent_gated_delta_rule if mixed_NTD.shape[1] == 1 else torch_chunk_gated_delta_rule
    states = layer.kv_cache[1].transpose(-1, -2)
    out[:], new_states = rule(
        query,
        key,
        value,
        g=decay_NTH,
        beta=rate_NTH,
        initial_state=states[slots],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    states[slots] = new_states.to(states.dtype)
