"""What student and teacher have in common: vocabulary, end-of-sequence tokens, chat template. Reads files, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from distill_cli.config.schema import Config, EosMap
from distill_cli.errors import ConfigError
from distill_cli.models import model_files

OWN_TEMPLATE = "own"
"""`model.teacher.chat_template` that is the one in the teacher's folder."""
SHOWN = 30
"""Characters of a template's first difference that are shown."""


@dataclass(frozen=True)
class EndTokens:
    """What each model ends with (`generation_config.json`, else `config.json`)."""

    student: frozenset[int]
    teacher: frozenset[int]

    @classmethod
    def of(cls, student: Path, teacher: Path) -> EndTokens:
        return cls(*(frozenset(end_tokens(folder)) for folder in (student, teacher)))

    def merged_eos_ids(self, config: Config) -> tuple[int, ...]:
        """The tokens that are taken for one, the student's first: empty where the models agree, or are not to.

        They end an answer, and the loss compares the probability of any of them.
        """
        if config.model.eos_map is EosMap.off or self.student == self.teacher:
            return ()
        return (*sorted(self.student), *sorted(self.teacher - self.student))


@dataclass(frozen=True)
class Vocabularies:
    """The two models' ids and tokens, held against each other."""

    sizes: tuple[int, int]
    """Rows of the student's and the teacher's embedding: tokens, and padding."""
    conflicts: tuple[str, ...] = ()
    """Tokens with another id in the other model, or an id with another token."""
    extra: tuple[tuple[str, int, str], ...] = ()
    """Tokens that only one has: token, id, whose."""
    num_shared: int = 0
    """One above the largest id that both tokenizers give the same token; 0 where one cannot be read."""

    @classmethod
    @cache  # a large vocabulary takes a second to read
    def of(cls, student: Path, teacher: Path, *, tokenizer: Path | None = None) -> Vocabularies:
        """`tokenizer` is the folder of the tokenizer that is used, where that is not the student's."""
        sizes = tuple(model_files.vocab_size(model_files.read_config(folder)) for folder in (student, teacher))
        ours, theirs = model_files.vocabulary(tokenizer or student), model_files.vocabulary(teacher)
        if ours is None or theirs is None:
            return cls(sizes)
        by_id = {number: token for token, number in theirs.items()}
        conflicts = sorted(
            token
            for token, number in ours.items()
            if theirs.get(token, number) != number or by_id.get(number, token) != token
        )
        shared = ours.keys() & theirs.keys()
        extra = [(token, number, "student") for token, number in ours.items() if token not in theirs]
        extra += [(token, number, "teacher") for token, number in theirs.items() if token not in ours]
        return cls(
            sizes,
            tuple(f"{token!r} ({ours[token]} and {theirs.get(token, 'absent')})" for token in conflicts),
            tuple(sorted(extra, key=lambda one: one[1])),
            1 + max((ours[token] for token in shared), default=-1),
        )

    @property
    def limit(self) -> int | None:
        """Ids from here on are neither sampled nor scored, in either engine; None where both have the same."""
        limits = {*self.sizes} if len({*self.sizes}) > 1 else set()
        if self.extra:
            limits.add(self.num_shared)
        return min(limits) if limits else None

    def problem(self) -> str | None:
        """Why the teacher cannot score what the student writes, in words; None where it can."""
        if self.conflicts:
            return f"{len(self.conflicts)} tokens have different ids, such as {self.conflicts[0]}"
        inside = [one for one in self.extra if one[1] < self.num_shared]
        if inside:
            token, number, whose = inside[0]
            return f"only the {whose} has {len(inside)} of the tokens, such as {token!r} ({number})"
        return None

    def warning(self) -> str | None:
        if self.limit is None:
            return None
        tokens = f"; {len(self.extra)} tokens such as {self.extra[0][0]!r} are only one model's" if self.extra else ""
        return (
            f"the student's vocabulary has {self.sizes[0]} ids and the teacher's {self.sizes[1]}{tokens}: ids from "
            f"{self.limit} on are neither sampled nor scored"
        )


def write_end_tokens(folder: Path, ids: tuple[int, ...]) -> None:
    """Makes a model's folder say that it ends with any of these tokens."""
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**read_object(file), "eos_token_id": list(ids)}, indent=2) + "\n")


def template_difference(student: Path, teacher: Path, messages: list[dict[str, str]], **kwargs: Any) -> str | None:
    """Where the two models' chat templates first differ on a sample, in words; None where they agree on it."""
    templates = [chat_template(folder) for folder in (student, teacher)]
    if templates[0] == templates[1]:
        return None
    if None in templates:
        return f"of which only the {'teacher' if templates[0] is None else 'student'} has one"
    ours, theirs = (
        render(f"{folder}: its chat template", template, messages, special_tokens(folder), kwargs)
        for template, folder in zip(templates, (student, teacher), strict=True)
    )
    if ours == theirs:
        return None
    length = min(len(ours), len(theirs))
    at = next((index for index in range(length) if ours[index] != theirs[index]), length)
    return (
        f"on a sample of the data from character {at} on: the student's {ours[at : at + SHOWN]!r}, the teacher's "
        f"{theirs[at : at + SHOWN]!r}"
    )


def render(
    name: str,
    template: str,
    messages: list[dict[str, str]],
    tokens: Mapping[str, str],
    kwargs: Mapping[str, Any],
) -> str:
    """As a tokenizer would. Raises ConfigError where the template, called `name`, fails."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=True, **{**tokens, **kwargs}
        )
    except Exception as error:  # a template raises what it likes
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{name} fails on the first row of the data: {what}; mend the template, or the row"
        ) from error
    return rendered[0]


def read_template(template: str) -> str:
    """A Jinja file's content, or the template itself. Raises ConfigError where the file cannot be read."""
    if len(template) >= 1024 or not Path(template).is_file():
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{template}: cannot be read as a template ({error}); give a file in UTF-8") from error


def chat_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    template = read_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token` and the like, which a template may print."""
    found = read_object(folder / "tokenizer_config.json")
    tokens = {name: value for name, value in found.items() if name.endswith("_token")}
    tokens = {name: value["content"] if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: value for name, value in tokens.items() if isinstance(value, str)}


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    if not file.is_file():
        return {}
    value = model_files.read_json(file)
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: a JSON {type(value).__name__}, where an object is needed")
    return value


def end_tokens(folder: Path) -> set[int]:
    """The tokens that end a model's answers."""
    for name in ("generation_config.json", "config.json"):
        ids = read_object(folder / name).get("eos_token_id")
        if ids is not None:
            return set(ids) if isinstance(ids, list) else {ids}
    return set()
