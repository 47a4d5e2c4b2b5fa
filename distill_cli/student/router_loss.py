"""The auxiliary loss by which a family balances its experts, as its own transformers module computes it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from distill_cli.errors import ConfigError
from distill_cli.parallel.expert import experts_of


@dataclass(frozen=True)
class RouterLoss:
    """A weight times the family's load-balancing loss (Switch Transformer, Fedus et al. 2021, equations 4 to 6)."""

    weight: float
    function: Callable[..., torch.Tensor]
    num_experts: int
    num_per_token: int

    @classmethod
    def of(cls, lm: PreTrainedModel, *, weight: float) -> "RouterLoss":
        """Raises ConfigError if the family has no such loss."""
        function = getattr(sys.modules[type(lm).__module__], "load_balancing_loss_func", None)
        experts, config = experts_of(lm), lm.config.get_text_config()
        names = ("num_experts_per_tok", "moe_k", "top_k_experts")
        num_per_token = next((size for name in names if (size := getattr(config, name, None))), None)
        if function is None or not experts or num_per_token is None:
            what = f"{type(lm).__name__} has no auxiliary loss for its router"
            raise ConfigError(f"train.router_aux_loss={weight}: {what}; set it to 0")
        return cls(weight, function, int(experts[0].num_experts), int(num_per_token))  # type: ignore[arg-type]

    def __call__(self, router_logits: tuple[torch.Tensor, ...], is_real: torch.Tensor) -> torch.Tensor:
        """Return the weighted loss of a micro-batch: a scalar.

        Args:
            router_logits: of each layer, [T, experts].
            is_real: bool [1, T]: tokens of sequences, not padding.
        """
        return self.weight * self.function(router_logits, self.num_experts, self.num_per_token, is_real)
