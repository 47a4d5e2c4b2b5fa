"""Where a model's parameters lie in its checkpoint's files, and how they get there and back.

Since version 5 transformers names and lays out some parameters otherwise than the files do: it stacks the matrices of
all experts into one tensor, and renames the parts of multimodal models. Its table of conversions
(`transformers.conversion_mapping`) says how; here it is applied to one group of tensors at a time, so that a sharded
student never exists whole. The weights go back under the names that the files have: for the sampler's engine, which
reads such files too, and for an export.

Persistent buffers are stored like parameters. Tensors of the files that the student lacks (vision towers, heads that
predict several tokens) are `untouched`: no sync brings them, and an export copies them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from distill_cli.engines.weight_sync import Converted, Deferred, Outgoing
from distill_cli.errors import ConfigError
from distill_cli.models import model_files
from distill_cli.models.model_files import files_of
from distill_cli.student.safetensors_writer import DTYPES, Weights

Tensors = Mapping[str, torch.Tensor]
COMPARED_ROWS = 64
"""Rows of a tied parameter that are compared where it is stored twice."""


@dataclass(frozen=True, eq=False)
class Group:
    """Parameters and the stored tensors that make them up, which are converted together."""

    params: tuple[str, ...]
    """Names in the model; buffers too."""
    tensors: tuple[str, ...]
    """Names in the files. Without a converter all of them are the parameter: a tied one may be stored twice."""
    converter: WeightConverter | None = None
    """From the files to the model; None if a tensor is the parameter."""


class Published:
    """The layout of a model's checkpoint. Build it from a whole model, before it is cut over a mesh."""

    def __init__(self, lm: PreTrainedModel, folder: Path) -> None:
        """Match the folder's tensors with the model's parameters and persistent buffers.

        Nothing is read but some rows of tied parameters that are stored twice.

        Raises:
            ConfigError: the folder lacks a parameter, has one of another shape, or has a tensor that is none of the
                model's and that the model's family does not ignore; a tied parameter is stored with two values; or a
                conversion cannot be undone.
        """
        self.folder, self.config = folder, lm.config
        self.shapes = {name: torch.Size(shape) for name, shape in model_files.shapes(folder).items()}
        mapping = get_model_conversion_mapping(lm)
        self._renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        self._converters = [one for one in mapping if isinstance(one, WeightConverter)]
        self._prefix = lm.base_model_prefix
        state, names = dict(lm.state_dict()), _first_names(lm)
        self.files = files_of(folder)
        self.groups = self._group(state, names)
        self._check_complete({names[name] for name in state}, {name for name, _ in lm.named_buffers()}, lm)
        for group in self.groups:
            self._check_shapes(group, state)
            self._check_copies(group)
        self.keep(state)

    @property
    def untouched(self) -> tuple[str, ...]:
        """Names of the stored tensors that belong to no parameter."""
        stored = {name for group in self.groups for name in group.tensors}
        return tuple(name for name in self.shapes if name not in stored)

    def keep(self, names: Iterable[str]) -> None:
        """Leave out the groups of parameters that are not in `names`: their tensors are untouched from now on."""
        kept = set(names)
        self.groups = [group for group in self.groups if kept.issuperset(group.params)]
        self._group_of = {name: group for group in self.groups for name in group.params}

    def _group(self, state: dict[str, torch.Tensor], first_names: Mapping[str, str]) -> list[Group]:
        sources: dict[str, list[str]] = {}
        converters: dict[str, WeightConverter] = {}
        for name in sorted(self.shapes, key=dot_natural_key):
            found, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, state)
            if found not in state and name in state:  # stored as it is in the model already
                found, pattern = name, None
            if found not in state:
                continue
            found = first_names[found]
            sources.setdefault(found, []).append(name)
            if pattern is not None:
                converters[found] = next(one for one in self._converters if pattern in one.source_patterns)
        groups = []
        for first, names in sources.items():
            if first not in converters:
                groups.append(Group((first,), tuple(names)))
                continue
            group = Group((first,), tuple(names), converters[first])
            groups.append(replace(group, params=tuple(self.convert(group, self._empty(names)))))
        return groups

    def convert(self, group: Group, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Return a group's parameters, given its stored tensors."""
        if group.converter is None:
            return {group.params[0]: tensors[group.tensors[0]]}
        converter: Any = deepcopy(group.converter)
        for name, tensor in tensors.items():
            renamed, pattern = rename_source_key(name, self._renamings, [converter])
            assert pattern is not None
            converter.add_tensor(renamed, name, pattern, tensor)
        return _single(converter.convert(group.params[0], config=self.config))

    def revert(self, group: Group, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Return a group's stored tensors, given its parameters."""
        if group.converter is None:
            return dict.fromkeys(group.tensors, tensors[group.params[0]])
        reverse: Any = group.converter.reverse_transform()
        first = ""
        for name, tensor in tensors.items():
            renamed, pattern = reverse.rename_source_key(name)
            first = first or renamed
            reverse.add_tensor(renamed, name, pattern, tensor)
        made = _single(reverse.convert(first, config=self.config))
        names = {self._renamed(name): name for name in group.tensors}
        return {names[self._known_as(name, names)]: tensor for name, tensor in made.items()}

    def _renamed(self, name: str) -> str:
        return rename_source_key(name, self._renamings, [])[0]

    def _known_as(self, name: str, names: Mapping[str, str]) -> str:
        """Return the name that is stored with or without the base model's prefix."""
        prefix = f"{self._prefix}."
        return next((one for one in (name, name.removeprefix(prefix), prefix + name) if one in names), name)

    def _check_complete(self, params: set[str], buffers: set[str], lm: PreTrainedModel) -> None:
        missing = sorted(params - {name for group in self.groups for name in group.params}, key=dot_natural_key)
        ignored = [*(getattr(lm, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
        extra = [n for n in self.untouched if n not in buffers and not any(re.search(one, n) for one in ignored)]
        for what, wrong in (("lack", missing), ("have, and the model lacks,", sorted(extra))):
            if wrong:
                fix = "the folder is damaged, or its names are not the transformers class's"
                what = f"its *.safetensors {what} {len(wrong)} tensors, such as {wrong[0]}"
                raise ConfigError(f"{self.folder}: {what}; {fix}")

    def _check_copies(self, group: Group) -> None:
        """Compare some rows of a tied parameter that is stored twice: the model has one value for both."""
        if group.converter is not None or len(group.tensors) == 1:
            return
        first = self._some_rows(group.tensors[0])
        for name in group.tensors[1:]:
            if not torch.equal(first, self._some_rows(name)):
                what = f"config.json ties {name} to {group.tensors[0]}, and the files have two values for them"
                raise ConfigError(f"{self.folder}: {what}; set tie_word_embeddings=false there, or remove one of them")

    def _check_shapes(self, group: Group, state: Tensors) -> None:
        stored = self._empty(group.tensors)
        for name, tensor in self.convert(group, stored).items():
            if tensor.shape != state[name].shape:
                rule = f"config.json makes it {list(state[name].shape)}; the model's folder is damaged"
                raise ConfigError(f"{self.folder}: {name} has the shape {list(tensor.shape)}, and {rule}")
        back = self.revert(group, {name: state[name].to("meta") for name in group.params})
        if {name: tensor.shape for name, tensor in back.items()} != {name: self.shapes[name] for name in group.tensors}:
            what = f"{group.params[0]} cannot be written as {group.tensors[0]} is stored"
            raise ConfigError(f"{self.folder}: {what}; this family is not supported")

    def _empty(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: torch.empty(self.shapes[name], device="meta") for name in names}

    def read(self, group: Group) -> dict[str, torch.Tensor]:
        """Read a group's parameters from the files, whole."""
        return self.convert(group, {name: self.file_tensor(name) for name in group.tensors})

    def weights(self, named: Iterable[tuple[str, torch.Tensor | Deferred]]) -> Iterator[Outgoing]:
        """Yield the model's parameters and persistent buffers under their names in the files.

        Args:
            named: names in the model; a tied parameter has the first of its names.
        """
        given = dict(named)
        for group in self.groups:
            values = [(name, given[name]) for name in group.params if name in given]
            if group.converter is None:
                yield from ((name, value) for _, value in values for name in group.tensors)
            elif values:
                shapes = {name: self.shapes[name] for name in group.tensors}
                yield Converted(shapes, values, partial(self.revert, group))

    def stored(self, params: Callable[[Group], Tensors]) -> Weights:
        """Return the checkpoint's content with new values of the parameters; untouched tensors are read from the files.

        Args:
            params: returns a group's parameters, whole, on the CPU.
        """
        group_of = {name: group for group in self.groups for name in group.tensors}
        kinds = model_files.tensors(self.folder)

        @lru_cache(maxsize=1)  # a group's tensors may be read in several parts
        def made(group: Group) -> Tensors:
            return self.revert(group, params(group))

        def read(names: Iterable[str]) -> dict[str, torch.Tensor]:
            return {name: made(group_of[name])[name] if name in group_of else self.file_tensor(name) for name in names}

        return Weights(self.shapes, read, {name: DTYPES[kinds[name][0]] for name in self.untouched})

    def file_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor from its file."""
        with safe_open(self.files[name], framework="pt") as content:
            return content.get_tensor(name)

    def _some_rows(self, name: str) -> torch.Tensor:
        num_rows = self.shapes[name][0]
        with safe_open(self.files[name], framework="pt") as content:
            rows = content.get_slice(name)
            return torch.cat([rows[row : row + 1] for row in range(0, num_rows, max(1, num_rows // COMPARED_ROWS))])

    def name_of(self, param: str) -> str:
        """Return the name in the files of a parameter that is stored as one tensor."""
        (name,) = self._group_of[param].tensors
        return name


def _single(made: Mapping[str, torch.Tensor | list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return a conversion's results, of which some come in a list of one."""
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _first_names(lm: PreTrainedModel) -> dict[str, str]:
    """Return {name: first name of the same tensor} of parameters and buffers; a tied one has several names."""
    named = chain(lm.named_parameters(remove_duplicate=False), lm.named_buffers(remove_duplicate=False))
    first = dict[int, str]()
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}
