"""Write a checkpoint as a Hugging Face folder, with a model card.

One process reads the ranks' shards, for any number of ranks and any mesh, and writes a few tensors at a time: memory
holds at most `READ_BYTES` or the largest tensor, and the optimizer's state is not read. Trained adapters are merged
into the weights that the run started from, or written to a folder of their own, which peft and vLLM load.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoConfig

from distill_cli.checkpoint.saver import MOMENTS
from distill_cli.checkpoint.store import Checkpoint
from distill_cli.config.schema import Config
from distill_cli.data.prompts import load_tokenizer
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.atomic_dir import replacing
from distill_cli.models.lora_names import shortened, targeted
from distill_cli.models.model_files import shapes
from distill_cli.models.model_pair import write_end_tokens
from distill_cli.resolved import ResolvedRun
from distill_cli.student.adapters import A, B, exported_name, merge

READ_BYTES = 2**28
"""Size of the tensors that are read at once; a larger tensor is read alone."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Their names in safetensors' format."""


def write_folder(
    checkpoint: Checkpoint, found: ResolvedRun, folder: Path, *, max_file_bytes: int, as_adapter: bool = False
) -> None:
    """Write weights, config, tokenizer and model card; the folder is complete or absent.

    If student and teacher end with different tokens, generation_config.json lists both: answers stop where they did in
    training.

    Raises:
        ConfigError: the disk lacks space.
        DistillError: the folder could not be written.
    """
    config, model, base = found.config, found.config.model, found.student.folder
    lora, dtype = model.student.lora, getattr(torch, model.student.dtype.value)
    weights = trained(checkpoint)
    try:
        with replacing(folder) as temporary:
            temporary.mkdir(parents=True)
            if as_adapter:
                write_adapter(weights, config, temporary, base=base)
            else:
                if lora.rank:
                    weights = merged(weights, base, scale=lora.alpha / lora.rank)
                write_weights(weights, temporary, dtype=dtype, max_file_bytes=max_file_bytes)
                hf_config = AutoConfig.from_pretrained(base, trust_remote_code=model.trust_remote_code)
                hf_config.dtype = dtype
                hf_config.save_pretrained(temporary)
                if (base / "generation_config.json").is_file():
                    shutil.copyfile(base / "generation_config.json", temporary / "generation_config.json")
                if found.vocabulary.merged_eos_ids:
                    write_end_tokens(temporary, found.vocabulary.merged_eos_ids)
            tokenizer = load_tokenizer(
                found.tokenizer.folder, chat_template=model.chat_template, trust_remote_code=model.trust_remote_code
            )
            tokenizer.save_pretrained(temporary)
            (temporary / "README.md").write_text(model_card(checkpoint, config, as_adapter=as_adapter))
    except OSError as error:
        raise DistillError(f"{folder}: cannot be written: {error.strerror or error}") from error


