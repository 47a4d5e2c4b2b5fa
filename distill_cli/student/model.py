"""The student: a transformers causal LM with the fused head in place of its logits, wrapped for the mesh.

The order of wrapping is the order of the lines of `wrap`. Parameters are float32; `train.precision=bf16` computes in
bfloat16 and reduces gradients in float32.

Shape letters: T tokens of the packed row, N response tokens, n of a chunk, C the top-k and the rest, H hidden size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from distill_cli.errors import ConfigError
from distill_cli.losses.divergence import DistillLoss
from distill_cli.losses.linear_topk import HeadOutput, linear_topk_loss
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.pack import MicroBatch
from distill_cli.student import attention


class Student(nn.Module):
    """The root that FSDP2 wraps: tokens in, the micro-batch's share of the loss out.

    The head's weight is used inside this forward, so that FSDP's hooks gather it before and reduce its gradient after.
    """

    def __init__(self, lm: PreTrainedModel, *, loss: DistillLoss, temperature: float) -> None:
        super().__init__()
        self.lm = lm
        self.loss = loss
        self.temperature = temperature

    def forward(self, batch: MicroBatch, *, num_loss_tokens: torch.Tensor) -> tuple[torch.Tensor, HeadOutput]:
        """The loss of one micro-batch.

        Args:
            num_loss_tokens: scalar float; the response tokens of the whole global batch, over all ranks and
                micro-batches. The one division of the loss happens here.

        Returns:
            The sum over this micro-batch's response tokens of their loss, divided by `num_loss_tokens` (scalar
            float32, to be summed over micro-batches and ranks), and what the head says of each token, detached.
        """
        hidden_1TH = self.lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            document_bounds=batch.document_bounds,
        ).last_hidden_state

        def token_loss(student_logp_nC: torch.Tensor, entropy_n: torch.Tensor, rows: slice) -> torch.Tensor:
            return self.loss(batch.topk_logp[rows], student_logp_nC, entropy_n) / num_loss_tokens

        out = linear_topk_loss(
            hidden_1TH[0, batch.rows],
            self.lm.get_output_embeddings().weight,
            batch.topk_ids,
            token_loss,
            sampled_ids_N=batch.sampled_ids,
            temperature=self.temperature,
        )
        return out.loss, out


def load_lm(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The folder's causal LM in float32, with the packed attention.

    Raises:
        ConfigError: the model changes its logits after the head, which the fused head would leave out.
    """
    attention.register()
    disable_progress_bar()
    lm = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention.NAME, trust_remote_code=trust_remote_code
    )
    config = lm.config.get_text_config()
    for name, neutral in (("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1.0)):
        value = getattr(config, name, neutral)
        if value not in (None, neutral):
            raise ConfigError(
                f"{folder}: {name}={value} changes the logits after the head; this model is not supported"
            )
    if lm.get_output_embeddings().bias is not None:
        raise ConfigError(
            f"{folder}: the head has a bias, which the fused head leaves out; this model is not supported"
        )
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:  # their state would cross from one packed document into the next
        raise ConfigError(f"{folder}: layers of type {', '.join(sorted(unknown))} cannot be packed; not supported")
    return lm.train()


def wrap(student: Student, parallel: Parallel, *, bf16: bool, activation_checkpointing: bool) -> Student:
    """Lays the student out over the mesh, in place. Every rank must call it."""
    # Tensor parallelism comes first, on plain parameters.
    if activation_checkpointing:
        student.lm.gradient_checkpointing_enable({"use_reentrant": False})
    # Compilation comes here, layer by layer.
    shard(student, parallel, bf16=bf16)
    return student


def shard(student: Student, parallel: Parallel, *, bf16: bool) -> None:
    """FSDP2: a group for each layer, and the root's for embedding, last norm and head.

    FSDP divides gradients by the ranks unless told not to; the loss is divided once already, so they are summed.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the teacher's log-probabilities stay float32
    )
    for layer in student.lm.base_model.layers:
        fully_shard(layer, mesh=parallel.fsdp, mp_policy=policy)
    # The root's parameters are needed from the head's forward into its backward: gathered once.
    fully_shard(student, mesh=parallel.fsdp, mp_policy=policy, reshard_after_forward=False)
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
