"""Both models' predictions at a token if merged end tokens leave fewer than `NUM_TOP`."""

from types import SimpleNamespace

import torch

from distill_cli.losses.distill_loss import PADDING_LOGP
from distill_cli.losses.merged_eos import PADDING_ID
from distill_cli.train.token_report import _token_values


def test_padding_is_no_token() -> None:
    logp_12 = torch.tensor([[-0.1, PADDING_LOGP]])
    one = torch.zeros(1)
    output = SimpleNamespace(
        loss_N=one, entropy_N=one, sampled_logp_N=one, teacher_sampled_logp_N=one, kl_forward_N=one, kl_reverse_N=one,
        teacher_top_ids_NM=torch.tensor([[7, PADDING_ID]]), teacher_top_logp_NM=logp_12,
        top_ids_NM=torch.tensor([[7, 3]]), top_logp_NM=torch.tensor([[-0.2, -2.0]]),
    )  # fmt: skip
    ((*_, teacher_ids, teacher_logp),) = _token_values(output)
    assert (teacher_ids, teacher_logp) == ([7], [logp_12[0, 0].item()])
