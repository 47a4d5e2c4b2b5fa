"""Write a checkpoint as a Hugging Face folder, with a model card.

One process reads the ranks' shards, for any number of ranks and any mesh, and writes a few tensors at a time: memory
holds at most `READ_BYTES` or the largest tensor, and the optimizer's state is not read. Trained adapters are merged
into the weights that the run started from, or written to a folder of their own, which peft and vLLM load.
"""

import shutil
import warnings
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import jinja2
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distill_cli.checkpoint.saver import MOMENTS
from distill_cli.checkpoint.store import Checkpoint
from distill_cli.config.loss_schema import describe_loss
from distill_cli.config.schema import Config
from distill_cli.config.variation import plain
from distill_cli.data.prompts import load_tokenizer
from distill_cli.errors import DistillError
from distill_cli.folders.atomic_dir import replacing
from distill_cli.models.lora_names import shortened, targeted
from distill_cli.models.model_pair import write_end_tokens
from distill_cli.resolved import ResolvedRun
from distill_cli.student.adapters import A, B, exported_name, merge
from distill_cli.student.model import build_lm
from distill_cli.student.published import Group, Published
from distill_cli.student.safetensors_writer import Weights, write_weights
from distill_cli.student.weights import copy_processors


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
    weights, (_, published) = trained(checkpoint), build_lm(base, trust_remote_code=model.trust_remote_code)
    try:
        with replacing(folder) as temporary:
            temporary.mkdir(parents=True)
            if as_adapter:
                write_adapter(weights, config, temporary, published=published)
            else:
                scale = lora.alpha / lora.rank if lora.rank else None
                content = exported(weights, published, scale=scale)
                write_weights(content, temporary, dtype=dtype, max_file_bytes=max_file_bytes)
                published.config.dtype = dtype
                published.config.save_pretrained(temporary)
                copy_processors(base, temporary)
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


def exported(weights: Weights, published: Published, *, scale: float | None) -> Weights:
    """Return the content of a Hugging Face folder, in the layout of the folder that the run started from.

    Args:
        weights: the checkpoint's parameters; the adapters' if there is a scale, which are merged in float32.
    """

    def params(group: Group) -> dict[str, torch.Tensor]:
        missing = [name for name in group.params if name not in weights.shapes]  # frozen, or a buffer
        found = weights.read(name for name in group.params if name in weights.shapes)
        base = published.read(group) if missing else {}
        for name in missing:
            a, b = (name.removesuffix("weight") + part for part in (A, B))
            if scale is not None and a in weights.shapes:
                pair = weights.read((a, b))
                base[name] = merge(base[name], pair[a], pair[b], scale)
        return found | {name: base[name] for name in missing}

    return published.stored(params)


def write_adapter(adapters: Weights, config: Config, folder: Path, *, published: Published) -> None:
    """Write what `peft.PeftModel.from_pretrained` and vLLM's LoRARequest load: float32, with the base model's name."""
    import peft

    student, found, base = config.model.student, published.shapes, published.folder
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
    tensors = {
        exported_name(name, published.name_of): tensor for name, tensor in adapters.read(adapters.shapes).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def model_card(checkpoint: Checkpoint, config: Config, *, as_adapter: bool = False) -> str:
    """Return the README.md that the hub shows: the recipe and the scores (model_card.md)."""
    state, terms = checkpoint.state, describe_loss(plain(config), config.loss.parameters | config.loss.kwargs)
    latest = state.get("latest") if state.get("latest_step") == checkpoint.step else None
    scores = {"student before": state.get("before"), "student at this step": latest, "teacher": state.get("teacher")}
    scores = {name: score for name, score in scores.items() if score}
    strict = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return strict.from_string((resources.files(__package__) / "model_card.md").read_text()).render(
        **{name: getattr(config, name) for name in ("model", "rollout", "train")}, as_adapter=as_adapter,
        step=checkpoint.step, num_updates=state["num_updates"], terms=terms, scores=scores,
    )  # fmt: skip
