"""Make a pair of real language models ready for scripts/findings.py: a task with answers to check, and a student that
can begin it.

    python scripts/make_findings_pair.py PAIR OUT [--steps 80]

PAIR has student/ and teacher/, such as a small language model as teacher and half of its layers as student. The task is
to write a sentence with a given word, which a rule can check; the words are whole tokens of the tokenizer. A student
that lacks layers writes no words at all, and what it samples teaches little, so it first learns from the teacher's own
answers. OUT then has student/, teacher/ (a link), train.jsonl and held_out.jsonl, with no word in both.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from distill_cli.folders.run_dir import RunDir

WORD = re.compile("[Ġ▁][a-z]{4,9}")
"""A token that begins a word and looks like a whole one."""
NUM_HELD_OUT = 128
TEMPLATE = 'Write one short sentence with the word "{}".'
SIZES = (
    *("rollout.max_new_tokens=32", "rollout.max_sequence_length=128"),
    *("model.student.dtype=float32", "model.teacher.dtype=float32", "train.precision=fp32"),
    *("train.activation_checkpointing=none", "train.micro_batch_tokens=2048"),
)
"""Sizes and precisions that the warm-up and the cases share."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=80, help="steps of 16 answers")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    teacher = (arguments.pair / "teacher").resolve()
    write_problems(AutoTokenizer.from_pretrained(teacher).get_vocab(), arguments.out)
    (arguments.out / "teacher").symlink_to(teacher)
    with tempfile.TemporaryDirectory() as folder:
        options = (
            *("model=custom", f"model.student.path={(arguments.pair / 'student').resolve()}"),
            *(f"model.teacher.path={teacher}", *SIZES, "loss=forward"),
            *("data=jsonl", f"data.train.path={(arguments.out / 'train.jsonl').resolve()}"),
            *("rollout.on_policy_fraction=0", "rollout.off_policy=teacher", "rollout.prompts_per_step=16"),
            *(
                "train.global_batch_size=16",
                f"train.max_steps={arguments.steps}",
                "train.warmup_updates=5",
                "train.lr=5e-4",
            ),
            *("data.validation=null", "tracker=none", "checkpoint.enabled=false", f"run.root={folder}", "run.name=r"),
        )
        subprocess.run([sys.executable, "-m", "distill_cli", *options], check=True)
        shutil.move(RunDir(Path(folder) / "r").student, arguments.out / "student")


def write_problems(vocabulary: dict[str, int], out: Path) -> None:
    """Write train.jsonl and held_out.jsonl; an answer is right if it matches the row's regular expression."""
    words = sorted(token[1:] for token in vocabulary if WORD.fullmatch(token))
    random.Random(0).shuffle(words)
    for name, part in (("held_out", words[:NUM_HELD_OUT]), ("train", words[NUM_HELD_OUT:])):
        rows = ({"question": TEMPLATE.format(word), "answer": rf"(?i)\b{word}"} for word in part)
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