@dataclass(frozen=True)
class Weights:
    """Tensors that are read on demand."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[Iterable[str]], dict[str, torch.Tensor]]
    """Return the tensors with these names."""


def trained(checkpoint: Checkpoint) -> Weights:
    """Return the parameters of a checkpoint: all, or the adapters'."""
    reader = dcp.HuggingFaceStorageReader(str(checkpoint.path))
    stored = [item for item in reader.read_metadata().state_dict_metadata.items() if not item[0].startswith(MOMENTS)]
    found = {name: meta for name, meta in stored if isinstance(meta, TensorStorageMetadata)}

    def read(names: Iterable[str]) -> dict[str, torch.Tensor]:
        tensors = {name: torch.empty(found[name].size, dtype=found[name].properties.dtype) for name in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns that this is a single process
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        return tensors

    return Weights({name: meta.size for name, meta in found.items()}, read)


def merged(adapters: Weights, base: Path, *, scale: float) -> Weights:
    """Return the weights of the folder `base` with the adapters merged; merged ones are float32."""

    def read(names: Iterable[str]) -> dict[str, torch.Tensor]:
        names, tensors = set(names), dict[str, torch.Tensor]()
        for file in base.glob("*.safetensors"):
            with safe_open(file, framework="pt") as content:
                tensors |= {name: content.get_tensor(name) for name in names & set(content.keys())}
        for name in names:
            a, b = (name.removesuffix("weight") + part for part in (A, B))
            if a in adapters.shapes:
                pair = adapters.read((a, b))
                tensors[name] = merge(tensors[name], pair[a], pair[b], scale)
        return tensors

    return Weights(shapes(base), read)


def write_adapter(adapters: Weights, config: Config, folder: Path, *, base: Path) -> None:
    """Write what `peft.PeftModel.from_pretrained` and vLLM's LoRARequest load: float32, with the base model's name."""
    import peft

    student, found = config.model.student, shapes(base)
    assert student.lora.rank, "the run trains adapters"
    path = student.path if base.parent.name == "snapshots" else str(base)  # the hub's name, or a folder
    settings = peft.LoraConfig(
        r=student.lora.rank,
        lora_alpha=student.lora.alpha,  # type: ignore[arg-type]  # peft accepts floats
        target_modules=shortened(found, list(targeted(found, student.lora.targets))),
        base_model_name_or_path=path,
        revision=student.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    settings.save_pretrained(str(folder))
    tensors = {exported_name(name): tensor for name, tensor in adapters.read(adapters.shapes).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_weights(weights: Weights, folder: Path, *, dtype: torch.dtype, max_file_bytes: int) -> None:
    """Write safetensors files of at most `max_file_bytes` each, or of one tensor, with an index if there are several.

    Raises:
        ConfigError: the disk lacks space for them; nothing is written.
    """
    num_bytes = {name: math.prod(shape) * dtype.itemsize for name, shape in weights.shapes.items()}
    total, free = sum(num_bytes.values()) / 1e9, shutil.disk_usage(folder).free / 1e9
    if total > free:
        what = f"{folder.parent}: the student takes {total:.2f} GB, and {free:.2f} GB are free"
        raise ConfigError(f"{what}; give another folder, or make room")
    files = split(num_bytes, max_file_bytes)
    for file, names in files.filename_to_tensors.items():
        write_safetensors(folder / file, names, weights, dtype=dtype)
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(file: Path, names: Sequence[str], weights: Weights, *, dtype: torch.dtype) -> None:
    """Write one file, a few tensors at a time: safetensors' own writer takes all at once, and copies each.

    The format: the length of the header in eight bytes, the header in JSON, the tensors' bytes end to end.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    num_bytes = {name: math.prod(weights.shapes[name]) * dtype.itemsize for name in names}
    parts = split(num_bytes, READ_BYTES).filename_to_tensors.values()
    for name in (name for part in parts for name in part):
        begin, end = end, end + num_bytes[name]
        header[name] = {"dtype": DTYPES[dtype], "shape": list(weights.shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            tensors = weights.read(part)
            for name in part:
                stream.write(tensors.pop(name).to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def split(num_bytes: dict[str, int], limit: int) -> StateDictSplit:
    """Divide names into files of at most `limit` bytes; a tensor that is larger has a file of its own."""
    return split_state_dict_into_shards_factory(
        num_bytes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )


def model_card(checkpoint: Checkpoint, config: Config, *, as_adapter: bool = False) -> str:
    """Return the README.md that the hub shows: the recipe and the scores (model_card.md)."""
    state, parameters = checkpoint.state, config.loss.parameters | config.loss.kwargs
    latest = state.get("latest") if state.get("latest_step") == checkpoint.step else None
    scores = {"student before": state.get("before"), "student at this step": latest, "teacher": state.get("teacher")}
    scores = {name: score for name, score in scores.items() if score}
    strict = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return strict.from_string((resources.files(__package__) / "model_card.md").read_text()).render(
        **{name: getattr(config, name) for name in ("model", "loss", "rollout", "train")}, as_adapter=as_adapter,
        step=checkpoint.step, num_updates=state["num_updates"], parameters=parameters, scores=scores,
    )  # fmt: skip
