"""Run one job with TRL's DistillationTrainer, for `bench_vs_trl.py`; needs TRL's environment alone, not distill's.

    TRL/bin/python scripts/bench_trl_side.py job.json

The job is an object: `pair` (folder with student and teacher), `prompts` and `held_out` (questions), `steps`, `batch`,
`max_new_tokens`, `max_length` (prompt and answer), `lr`, `schedule`, `warmup`, `betas`, `weight_decay`, `seed`,
`eval_period` (0 is never), `vllm` (null, `eager` or `compiled`) and `out`, a file that gets one line per step. Its keys
are those of a run's metrics.jsonl, with the texts of held-out answers in `answers`. The time of a line is after its
evaluation, which no step's seconds contain.

A step's stages: *sync* copies weights into vLLM, *sample* is `generate`, *score* the teacher's layers, and *train* all
the rest: the student's forward and backward pass, both heads with the loss, and the optimizer.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

ON_GPU = torch.cuda.is_available()
VLLM_MEMORY = 0.1
"""Share of the memory for TRL's engine: a few GiB hold all sequences of a step."""


class StagedTrainer(DistillationTrainer):
    """TRL's trainer, which also measures the stages of a step."""

    seconds: Counter[str]
    num_tokens = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        if self.use_vllm:  # the method itself would do it, and then finds that it is done
            with self.stage("sync"):
                self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        with self.stage("sample"):
            answers = super()._generate_single_turn(*args, **kwargs)
        self.num_tokens = sum(map(len, answers))
        return answers

    def _get_last_hidden_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super()._get_last_hidden_state(*args, **kwargs)
        with self.stage("score"):  # the teacher's
            return super()._get_last_hidden_state(*args, **kwargs)


class Recorder(TrainerCallback):
    """Write a line per step."""

    def __init__(self, job: SimpleNamespace, tokenizer: Any) -> None:
        self.job, self.tokenizer = job, tokenizer
        self.file = open(job.out, "w")  # noqa: SIM115  # open until the process ends
        self.trainer: StagedTrainer

    def write(self, step: int, *, evaluate: bool, **row: Any) -> None:
        answers = {"answers": self.answer()} if evaluate else {}
        self.file.write(json.dumps({"step": step, "time": time.time(), **row, **answers}) + "\n")
        self.file.flush()

    def answer(self) -> list[str]:
        """Return the student's greedy answers to the held-out questions."""
        messages = [[{"role": "user", "content": question}] for question in self.job.held_out]
        texts = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        model, most = self.trainer.model, self.job.max_new_tokens
        if self.job.vllm:
            from vllm import SamplingParams

            inputs = [{"prompt_token_ids": ids} for ids in self.tokenizer(texts, add_special_tokens=False).input_ids]
            engine = self.trainer.vllm_generation
            engine.sync_weights()
            greedy = SamplingParams(temperature=0, max_tokens=most)
            outputs = [output.outputs[0] for output in engine.llm.generate(inputs, greedy, use_tqdm=False)]
            return self.tokenizer.batch_decode([output.token_ids for output in outputs], skip_special_tokens=True)
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        model.eval()
        with torch.no_grad():
            ids = model.generate(**batch, max_new_tokens=most, do_sample=False)[:, batch.input_ids.shape[1] :]
        model.train()
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.write(0, evaluate=self.job.eval_period > 0, threads=torch.get_num_threads())

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.seconds = Counter()
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
        step_s, seconds, period = time.perf_counter() - self.begin, self.trainer.seconds, self.job.eval_period
        stages = {**seconds, "train": step_s - sum(seconds.values()), "step": step_s}
        row = {f"time/{name}_s": value for name, value in stages.items()}
        is_due = period > 0 and (state.global_step % period == 0 or state.global_step == state.max_steps)
        self.write(state.global_step, evaluate=is_due, **row, **{"train/response_tokens": self.trainer.num_tokens})


def prepare_vllm(*, eager: bool) -> None:
    """Let TRL's engine compute in float32, and on a CPU keep its weights as they are.

    TRL passes no dtype, and vLLM's choice for a model in float32 is a 16-bit type. On CPUs vLLM packs the weights of
    linear layers that oneDNN can multiply (float32 always) and drops the originals; TRL's `sync_weights` then fails
    (`'Parameter' object has no attribute 'weight_loader'`), and a tied head would keep its packed old copy silently.
    Without oneDNN vLLM multiplies by `torch.nn.functional.linear`.
    """
    import trl.generation.vllm_generation as generation

    generation.LLM = functools.partial(generation.LLM, dtype="float32", enforce_eager=eager)
    if not ON_GPU:
        import vllm._custom_ops as ops

        ops._supports_onednn = False


def main() -> None:
    with open(sys.argv[1]) as file:
        job = SimpleNamespace(**json.load(file))
    if job.vllm:
        prepare_vllm(eager=job.vllm == "eager")
    tokenizer = AutoTokenizer.from_pretrained(f"{job.pair}/student", padding_side="left")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(f"{job.pair}/{role}", dtype=torch.float32)
        for role in ("student", "teacher")
    )
    config = DistillationConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=job.batch,
        max_steps=job.steps,
        learning_rate=job.lr,
        lr_scheduler_type=job.schedule,
        warmup_steps=job.warmup,
        adam_beta1=job.betas[0],
        adam_beta2=job.betas[1],
        weight_decay=job.weight_decay,
        max_completion_length=job.max_new_tokens,
        beta=0.5,
        seed=job.seed,
        bf16=False,
        use_cpu=not ON_GPU,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_vllm=job.vllm is not None,
        vllm_max_model_length=job.max_length,
        vllm_gpu_memory_utilization=VLLM_MEMORY,
    )
    recorder = Recorder(job, tokenizer)
    recorder.trainer = StagedTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": one}]} for one in job.prompts]),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    recorder.trainer.train()


if __name__ == "__main__":
    main()
