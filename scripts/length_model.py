"""Make a small language model whose sampled answers have lognormal lengths: for benchmarks of sampling.

    python scripts/length_model.py DIR [--median 200] [--sigma 1] [--longest 2048]

The tokens of an answer are places on a time scale: the first 64 places are one token apart, later ones 4%. Token k is
followed by itself, or by token k + 1 with the probability that makes a place last as long as it should, or by the end
of the sequence with the hazard that the lognormal distribution has there. Print median, sigma and mean of the resulting
lengths, computed exactly.

The layers are those of an ordinary Qwen3 of that size and cost as much, but add nothing: the token's embedding alone
makes the logits. The tokenizer is the embedded pair's.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from distill_cli.models.model_files import ASSETS

TINY = ASSETS / "tiny_pair/student"
EXACT_PLACES, STRETCH = 64, 1.04
NEVER = -40.0
"""Logit of a token that does not follow."""


def place_times(longest: int) -> torch.Tensor:
    """Return the number of tokens before each place: float64 [places]."""
    times = [float(n) for n in range(EXACT_PLACES)]
    while times[-1] < longest:
        times.append(max(times[-1] + 1, times[-1] * STRETCH))
    return torch.tensor(times, dtype=torch.float64)


def transitions(times: torch.Tensor, *, median: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probability of ending at each place, and of moving on to the next: float64 [places] each."""

    def survival(time: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.erfc((time.clamp_min(1e-9) / median).log() / sigma / math.sqrt(2))

    gaps = torch.cat([times.diff(), times.diff()[-1:]])
    ends = 1 - (survival(times + gaps) / survival(times)) ** (1 / gaps)
    ends = ends.clamp(1e-9, 1 - 1e-9)
    moves = (1 - ends) / gaps
    moves[-1] = 0
    return ends, moves


def length_distribution(ends: torch.Tensor, moves: torch.Tensor, *, longest: int) -> torch.Tensor:
    """Return P(length = n) for n = 1 to `longest`, at which longer answers are cut: float64 [longest]."""
    at, found = torch.zeros_like(ends), []
    at[0] = 1
    for _ in range(longest - 1):
        found.append(float((at * ends).sum()))
        on = at * moves
        at = at * (1 - ends) - on
        at[1:] += on[:-1]
    return torch.tensor([*found, 1 - sum(found)], dtype=torch.float64)


def make_model(folder: Path, *, median: float = 200, sigma: float = 1, longest: int = 2048, layers: int = 1) -> None:
    """Write the model. Lengths are those of `length_distribution`, if answers are cut at `longest`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in TINY.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(file, folder / file.name)
    facts = json.loads((TINY / "config.json").read_text())
    ends, moves = transitions(place_times(longest), median=median, sigma=sigma)
    first, end, places = facts["vocab_size"], facts["eos_token_id"], len(ends)
    hidden_size = -(-(places + 1) // 64) * 64
    same = ("intermediate_size", "head_dim", "eos_token_id", "rms_norm_eps", "num_attention_heads")
    config = Qwen3Config(
        **{name: facts[name] for name in (*same, "num_key_value_heads")},
        vocab_size=first + places,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        max_position_embeddings=2 * longest,
        tie_word_embeddings=False,
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    follows = torch.zeros(places, config.vocab_size, dtype=torch.float64)  # P(token | place)
    follows[:, end] = ends
    place = torch.arange(places)
    follows[place, first + place] = 1 - ends - moves
    follows[place[:-1], first + place[1:]] = moves[:-1]
    logits = follows.log().clamp_min(NEVER)
    # The norm's output of a place is one coordinate of size sqrt(hidden size). A prompt's text is at place 0, whose own
    # token the answer begins with.
    embedding, head = torch.zeros(config.vocab_size, hidden_size), torch.zeros(config.vocab_size, hidden_size)
    embedding[:first, places] = 1
    embedding[first + place, place] = 1
    head[:, :places] = logits.t() / math.sqrt(hidden_size)
    head[:, places] = NEVER / math.sqrt(hidden_size)
    head[first, places] = 0
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(head)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    model.generation_config.eos_token_id = end
    model.generation_config.save_pretrained(folder)


def facts_of(*, median: float, sigma: float, longest: int) -> dict[str, float]:
    """Return median, sigma of the logarithm and mean of the answers' lengths, of which the first token is place 0's."""
    probability = length_distribution(*transitions(place_times(longest), median=median, sigma=sigma), longest=longest)
    n = torch.arange(1, longest + 1, dtype=torch.float64)
    log_mean = (probability * n.log()).sum()
    return {
        "median": float(n[(probability.cumsum(0) >= 0.5).nonzero()[0]]),
        "sigma": float((probability * (n.log() - log_mean) ** 2).sum().sqrt()),
        "mean": float((probability * n).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--median", type=float, default=200)
    parser.add_argument("--sigma", type=float, default=1)
    parser.add_argument("--longest", type=int, default=2048)
    arguments = parser.parse_args()
    lengths = {name: getattr(arguments, name) for name in ("median", "sigma", "longest")}
    make_model(arguments.folder, **lengths)
    print(", ".join(f"{name} {value:.4g}" for name, value in facts_of(**lengths).items()))


if __name__ == "__main__":
    main()
