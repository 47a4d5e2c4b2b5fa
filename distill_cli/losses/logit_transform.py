"""What a model does to its logits between head and softmax: a bias, a scale and a soft cap.

Left out: the temperature and merged tokens, which apply to the results (linear_divergence.py).

Shape letters: n tokens of a chunk, V vocabulary (or this rank's shard).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LogitTransform:
    """How the head's r = h W^T + b become the model's logits z: first the scale, then the cap.

    z = soft_cap * tanh(scale * r / soft_cap), or z = scale * r if there is no cap.
    """

    scale: float = 1.0
    """Not 0: Cohere's `logit_scale` and Falcon-H1's `lm_head_multiplier`. Granite divides by its `logits_scaling`."""
    soft_cap: float | None = None
    """Bound of |z|, above 0: `final_logit_softcapping` of Gemma 2 and 4. None: no bound."""

    def apply(self, logits_nV: torch.Tensor, *, bias_V: torch.Tensor | None, tanh_nV: torch.Tensor) -> None:
        """Turn the product h W^T into z, in place: in at most one pass, in three with a cap.

        Args:
            bias_V: of the logits' dtype.
            tanh_nV: z / soft_cap is left here if there is a cap; else it is not touched.
        """
        factor = self.scale if self.soft_cap is None else self.scale / self.soft_cap
        if bias_V is not None:
            torch.add(bias_V * factor, logits_nV, alpha=factor, out=logits_nV)
        elif factor != 1.0:
            logits_nV.mul_(factor)
        if self.soft_cap is not None:
            torch.mul(torch.tanh(logits_nV, out=tanh_nV), self.soft_cap, out=logits_nV)

    def cap_gradient(self, grad_nV: torch.Tensor, *, tanh_nV: torch.Tensor) -> None:
        """Multiply a gradient by the cap's derivative, 1 - (z / soft_cap)^2, in place."""
        if self.soft_cap is not None:
            torch.ops.aten.tanh_backward.grad_input(grad_nV, tanh_nV, grad_input=grad_nV)  # in one pass


IDENTITY = LogitTransform()
