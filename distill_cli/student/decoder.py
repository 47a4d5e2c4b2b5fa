"""The parts of a causal LM that are trained on text: its decoder, the decoder's layers, and the head.

A multimodal model is trained as the text model in it: the towers of its other inputs are dropped before weights are
read, and stay in the checkpoint as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_cli.errors import ConfigError
from distill_cli.losses.logit_transform import LogitTransform

TINY, HUGE = 2.0**-12, 1e30
"""Logits that show a transform's scale and its cap."""
PROBES = (-200.0, -30.0, -5.0, -0.5, 0.0, 0.25, 1.0, 20.0, 100.0)
"""Logits at which a measured transform is compared with the model's."""


def decoder_of(lm: PreTrainedModel) -> nn.Module:
    """Return the module that turns token ids into the hidden states that the head reads."""
    candidates = (lm.get_decoder(), lm.base_model)
    embedding = lm.get_input_embeddings()
    holders = (child for child in lm.children() if any(part is embedding for part in child.modules()))
    found = next(module for module in (*candidates, *holders) if isinstance(module, nn.Module) and module is not lm)
    if isinstance(found, PreTrainedModel) and found.get_output_embeddings() is not None:
        return decoder_of(found)  # Llama 4's wrapper holds a whole causal LM
    return found


def layers_of(lm: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers: the modules of its largest list."""
    lists: list[nn.Module] = [one for one in decoder_of(lm).modules() if isinstance(one, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"{type(lm).__name__} has no list of layers; this family is not supported")
    return list(max(lists, key=lambda one: sum(param.numel() for param in one.parameters())).children())


def drop_other_modules(lm: PreTrainedModel) -> None:
    """Take out, in place, the modules that neither contain nor belong to decoder and head."""
    kept = [decoder_of(lm), lm.get_output_embeddings()]
    inside = {id(module) for part in kept for module in part.modules()}
    _drop(lm, inside)


def _drop(module: nn.Module, inside: set[int]) -> None:
    for name, child in list(module.named_children()):
        if id(child) in inside:
            continue
        if any(id(part) in inside for part in child.modules()):
            _drop(child, inside)
        elif next(child.parameters(), None) is not None:
            setattr(module, name, None)


def measure_transform(lm: PreTrainedModel) -> LogitTransform:
    """Measure what the model's own forward does to its logits after the head.

    Config names would not do: Granite divides by `logits_scaling`, and HyperCLOVA X multiplies by it. Decoder and head
    are replaced for the call by stubs, so that the model needs no weights.

    Raises:
        ConfigError: it is more than a scale and a soft cap.
    """
    raw = torch.tensor((TINY, 1.0, HUGE, *PROBES))
    problem = f"{type(lm).__name__} does something to its logits that is not known here; this family is not supported"
    try:
        made = _forward_from(lm, raw)
    except Exception as error:  # a family's own code, on stubs
        raise ConfigError(f"{problem} ({type(error).__name__}: {error})") from error
    if made.shape != raw.shape:
        raise ConfigError(f"{problem} (it makes {len(made)} of {len(raw)})")
    tiny, one, huge = made[:3].tolist()
    cap = huge if huge < HUGE**0.5 else None
    scale = one if cap is None else tiny / TINY
    scale = 1.0 if abs(scale - 1.0) < 1e-6 else scale
    expected = scale * raw if cap is None else cap * torch.tanh(scale * raw / cap)
    if not torch.allclose(made, expected, rtol=1e-5, atol=1e-6):
        raise ConfigError(f"{problem} ({raw.tolist()} become {made.tolist()})")
    return LogitTransform(scale=scale, soft_cap=cap)


def _forward_from(lm: PreTrainedModel, raw_N: torch.Tensor) -> torch.Tensor:
    """Return what the model's forward makes of logits that its head yields: float32 [N]."""
    head, output = lm.get_output_embeddings(), _DecoderOutput(last_hidden_state=raw_N[None, :, None])

    def decode(*_args: object, **_inputs: object) -> _DecoderOutput:
        return output

    with ExitStack() as stubs:
        for module in {lm.base_model, decoder_of(lm)} - {lm}:  # families call one or the other
            stubs.enter_context(_forward_is(module, decode))
        stubs.enter_context(_forward_is(head, lambda hidden: hidden[..., :1]))
        ids = torch.zeros(1, len(raw_N), dtype=torch.int64)
        return lm(input_ids=ids, use_cache=False).logits.float().flatten()


class _DecoderOutput(dict[str, Any]):
    """A decoder's output with hidden states alone; its other fields are None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return self["last_hidden_state"] if key == 0 else super().__getitem__(key)


@contextmanager
def _forward_is(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
