"""A checkpoint written as a Hugging Face folder.

One process reads the ranks' shards, whatever their number and mesh was, and writes tensor after tensor: no more than
`READ_BYTES` or the largest tensor is in memory, and the optimizer's state is not touched. Where adapters were trained
they are added to the weights that the run began from, or are a folder of their own, which peft and vLLM load.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
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
"""Of the tensors that are read at once."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of safetensors' format."""


def write_folder(
    checkpoint: Checkpoint, found: ResolvedRun, folder: Path, *, max_file_bytes: int, as_adapter: bool = False
) -> None:
    """Write weights, config, tokenizer and model card; the folder is there whole or not at all.

    If student and teacher end with different tokens, generation_config.json names both: answers stop where they did in
    training.

    Raises:
        ConfigError: no room for it.
        DistillError: it could not be written.
    """
    config, model, base = found.config, found.config.model, found.student.folder
    dtype = getattr(torch, model.student.dtype.value)
    weights = trained(checkpoint)
    try:
        with replacing(folder) as temporary:
            temporary.mkdir(parents=True)
            if as_adapter:
                write_adapter(weights, config, temporary, base=base)
            else:
                lora = model.student.lora
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
    """Tensors that are read when they are asked for."""

    sizes: dict[str, torch.Size]
    read: Callable[[Iterable[str]], dict[str, torch.Tensor]]


def trained(checkpoint: Checkpoint) -> Weights:
    """The parameters that are in a checkpoint: all, or the adapters'."""
    reader = dcp.HuggingFaceStorageReader(str(checkpoint.path))
    found = reader.read_metadata().state_dict_metadata
    found = {name: meta for name, meta in found.items() if not name.startswith(MOMENTS)}

    def read(names: Iterable[str]) -> dict[str, torch.Tensor]:
        tensors = {name: torch.empty(found[name].size, dtype=found[name].properties.dtype) for name in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of being one process, as is meant
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        return tensors

    return Weights({name: meta.size for name, meta in found.items()}, read)


def merged(adapters: Weights, base: Path, *, scale: float) -> Weights:
    """Return the weights of the folder `base` with the adapters merged; merged ones are float32."""
    sizes = {name: torch.Size(shape) for name, shape in shapes(base).items()}

    def read(names: Iterable[str]) -> dict[str, torch.Tensor]:
        names, tensors = set(names), {}
        for file in base.glob("*.safetensors"):
            with safe_open(file, framework="pt") as content:
                tensors |= {name: content.get_tensor(name) for name in names & set(content.keys())}
        for name in names:
            a, b = (name.removesuffix("weight") + part for part in (A, B))
            if a in adapters.sizes:
                pair = adapters.read((a, b))
                tensors[name] = merge(tensors[name], pair[a], pair[b], scale)
        return tensors

    return Weights(sizes, read)


def write_adapter(adapters: Weights, config: Config, folder: Path, *, base: Path) -> None:
    """What `peft.PeftModel.from_pretrained` and vLLM's LoRARequest take: float32, with the base model's name."""
    import peft

    student, found = config.model.student, shapes(base)
    path = student.path if base.parent.name == "snapshots" else str(base)  # the hub's name, or a folder
    settings = peft.LoraConfig(
        r=student.lora.rank,
        lora_alpha=student.lora.alpha,
        target_modules=shortened(found, list(targeted(found, student.lora.targets))),
        base_model_name_or_path=path,
        revision=student.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    settings.save_pretrained(folder)
    tensors = {exported_name(name): tensor for name, tensor in adapters.read(adapters.sizes).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_weights(weights: Weights, folder: Path, *, dtype: torch.dtype, max_file_bytes: int) -> None:
    """Safetensors files of at most `max_file_bytes` each, or of one tensor, with an index where there are several.

    Raises:
        ConfigError: no room for them, found out beforehand.
    """
    num_bytes = {name: size.numel() * dtype.itemsize for name, size in weights.sizes.items()}
    total, free = sum(num_bytes.values()), shutil.disk_usage(folder).free
    if total > free:
        raise ConfigError(
            f"{folder.parent}: the student takes {total / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; give another "
            "folder, or make room"
        )
    files = split(num_bytes, max_file_bytes)
    for file, names in files.filename_to_tensors.items():
        write_safetensors(folder / file, names, weights, dtype=dtype)
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(file: Path, names: Sequence[str], weights: Weights, *, dtype: torch.dtype) -> None:
    """One file, a few tensors at a time: safetensors' own writer wants all of them, and copies each.

    The format: eight bytes of the header's length, the header in JSON, the tensors' bytes end to end.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    num_bytes = {name: weights.sizes[name].numel() * dtype.itemsize for name in names}
    parts = split(num_bytes, READ_BYTES).filename_to_tensors.values()
    for name in itertools.chain(*parts):
        begin, end = end, end + num_bytes[name]
        header[name] = {"dtype": DTYPES[dtype], "shape": list(weights.sizes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            tensors = weights.read(part)
            for name in part:
                stream.write(tensors.pop(name).to(dtype).contiguous().view(-1).view(torch.uint8).numpy())
        stream.flush()
        os.fsync(stream.fileno())


def split(num_bytes: dict[str, int], limit: int) -> StateDictSplit:
    """Divide names into files of at most `limit` bytes; a tensor that is larger has a file of its own."""
    return split_state_dict_into_shards_factory(
        num_bytes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )


def model_card(checkpoint: Checkpoint, config: Config, *, as_adapter: bool = False) -> str:
    """What the hub shows: the recipe and the scores."""
    loss, state, lora = config.loss, checkpoint.state, config.model.student.lora
    targets = ", ".join(lora.targets) if lora.targets else "every linear layer"
    parameters = "".join(f", {name} {value}" for name, value in {**loss.parameters, **loss.kwargs}.items())
    rows = {
        "student": config.model.student.path,
        "teacher": config.model.teacher.path,
        "trained": f"adapters of rank {lora.rank}, alpha {lora.alpha:g}, on {targets}" if lora.is_on else "all weights",
        "loss": f"{loss.kl_type}{parameters}, top-{loss.topk}, tail {loss.tail.value}",
        "steps": f"{checkpoint.step} of {config.rollout.prompts_per_step} prompts x "
        f"{config.rollout.generations_per_prompt} answers",
        "optimizer": f"AdamW, learning rate {config.train.lr}, {state['num_updates']} updates of "
        f"{config.train.global_batch_size} sequences",
    }
    scores = {
        "student before": state.get("before"),
        "student at this step": state.get("latest") if state.get("latest_step") == checkpoint.step else None,
        "teacher": state.get("teacher"),
    }
    library = "peft" if as_adapter else "transformers"
    lines = ["---", f"library_name: {library}", "tags: [on-policy-distillation, distill]", "---", ""]
    lines += ["# A student of on-policy distillation", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items()]
    measured = {name: score for name, score in scores.items() if score}
    if measured:
        lines += ["", "| on the validation prompts | accuracy | mean length | prompts |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {score['accuracy']:.1%} | {score['mean_length']:.0f} | {score['num_samples']} |"
            for name, score in measured.items()
        ]
    return "\n".join(lines) + "\n"
