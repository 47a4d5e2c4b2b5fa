"""Every recipe of conf/model: published sizes, and memory that fits the card that its first line names."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from distill_cli import memory
from distill_cli.config.choices import conf_dir, group_choices
from distill_cli.config.compose import compose
from distill_cli.config.schema import Config
from distill_cli.jobs import model_checks, preflight
from distill_cli.models.model_files import ModelFiles, text_config
from distill_cli.resolved import Ranks
from distill_cli.verbs.ls import first_comment
from tests.memory.published import MODELS, describe, num_parameters, write_folder

RECIPES = [name for name in group_choices("model", [conf_dir()]) if name not in ("custom", "tiny", "tiny_other")]
CARD = re.compile(r": (one|two|four|eight) (\d+) GB GPUs?$")
NUMBERS = {"one": 1, "two": 2, "four": 4, "eight": 8}
USABLE_GIB = {24: 22.0, 80: 79.1}
"""Memory that a process sees on a card of this size: an L4 or A10 with ECC, an H100."""
SPARE = 0.05
"""Share of a card for what the prediction leaves out."""
CHECKS = (
    *(model_checks.weights, model_checks.causal, model_checks.sizes, model_checks.trainable, model_checks.layout),
    *(model_checks.pair, model_checks.rotary, model_checks.router, model_checks.tensor_parallel),
    *(model_checks.expert_parallel, model_checks.tried_layouts, preflight.check_engines),
)
"""Checks of preflight that read the models' folders."""
MODELS_PAGE = Path(__file__).parents[2] / "docs/models.md"


@dataclass(frozen=True)
class Recipe:
    """A recipe with the folders of its models, on the cards of its first line."""

    facts: preflight.Facts
    num_gpus: int
    gpu_bytes: int

    @property
    def config(self) -> Config:
        return self.facts.config

    @property
    def folders(self) -> tuple[Path, Path]:
        assert self.facts.student
        assert self.facts.teachers
        return self.facts.student.folder, {name: files.folder for name, files in self.facts.teachers.items()}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("published")
    return lambda name: write_folder(name, root / name)


@pytest.fixture
def make(published: Callable[[str], Path]) -> Callable[..., Recipe]:
    def recipe(name: str, *overrides: str, card: int | None = None) -> Recipe:
        match = CARD.search(first_comment(conf_dir() / "model" / f"{name}.yaml"))
        assert match, "the first line ends with the number and size of the cards"
        num_gpus, gib = (NUMBERS[match[1]], USABLE_GIB[int(match[2])]) if card is None else (1, USABLE_GIB[card])
        config = composed(name, f"cluster.gpus_per_node={num_gpus}", *overrides)
        student, teacher = (
            ModelFiles.find(str(published(model.path)), key="model.path")
            for model in (config.model.student, config.model.teacher)
        )
        facts = preflight.Facts(
            config, ("student", "teacher"), {}, student=student, teachers={"teacher": teacher}, tokenizer=student,
            ranks=Ranks(1, num_gpus, on_gpus=True),
        )  # fmt: skip
        return Recipe(facts, num_gpus, round(gib * 2**30))

    return recipe


def composed(name: str, *overrides: str) -> Config:
    (job,) = compose([f"model={name}", "data.train.path=a.jsonl", "data.validation.path=b.jsonl", *overrides])
    return job.config


def model_problems(facts: preflight.Facts) -> Iterator[str]:
    for check in CHECKS:
        yield from check(**facts.named_by(check)) or ()


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_published(name: str) -> None:
    _, header = describe(name)
    assert num_parameters(header) == pytest.approx(MODELS[name].parameters, rel=0.02)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_passes_the_model_checks(name: str, make: Callable[..., Recipe]) -> None:
    assert list(model_problems(make(name).facts)) == []


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_its_card(name: str, make: Callable[..., Recipe]) -> None:
    check_fit(make(name))


@pytest.mark.parametrize(("name", "card"), [("qwen3_1.7b_4b", 80), ("gemma3_1b_12b", 80), ("smollm2_135m_1.7b", 24)])
def test_one_gpu_is_enough_for_its_size(name: str, card: int, make: Callable[..., Recipe]) -> None:
    check_fit(make(name, "size=one_gpu", card=card))


def check_fit(recipe: Recipe) -> None:
    """Skip if the student's memory cannot be predicted."""
    assert list(memory.engine_problems(recipe.config, *recipe.folders, gpu_bytes=recipe.gpu_bytes)) == []
    list(model_checks.layout(**recipe.facts.named_by(model_checks.layout)) or ())
    try:
        shape = memory.read_shape(recipe.folders[0], recipe.config.model.student.lora)
    except memory.NoPrediction as error:
        if not str(error).startswith("the family"):
            raise
        pytest.skip(str(error))
    ranks, size = recipe.num_gpus, recipe.gpu_bytes
    predicted = memory.predict(recipe.config, shape, *recipe.folders, num_ranks=ranks, gpu_bytes=size)
    assert predicted.peak <= (1 - SPARE) * size


@pytest.mark.parametrize("name", RECIPES)
def test_padded_vocabularies_are_named(name: str) -> None:
    model = composed(name).model
    sizes = {text_config(describe(one.path)[0])["vocab_size"] for one in (model.student, model.teacher)}
    text = (conf_dir() / "model" / f"{name}.yaml").read_text()
    assert (len(sizes) > 1) == ("rows" in text)


@pytest.mark.parametrize("name", RECIPES)
def test_page_has_every_recipe(name: str) -> None:
    model = composed(name).model
    match = CARD.search(first_comment(conf_dir() / "model" / f"{name}.yaml"))
    (row,) = [line for line in MODELS_PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert match
    for shown in (model.student.path, model.teacher.path, f"{NUMBERS[match[1]]} x {match[2]} GB"):
        assert shown in row
