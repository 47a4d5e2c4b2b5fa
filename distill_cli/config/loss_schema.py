"""The section `loss` of the config."""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any

from distill_cli.config.fields import key, section
from distill_cli.losses import divergence, token_weight
from distill_cli.losses.signature import Signatures

Tail = Enum("Tail", {"bucket": "bucket", "renormalize": "renormalize", "zero": "zero"})
Alignment = Enum("Alignment", {"bytes": "bytes", "spans": "spans", "rank": "rank"})
Support = Enum("Support", {"teacher": "teacher", "student": "student", "union": "union", "full": "full"})

LOSS_PARAMETERS: dict[str, type] = {**divergence.SIGNATURES.parameters, **token_weight.SIGNATURES.parameters}
"""The parameters of divergences and token weights with their types: each is a key of the `loss` section."""


def with_parameters(cls: type) -> type:
    """Add a key for each of LOSS_PARAMETERS; null is the function's own default."""
    for name, kind in LOSS_PARAMETERS.items():
        cls.__annotations__[name] = f"{kind.__name__} | None"
        setattr(cls, name, None)
    return cls


def compared_tokens(support: str, topk: Any) -> str:
    """Return the tokens that a loss compares, in words."""
    whose = {"teacher": "the teacher's", "student": "the student's", "union": "both models'"}
    return f"{whose[support]} top-{topk}" if support in whose else "the whole vocabulary"


def describe_loss(config: Mapping[str, Any], parameters: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the terms of a loss in a line, from a config's values by dotted key.

    Args:
        parameters: those of the divergence that are to be named.
    """
    loss = {key.removeprefix("loss."): value for key, value in config.items() if key.startswith("loss.")}
    tokens = compared_tokens(loss.get("support", "teacher"), loss.get("topk"))
    if loss.get("alignment") == "rank":
        tokens = f"both models' top-{loss.get('topk')} by rank"
    elif loss.get("support") != "full":
        tokens += f", tail {loss.get('tail')}"
    divergence = ", ".join([str(loss.get("kl_type")), *(f"{key} {value}" for key, value in parameters.items()), tokens])
    others = {
        "likelihood": "supervised", "policy_gradient": "policy gradient", "reward": "reward", "penalty": "penalty"
    }  # fmt: skip
    added = [shown for name, shown in others.items() if loss.get(name)]
    return " + ".join([divergence] * bool(loss.get("divergence_weight", 1.0)) + added)


@section
@with_parameters
class LossConfig:
    """The parameters of the functions in `losses/divergence.py` and `losses/token_weight.py` are keys too, such as
    `kl_weight` and `fraction`."""

    kl_type: str = "mixed"
    """A divergence (`distill ls loss`), or `pkg.module:function` of your own."""
    kwargs: dict[str, Any] = key(factory=dict)
    """Keyword arguments of a function of your own, such as `loss.kwargs.alpha=0.3`."""
    support: Support = Support.teacher
    """Tokens whose probabilities are compared at each position: the teacher's top-k, the student's, the union of both,
    or the whole vocabulary (full). All but `teacher` need the teacher's hidden states, from which the trainer makes its
    logits with a copy of the teacher's head."""
    topk: int = key(64, at_least=1)
    """The k of the top-k, at most the vocabulary. The teacher's engine returns that many tokens; loss.support=full
    needs none."""
    alignment: Alignment = Alignment.bytes
    """How a teacher with a tokenizer of its own is compared (model.teacher.tokenizer=own; docs/cross_tokenizer.md).
    bytes: by the bytes of its tokens. Two older methods to compare with: spans, tokens of equal bytes, and the
    likelihood of the text between places where both begin a token (TRL's GOLD); rank, the likeliest tokens of both by
    rank, whatever they are (ULD, arXiv 2402.12030)."""
    tail: Tail = Tail.bucket
    """Treatment of the tokens outside the support: one further class (bucket), both sides renormalised on the support
    (renormalize), or a teacher that is zero there (zero)."""
    temperature: float = key(1.0, above=0)
    """Divides both models' logits before the softmax."""
    divergence_weight: float = key(1.0, at_least=0)
    """Weight of the divergence in the loss; at 0 it is only reported."""
    token_weight: str | None = None
    """Weight of each token's divergence (`distill ls loss/token_weight`), or `pkg.module:function` of your own; null
    weighs all tokens alike. The loss is divided by the number of tokens, not by the sum of weights."""
    token_clip: float | None = key(None, above=0)
    """Most of a token's divergence, in nats; a token above it has no gradient. With loss.policy_gradient also the most
    of its log-ratio's size. null is no limit."""
    policy_gradient: float = key(0.0, at_least=0)
    """Weight of the policy gradient whose advantage is log(teacher / student) of the sampled token: an estimate of the
    reverse KL's gradient from one token. Its importance ratio is that of the current student and the sampling one."""
    reward: float = key(0.0, at_least=0)
    """Weight of the policy gradient whose advantage is the answer's reward, less the mean of all answers to its prompt
    and divided by their standard deviation (GRPO). The reward is the verifier's or the environment's."""
    likelihood: float = key(0.0, at_least=0)
    """Weight of the cross-entropy of the tokens that the student did not write: supervised training on the dataset's or
    the teacher's answers (`rollout.off_policy`), with the divergence or without it (`loss=sft`)."""
    penalty: float = key(0.0, at_least=0)
    """Advantage below 0 of the least likely sampled tokens, whatever the teacher says: the control of `loss=no_teacher`
    (arXiv 2608.31046). The loss of these tokens is divided by their number."""
    penalty_share: float = key(0.2, above=0, at_most=1, only_with="loss.penalty")
    """Share of an update's sampled tokens that get loss.penalty: those with the lowest log-probability."""
    max_ratio: float = key(8.0, at_least=1, only_with="loss.policy_gradient or loss.reward or loss.penalty")
    """Sampled tokens whose importance ratio is above this, or below its inverse, have no policy gradient."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Return the divergence's own keys that have a value. Other arguments of a user's function are in `kwargs`."""
        return self._parameters(divergence.SIGNATURES, self.kl_type)

    @property
    def weight_parameters(self) -> dict[str, Any]:
        """Return the token weight's own keys that have a value."""
        return {} if self.token_weight is None else self._parameters(token_weight.SIGNATURES, self.token_weight)

    @property
    def has_advantages(self) -> bool:
        """Whether sampled tokens have an advantage that does not depend on the teacher."""
        return self.reward > 0 or self.penalty > 0

    @property
    def needs_hidden(self) -> bool:
        """Whether the loss needs the teacher's hidden states."""
        return self.support is not Support.teacher

    def _parameters(self, family: Signatures, name: str) -> dict[str, Any]:
        names = family.parameters_of(name) if name in family.functions else family.parameters
        return {one: getattr(self, one) for one in names if getattr(self, one, None) is not None}
