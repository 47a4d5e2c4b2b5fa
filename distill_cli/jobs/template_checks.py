"""Checks of the chat templates that make prompts. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill_cli.config.schema import Config
from distill_cli.config.teachers import model_key, path_key, teacher_configs
from distill_cli.data.row_check import DataFacts
from distill_cli.models import model_pair
from distill_cli.models.model_files import ModelFiles
from distill_cli.types import Example

if TYPE_CHECKING:
    from distill_cli.jobs.preflight import Facts


class Template(NamedTuple):
    """A template that a run's prompts are made with."""

    name: str
    """What a problem begins with."""
    given: str | None
    """A file or the template itself; None is the one in `folder`."""
    folder: Path
    """The model whose special tokens it may print."""
    kwargs: Mapping[str, Any]


def template_files(config: Config) -> Iterator[str]:
    """Templates that the config gives must exist."""
    given = {"model.chat_template": config.model.chat_template}
    for name, alone in teacher_configs(config).items():
        if (template := alone.model.teacher.chat_template) != model_pair.OWN_TEMPLATE:
            given[f"{model_key(name)}.chat_template"] = template
    for key, template in given.items():
        if template is not None and "{" not in template and not Path(template).is_file():
            yield f"{key}={template}: no such file, and no template either: those have {{{{ }}}} in them"


def templates(facts: Facts, config: Config, tokenizer: ModelFiles, data: DataFacts) -> None:
    """Render the first row with each template; ranks render all rows. Raises ConfigError."""
    if data.sample is None:
        return
    messages = sample_messages(config, data.sample)
    for one in _used(config, tokenizer, facts.teachers or {}):
        folder = one.folder
        text = model_pair.chat_template(folder) if one.given is None else model_pair.read_template(one.given)
        if text is not None and "{" in text:
            model_pair.render(one.name, text, messages, model_pair.special_tokens(folder), one.kwargs)


def _used(config: Config, tokenizer: ModelFiles, teachers: Mapping[str, ModelFiles]) -> Iterator[Template]:
    model = config.model
    name = f"{tokenizer.path}: its chat template" if model.chat_template is None else "model.chat_template: it"
    yield Template(name, model.chat_template, tokenizer.folder, model.chat_template_kwargs)
    for name, alone in teacher_configs(config).items():
        teacher, files = alone.model.teacher, teachers.get(name)
        kwargs = {**model.chat_template_kwargs, **teacher.chat_template_kwargs}
        is_own = teacher.has_own_tokenizer
        if teacher.chat_template not in (None, model_pair.OWN_TEMPLATE):
            folder = files.folder if is_own and files is not None else tokenizer.folder
            yield Template(f"{model_key(name)}.chat_template: it", teacher.chat_template, folder, kwargs)
        elif files is not None and (is_own or teacher.chat_template is not None):
            yield Template(f"{path_key(name)}={files.path}: its chat template", None, files.folder, kwargs)


def sample_messages(config: Config, sample: Example) -> list[dict[str, str]]:
    """Return the messages of a row's prompt."""
    user = config.data.prompt_template.replace("{question}", sample.question)
    messages = [*(dict(message) for message in sample.messages[:-1]), {"role": "user", "content": user}]
    if config.data.system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.data.system_prompt})
    return messages
