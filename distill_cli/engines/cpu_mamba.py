"""The scan of Mamba-1 layers with torch on CPUs (mamba, falcon_mamba, jamba), for which vLLM has no kernel there.

Declared and checked like `vllm_patches`.

Shape letters: T tokens of all sequences, S sequences of one token each, D channels, N numbers of a channel's state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill_cli.engines.reach import reaches

if TYPE_CHECKING:
    import torch


MIXER = "vllm.model_executor.layers.mamba.mamba_mixer"


@reaches(MIXER, "selective_scan_fn", only="cpu", replaced=True)
def scan_with_torch(_scan: Any) -> Any:
    """Scan new sequences token by token. CPU only.

    Symptom: `'_OpNamespace' '_C' object has no attribute 'selective_scan_fwd'`.
    No longer needed when: vLLM's CPU build has the operator.
    """
    return selective_scan


@reaches(MIXER, "selective_state_update", only="cpu", replaced=True)
def update_with_torch(_update: Any) -> Any:
    """Scan one token more of each sequence. CPU only.

    Symptom: `Dimension out of range`: vLLM's operator expects the states of Mamba-2, of four dimensions.
    No longer needed when: vLLM passes Mamba-1's states to it as it expects them.
    """
    return update_states


def selective_scan(
    u_DT: torch.Tensor,
    states: torch.Tensor,
    delta_DT: torch.Tensor,
    A_DN: torch.Tensor,
    B_NT: torch.Tensor,
    C_NT: torch.Tensor,
    skip_D: torch.Tensor,
    gate_DT: torch.Tensor,
    delta_bias_D: torch.Tensor | None,
    *,
    cache_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    query_start_loc: torch.Tensor,
    **_unused: Any,
) -> torch.Tensor:
    """Return the gated outputs [D, T] of Mamba's recurrence (Gu and Dao 2023, section 3); `states` change in place.

    Args:
        states: [slots, D, N].
        cache_indices: the slot of each sequence.
        query_start_loc: where each sequence starts in T, and T.
    """
    import torch
    from torch.nn.functional import silu, softplus

    step_TD = softplus(delta_DT.T.float() + (0 if delta_bias_D is None else delta_bias_D))
    u_TD, B_TN, C_TN = u_DT.T.float(), B_NT.T.float(), C_NT.T.float()
    decay_TDN, input_TDN = (step_TD[..., None] * A_DN).exp(), (step_TD * u_TD)[..., None] * B_TN[:, None]
    out_TD, starts = torch.empty_like(u_TD), query_start_loc.tolist()
    for start, end, slot, goes_on in zip(
        starts[:-1], starts[1:], cache_indices.flatten().tolist(), has_initial_state.tolist(), strict=True
    ):
        state_DN = states[slot].float() if goes_on else torch.zeros_like(A_DN)
        for row in range(start, end):
            state_DN = decay_TDN[row] * state_DN + input_TDN[row]
            out_TD[row] = state_DN @ C_TN[row]
        states[slot] = state_DN.to(states.dtype)
    return ((out_TD + u_TD * skip_D) * silu(gate_DT.T.float())).T.to(u_DT.dtype)


def update_states(
    states: torch.Tensor,
    u_SD: torch.Tensor,
    delta_SD: torch.Tensor,
    A_DN: torch.Tensor,
    B_SN: torch.Tensor,
    C_SN: torch.Tensor,
    skip_D: torch.Tensor,
    delta_bias_D: torch.Tensor | None,
    *,
    z: torch.Tensor,
    state_batch_indices: torch.Tensor,
    out: torch.Tensor,
    **_unused: Any,
) -> None:
    """Write the gated outputs [S, D] of one token to `out`; `states` change in place, see `selective_scan`."""
    from torch.nn.functional import silu, softplus

    slots_S, u_SD = state_batch_indices.flatten().long(), u_SD.float()
    step_SD = softplus(delta_SD.float() + (0 if delta_bias_D is None else delta_bias_D))
    states_SDN = (step_SD[..., None] * A_DN).exp() * states[slots_S].float()
    states_SDN += (step_SD * u_SD)[..., None] * B_SN.float()[:, None]
    states[slots_S] = states_SDN.to(states.dtype)
    out_SD = (states_SDN @ C_SN.float()[..., None]).squeeze(-1) + u_SD * skip_D
    out.copy_(out_SD * silu(z.float()))
