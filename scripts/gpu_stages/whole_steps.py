"""Train a 1.7B student from a 4B teacher for a few whole steps, and report where the time goes.

"Outside the stages" is the time of a step that is not in sync, sample, score, pack or train: waking engines, recording,
and the rest. The teacher's engine runs eagerly: CUDA graphs and compilation take minutes and hardly speed up prefills.
"""

from __future__ import annotations

import json
import random
import statistics

from gpu_stages.command import BF16, metrics, timed
from gpu_stages.figures import Stage, StageFailed
from gpu_stages.shapes import make_pair

STAGES = ("time/sync_s", "time/sample_s", "time/score_s", "time/pack_s", "time/train_s")
SHOWN = (*STAGES, "time/wake_s", "time/record_s")


def run(stage: Stage) -> None:
    prompts, new_tokens, prompt_tokens, steps = (4, 16, 8, 3) if stage.rehearse else (64, 512, 128, 4)
    student, teacher = make_pair(stage.scratch, device=stage.device, rehearse=stage.rehearse)
    data = stage.scratch / "words.jsonl"
    words = random.Random(0)
    with data.open("w") as file:
        for _ in range(prompts * steps):
            question = " ".join(f"t{words.randrange(2, 500)}" for _ in range(prompt_tokens))
            file.write(json.dumps({"question": question}) + "\n")
    vocabulary = ("loss.topk=16",) if stage.rehearse else ()
    timed(
        stage,
        *("model=custom", f"model.student.path={student}", f"model.teacher.path={teacher}", *BF16),
        *(f"data.train.path={data}", "data.train.answer_key=null", "data.validation=null"),
        *(f"rollout.prompts_per_step={prompts}", f"rollout.max_new_tokens={new_tokens}"),
        *(f"rollout.max_sequence_length={2 * (new_tokens + prompt_tokens)}", f"train.global_batch_size={prompts}"),
        *(f"train.max_steps={steps}", "rollout.max_truncated_rate=1", "checkpoint.enabled=false"),
        *("engine.teacher.enforce_eager=true",),
        *("eval.record_samples=0", f"run.root={stage.scratch / 'runs'}", "run.name=steps", *vocabulary),
    )
    rows = [row for row in metrics(stage.scratch / "runs" / "steps") if row["step"] > 1]  # the first step warms up
    if len(rows) != steps - 1:
        raise StageFailed(f"{len(rows) + 1} steps of {steps}")
    step_s = statistics.median(row["time/step_s"] for row in rows)
    stage.record("a step", step_s, "s")
    for name in SHOWN:
        seconds = statistics.median(row.get(name, 0.0) for row in rows)
        stage.record(f"of it {name.removeprefix('time/').removesuffix('_s')}", seconds, "s")
    outside = statistics.median(1 - sum(row[name] for name in STAGES) / row["time/step_s"] for row in rows)
    stage.record("outside the stages", outside * 100, "%", at_most=5)
    stage.record("response tokens", statistics.median(row["perf/tokens_per_s"] for row in rows), "tokens/s")
    if not stage.rehearse:
        stage.record("MFU of training, by data sheet", statistics.median(row["perf/mfu"] for row in rows) * 100, "%")
        stage.record("the trainer's peak memory", max(row["perf/peak_mem_gib"] for row in rows), "GiB")
    worst = max(row["rollout/engine_mismatch"] for row in rows)
    stage.record("worst engine mismatch", worst, at_most=5e-2, wrong_if_missed=True)
