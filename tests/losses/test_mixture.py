"""Mixtures of teachers, compared with dense float64 distributions."""

import pytest
import torch

from distill_cli.losses.merged_eos import PADDING_ID
from distill_cli.losses.mixture import mix, uncertain_mass
from distill_cli.types import TeacherScores

TOKENS, VOCAB = 12, 20
WEIGHTS = (0.6, 0.3, 0.1)


def make_dense(number: int = 3) -> torch.Tensor:
    """Log-probabilities of several teachers, float64 [S, R, V]."""
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(number, TOKENS, VOCAB, generator=generator).double()).log_softmax(-1)


def scores_of(logp_RV: torch.Tensor, *, topk: int, sampled_R: torch.Tensor) -> TeacherScores:
    logp_RK, ids_RK = logp_RV.topk(topk)
    return TeacherScores.of_topk(ids_RK.int(), logp_RK.float(), logp_RV.gather(1, sampled_R[:, None])[:, 0].float())


@pytest.mark.parametrize("topk", [1, 4, VOCAB])
def test_mixture_is_of_known_probabilities(topk: int) -> None:
    logp_SRV, sampled_R = make_dense(), torch.arange(TOKENS)
    parts = [scores_of(logp_RV, topk=topk, sampled_R=sampled_R) for logp_RV in logp_SRV]
    mixed, known_RV, dense_RV = mix(parts, WEIGHTS), torch.zeros(TOKENS, VOCAB).double(), torch.zeros(TOKENS, VOCAB)
    for weight, logp_RV in zip(WEIGHTS, logp_SRV, strict=True):
        in_topk = torch.zeros(TOKENS, VOCAB).scatter(1, logp_RV.topk(topk).indices, 1)
        known_RV += weight * in_topk * logp_RV.exp()
        dense_RV = dense_RV + weight * logp_RV.exp()
    p_RK, ids_RK = known_RV.topk(topk)
    assert mixed.topk_ids.equal(ids_RK.int())
    torch.testing.assert_close(mixed.topk_logp.double().exp(), p_RK, rtol=1e-6, atol=1e-7)
    sampled = dense_RV.gather(1, sampled_R[:, None])[:, 0]
    torch.testing.assert_close(mixed.sampled_logp.double().exp(), sampled, rtol=1e-6, atol=1e-7)
    found_RK = dense_RV.gather(1, ids_RK)
    missing_R, bound_R = (found_RK - p_RK).sum(-1), uncertain_mass(parts, WEIGHTS)
    assert (missing_R <= bound_R + 1e-6).all()
    assert (bound_R.max() < 1e-6) == (topk == VOCAB)


def test_mixture_of_equal_teachers_is_theirs() -> None:
    one = scores_of(make_dense()[0], topk=5, sampled_R=torch.arange(TOKENS))
    mixed = mix([one, one], (0.5, 0.5))
    assert mixed.topk_ids.equal(one.topk_ids)
    torch.testing.assert_close(mixed.topk_logp, one.topk_logp)
    assert not uncertain_mass([one, one], (0.5, 0.5)).any()


def test_padding_of_merged_ends_stays_padding() -> None:
    parts = [
        TeacherScores.of_topk(torch.tensor([[3, 1, PADDING_ID]]), torch.tensor([[-0.1, -3.0, -1e4]]), torch.zeros(1)),
        TeacherScores.of_topk(
            torch.tensor([[3, PADDING_ID, PADDING_ID]]), torch.tensor([[-0.2, -1e4, -1e4]]), torch.zeros(1)
        ),
    ]
    mixed = mix(parts, (0.5, 0.5))
    assert mixed.topk_ids.tolist() == [[3, 1, PADDING_ID]]
    assert mixed.topk_logp[0, 2] == -1e4
    assert mix([TeacherScores.empty(3)] * 2, (0.5, 0.5)).topk_ids.shape == (0, 3)
