"""Weights of tokens in the loss, one small function each. No torch at import time.

A weight is a function of what is known about tokens: its positional parameters are names of FACTS, of which it gets
[n] each, and it returns [n], at least 0. Its keyword parameters are keys of the `loss` section: their types, defaults
and ranges are read from its signature before a run starts.

To add one, write the function, put it in TOKEN_WEIGHTS, and write conf/loss/token_weight/<name>.yaml with its
parameters; tests enumerate both. It may use only methods of tensors.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from distill_cli.losses.signature import Range, Signatures

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # signatures are evaluated where torch is not imported

FACTS = {
    "position": "index of the token among those of its answer that the student wrote, from 0",
    "length": "number of those tokens",
    "divergence": "the divergence at the token, in nats, before token_clip",
    "student_entropy": "the student's entropy, in nats",
    "teacher_entropy": "the teacher's entropy, in nats; where only its top-k is known, with the rest as one class",
    "student_logp": "the student's log-probability of the token, at temperature 1",
    "teacher_logp": "the teacher's log-probability of the token",
    "teachability": "the teacher's probability of the student's loss.topk likeliest tokens; where only the teacher's "
    "top-k is known, of those that are in it",
}
"""What a weight may read, detached from the gradient."""


def first_fraction(
    position: Tensor, length: Tensor, *, fraction: Annotated[float, Range(0, 1, excluded=(0,))] = 0.3
) -> Tensor:
    """1 for the first tokens of each answer, this fraction of it, and 0 for the others."""
    return (position < (length * fraction).ceil()).float()


def last_fraction(
    position: Tensor, length: Tensor, *, fraction: Annotated[float, Range(0, 1, excluded=(0,))] = 0.3
) -> Tensor:
    """1 for the last tokens of each answer, this fraction of it, and 0 for the others."""
    return (position >= length - (length * fraction).ceil()).float()


def position(position: Tensor, *, half_life: Annotated[float, Range(1e-3, 1e9)] = 256.0) -> Tensor:
    """Halve every `half_life` tokens of an answer."""
    return (position / -half_life).exp2()


def student_entropy(student_entropy: Tensor, *, min_entropy: Annotated[float, Range(0, 1e3)] = 0.5) -> Tensor:
    """1 where the student is in doubt, by an entropy of at least `min_entropy` nats, and 0 elsewhere."""
    return (student_entropy >= min_entropy).float()


def teacher_entropy(teacher_entropy: Tensor, *, min_entropy: Annotated[float, Range(0, 1e3)] = 0.5) -> Tensor:
    """1 where the teacher is in doubt, by an entropy of at least `min_entropy` nats, and 0 elsewhere."""
    return (teacher_entropy >= min_entropy).float()


def teachability(teachability: Tensor) -> Tensor:
    """The teacher's probability of the student's likeliest tokens: what it prefers is within the student's reach."""
    return teachability


TOKEN_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (first_fraction, last_fraction, position, student_entropy, teacher_entropy, teachability)
}
SIGNATURES = Signatures("loss.token_weight", TOKEN_WEIGHTS, takes=tuple(FACTS), is_choice=True)
