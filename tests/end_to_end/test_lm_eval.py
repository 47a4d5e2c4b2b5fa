"""lm-evaluation-harness on a student that was trained here, through its own command and on a task of one file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill_cli.data.sources import arithmetic
from tests.end_to_end.conftest import Finished

TASK = """
task: worked_arithmetic
dataset_path: json
dataset_kwargs:
  data_files: {test: problems.jsonl}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 64, do_sample: false}
filter_list:
  - name: final
    filter:
      - {function: regex, regex_pattern: "#### (-?[0-9]+)"}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_accuracy_equals_the_run_s(one_rank: Finished, tmp_path: Path) -> None:
    """The run validated its last step greedily on these 40 problems."""
    problems = arithmetic.load(split="validation", size=40, seed=0)
    rows = [json.dumps({"question": problem.question, "answer": problem.answer}) for problem in problems]
    (tmp_path / "problems.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/worked_arithmetic.yaml").write_text(TASK)
    command = [
        *(Path(sys.executable).with_name("lm_eval"), "run", "--model", "hf", "--device", "cpu", "--batch_size", "40"),
        *("--model_args", f"pretrained={one_rank.run.student},dtype=float32", "--apply_chat_template"),
        *("--tasks", "worked_arithmetic", "--include_path", "tasks", "--output_path", "out"),
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("out/*/results_*.json")
    found = json.loads(file.read_text())["results"]["worked_arithmetic"]["exact_match,final"]
    after = json.loads(one_rank.run.outcome.read_text())["after"]["accuracy"]
    assert found == pytest.approx(after, abs=1 / 40)  # transformers may round a near tie the other way
