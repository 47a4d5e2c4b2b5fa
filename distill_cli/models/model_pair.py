"""Compare student and teacher: vocabulary, end-of-sequence tokens, chat template. Reads files, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

from distill_cli.errors import ConfigError
from distill_cli.models import model_files

OWN_TEMPLATE = "own"
"""`model.teacher.chat_template` for the template in the teacher's folder."""
SHOWN = 30
"""Characters shown of a template's first difference."""


@dataclass(frozen=True)
class Vocabularies:
    """The two models' ids and tokens, compared."""

    sizes: tuple[int, ...]
    """Rows of the student's and the teacher's embedding: tokens, and padding."""
    conflicts: tuple[str, ...] = ()
    """Tokens with another id in the other model, or whose id is another token there; each with both ids."""
    extra: tuple[tuple[str, int, str], ...] = ()
    """Tokens that only one model has: token, id, role of that model."""
    num_shared: int = 0
    """One above the largest id that is the same token in both tokenizers; 0 if one cannot be read."""

    @classmethod
    def of(cls, student: Path, teacher: Path, *, tokenizer: Path | None = None) -> Vocabularies:
        """Compare two folders; `tokenizer` is the folder of the tokenizer in use if that is not the student's."""
        sizes = tuple(model_files.vocab_size(folder) for folder in (student, teacher))
        ours, theirs = model_files.vocabulary(tokenizer or student), model_files.vocabulary(teacher)
        if ours is None or theirs is None:
            return cls(sizes)
        by_id = {number: token for token, number in theirs.items()}
        conflicts = sorted(
            f"{token!r} ({number} and {theirs.get(token, 'absent')})"
            for token, number in ours.items()
            if theirs.get(token, number) != number or by_id.get(number, token) != token
        )
        extra = [(token, ours[token], "student") for token in ours.keys() - theirs]
        extra += [(token, theirs[token], "teacher") for token in theirs.keys() - ours]
        num_shared = 1 + max((ours[token] for token in ours.keys() & theirs), default=-1)
        return cls(sizes, tuple(conflicts), tuple(sorted(extra, key=lambda one: (one[1:], one[0]))), num_shared)

    @property
    def limit(self) -> int | None:
        """First id that neither engine samples or scores; None if both models have the same ids."""
        limits = {*self.sizes, self.num_shared} if self.extra else {*self.sizes}
        return min(limits) if len({*self.sizes}) > 1 or self.extra else None

    def problem(self) -> str | None:
        """Return why the teacher cannot score the student's tokens; None if it can."""
        if self.conflicts:
            return f"{len(self.conflicts)} tokens have different ids, such as {self.conflicts[0]}"
        inside = [one for one in self.extra if one[1] < self.num_shared]
        if inside:
            token, number, whose = inside[0]
            return f"only the {whose} has {len(inside)} of the tokens, such as {token!r} ({number})"
        return None

    def warning(self) -> str | None:
        """Return a warning about ids that only one model has; None if there are none."""
        if self.limit is None:
            return None
        tokens = f"; {len(self.extra)} tokens such as {self.extra[0][0]!r} are only one model's" if self.extra else ""
        sizes = f"the student's vocabulary has {self.sizes[0]} ids and the teacher's {self.sizes[1]}"
        return f"{sizes}{tokens}: ids from {self.limit} on are neither sampled nor scored"


def write_end_tokens(folder: Path, ids: tuple[int, ...]) -> None:
    """Set the end-of-sequence tokens in the `generation_config.json` of a model's folder."""
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**model_files.read_object(file), "eos_token_id": list(ids)}, indent=2) + "\n")


def template_difference(student: Path, teacher: Path, messages: list[dict[str, str]], **kwargs: Any) -> str | None:
    """Describe the first difference of the two models' chat templates on a sample; None if they agree on it."""
    templates = {folder: template for folder in (student, teacher) if (template := chat_template(folder)) is not None}
    if len({templates.get(folder) for folder in (student, teacher)}) == 1:
        return None
    if len(templates) == 1:
        return f"which only the {'student' if student in templates else 'teacher'} has"
    ours, theirs = (
        render(f"{folder}: its chat template", template, messages, special_tokens(folder), kwargs)
        for folder, template in templates.items()
    )
    if ours == theirs:
        return None
    at = len(commonprefix([ours, theirs]))
    shown = f"the student's {ours[at : at + SHOWN]!r}, the teacher's {theirs[at : at + SHOWN]!r}"
    return f"on a sample of the data from character {at} on: {shown}"


def render(
    name: str, template: str, messages: list[dict[str, str]], tokens: Mapping[str, str], kwargs: Mapping[str, Any]
) -> str:
    """Render a template as a tokenizer does. Raises ConfigError that begins with `name` if it fails."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered = render_jinja_template(  # texts, and where the generated parts lie
            conversations=[messages], chat_template=template, add_generation_prompt=True, **{**tokens, **kwargs}
        )
    except Exception as error:  # a template is the user's code and may raise anything
        what = f"{name} fails on the first row of the data: {type(error).__name__}: {error}"
        raise ConfigError(f"{what}; correct the template, or the row") from error
    return rendered[0][0]


def read_template(template: str) -> str:
    """Return a Jinja file's content, or the template itself. Raises ConfigError if the file cannot be read."""
    if len(template) >= 1024 or not Path(template).is_file():
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{template}: cannot be read as a template ({error}); give a file in UTF-8") from error


def chat_template(folder: Path) -> str | None:
    """Return the chat template in a model's folder, the default one of several; None if there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    template = model_files.read_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several by name
        named = [one for one in template if isinstance(one, dict)]
        template = next((one.get("template") for one in named if one.get("name") == "default"), None)
    if not isinstance(template, str | None):
        raise ConfigError(f"{folder / 'tokenizer_config.json'}: chat_template is no text; correct it")
    return template


def special_tokens(folder: Path) -> dict[str, str]:
    """Return `bos_token` and the like, which a template may print."""
    config = model_files.read_object(folder / "tokenizer_config.json")
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in config.items()}
    return {name: token for name, token in tokens.items() if name.endswith("_token") and isinstance(token, str)}
