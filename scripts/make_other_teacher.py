"""Make the teacher of another family that ships with distill: it adds and subtracts like the tiny pair's teacher.

    python scripts/make_other_teacher.py [--out DIR] [--careless]

It shares nothing with the tiny pair but the problems: another tokenizer, in which a number is one token, other merges,
other special tokens, another chat template. `model=tiny_other` distills it into the tiny student
(`model.teacher.tokenizer=own`). With --careless it becomes a student that makes the tiny student's mistakes, for the
other direction (docs/cross_tokenizer.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from make_tiny_pair import (
    NUM_VALIDATION_PROBLEMS,
    OUT,
    Course,
    Recipe,
    careless_solution,
    make_model,
    measure_accuracy,
    right_solution,
    train,
    training_problems,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from distill_cli.data.sources.arithmetic import load, worked_solution

PADDING, BEGIN, USER, ASSISTANT, END = SPECIAL_TOKENS = ["<pad>", "<s>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCAB_SIZE = 700
CHAT_TEMPLATE = """\
{{- '<s>' }}
{%- for message in messages %}
    {{- '<|' + message.role + '|>' + message.content + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
WORDS = r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
"""How it splits text before merging: up to three digits together, as Llama 3's."""
RECIPE = Recipe(num_layers=4, seed=3, courses=(Course(right_solution, steps=4000, lr=3e-3),))
CARELESS = Course(careless_solution, steps=100, lr=1e-3)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which every number that occurs is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True),
        show_progress=False,
    )
    texts = [f"{example.question}\n{worked_solution(example.question)}" for example in training_problems()[:5000]]
    tokenizer.train_from_iterator([*texts, *(" ".join(map(str, range(300))) for _ in range(50))], trainer)
    assert all(len(tokenizer.encode(str(number)).ids) == 1 for number in range(300))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PADDING,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT / "other_teacher", help="folder of the model")
    parser.add_argument("--careless", action="store_true", help="the shipped model, with carries and borrows forgotten")
    arguments = parser.parse_args()
    out, shipped = arguments.out, OUT / "other_teacher"
    if arguments.careless and out == shipped:
        parser.error("--careless: give a folder of its own, --out DIR")
    torch.set_num_threads(1)  # with more, sums change their order, and the weights with them
    torch.use_deterministic_algorithms(True)
    tokenizer, problems = make_tokenizer(), training_problems()
    model = Qwen3ForCausalLM.from_pretrained(shipped) if arguments.careless else make_model(RECIPE, tokenizer)
    for course in [CARELESS] if arguments.careless else RECIPE.courses:
        train(model, course, problems, tokenizer, seed=RECIPE.seed)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    stored = Qwen3ForCausalLM.from_pretrained(out)
    held_out = load(split="validation", size=NUM_VALIDATION_PROBLEMS, seed=0)
    greedy, sampled = (measure_accuracy(stored, tokenizer, held_out, temperature=t) for t in (0.0, 1.0))
    size = f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters"
    print(f"{size}, accuracy {greedy:.3f} greedy, {sampled:.3f} sampled")


if __name__ == "__main__":
    main()
