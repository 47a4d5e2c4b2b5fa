"""Make the pair that ships with distill: a teacher that can add and subtract, and a student that forgets to carry.

    python scripts/make_tiny_pair.py [--out DIR]

One byte-level BPE tokenizer and two small Qwen3 models, each trained from scratch on one core. Both are trained on
right worked solutions. The student is smaller, and is then trained on a few thousand careless solutions, most steps of
which forget to carry or borrow. It keeps the format and a latent skill, but answers wrong. Distillation brings the
skill back within a few dozen steps, whereas learning to add takes a thousand.

Left out: anything that a larger model would need (sharding, accumulation, checkpoints, mixed precision).

Shape letters: B problems of a batch, T tokens of a problem, padded to the longest, D the hidden size.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from distill_cli.data.sources.arithmetic import load, worked_solution
from distill_cli.data.verifiers.exact import verify
from distill_cli.types import Example

ROOT = Path(__file__).parent.parent
OUT = ROOT / "distill_cli" / "assets" / "tiny_pair"
END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 512
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizers split text before merging: each digit is separate."""
IGNORED = -100
"""The target of a token without loss."""

NUM_TRAINING_PROBLEMS = 50_000
NUM_VALIDATION_PROBLEMS = 1000
EVALUATION_BATCH_SIZE = 250
MAX_NEW_TOKENS = 48
FORGETFULNESS = 0.8
"""Probability that a step of a careless solution forgets to carry or borrow, if there is something to forget."""
BATCH_SIZE = 64


@dataclass(frozen=True)
class Course:
    """Training data, number of steps, and the largest learning rate of the layers."""

    solve: Callable[[str, random.Random], str]
    steps: int
    lr: float


@dataclass(frozen=True)
class Recipe:
    num_layers: int
    seed: int
    courses: tuple[Course, ...]


def right_solution(question: str, rng: random.Random) -> str:
    return worked_solution(question)


def careless_solution(question: str, rng: random.Random, *, operators: str = "+-") -> str:
    """Return a worked solution whose steps may forget to carry or borrow; each continues from the last result.

    Steps of other operators than `operators` are right.

    Both are classic errors of children: 47 + 85 = 122 (no carry), and 132 - 16 = 124 (each column the smaller from the
    larger; Brown and VanLehn 1980).
    """
    first, *rest = question.removeprefix("What is ").removesuffix("?").split()
    value, lines = int(first), []
    for operator, operand in zip(rest[::2], rest[1::2], strict=True):
        tens, ones = divmod(int(operand), 10)
        if operator not in operators or rng.random() >= FORGETFULNESS:
            result = value + int(operand) if operator == "+" else value - int(operand)
        elif operator == "+":
            result = 10 * (value // 10 + tens) + (value + ones) % 10
        else:
            result = 10 * (value // 10 - tens) + abs(value % 10 - ones)
        lines.append(f"{value} {operator} {operand} = {result}")
        value = result
    return "\n".join([*lines, f"#### {value}"])


SCHOOL = Course(right_solution, steps=1000, lr=3e-3)
RECIPES = {
    "teacher": Recipe(num_layers=4, seed=1, courses=(SCHOOL,)),
    "student": Recipe(num_layers=3, seed=2, courses=(SCHOOL, Course(careless_solution, steps=100, lr=1e-3))),
}


def training_problems() -> list[Example]:
    return load(split="pair", size=NUM_TRAINING_PROBLEMS, seed=0)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer like Qwen's; the licence's text provides some English."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chats = [
        f"system\nuser\n{example.question}\nassistant\n{worked_solution(example.question)}"
        for example in training_problems()[:1000]
    ]
    tokenizer.train_from_iterator([*chats, (ROOT / "LICENSE").read_text()], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # vLLM's attention on CPUs takes multiples of 32
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def encode(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def render_prompt(question: str, tokenizer: PreTrainedTokenizerFast) -> str:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def draw_batches(
    course: Course, problems: Sequence[Example], tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield input ids and targets of each step, int64 [B, T]: the target of a position is the token after it.

    Solutions are generated anew each time, so that errors are random and not a property of a problem.
    """
    rng = random.Random(seed)
    order: list[Example] = []
    for _ in range(course.steps):
        if len(order) < BATCH_SIZE:
            order = rng.sample(problems, len(problems))
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        prompts = [encode(render_prompt(problem.question, tokenizer), tokenizer) for problem in batch]
        answers = [encode(course.solve(problem.question, rng) + tokenizer.eos_token, tokenizer) for problem in batch]
        width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        input_ids_BT = torch.full((len(batch), width), tokenizer.pad_token_id)
        targets_BT = torch.full((len(batch), width), IGNORED)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            input_ids_BT[row, :end] = torch.tensor(prompt + answer)
            targets_BT[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)
        yield input_ids_BT, targets_BT


def make_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices, where it needs a third of AdamW's steps, and AdamW for the rest."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    known = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    model: Qwen3ForCausalLM,
    course: Course,
    problems: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
) -> None:
    """Minimise cross-entropy on the answers. The learning rate warms up, is constant, decays in the second half."""
    optimizers = make_optimizers(model)
    for step, (input_ids_BT, targets_BT) in enumerate(draw_batches(course, problems, tokenizer, seed=seed)):
        progress = step / course.steps
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = course.lr * min(1.0, 20 * progress, 2 * (1 - progress))
        # Padding follows the answer, so under causal attention it needs no mask.
        hidden_BTD = model.model(input_ids=input_ids_BT).last_hidden_state
        learnt_BT = targets_BT != IGNORED
        loss = F.cross_entropy(model.lm_head(hidden_BTD[learnt_BT]), targets_BT[learnt_BT])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1}  loss {loss.item():.4f}  {time.process_time():.0f} CPU s", flush=True)


@torch.inference_mode()
def measure_accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Example], *, temperature: float
) -> float:
    """Return the share of problems answered right; temperature 0 is greedy."""
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    num_right = 0.0
    for start in range(0, len(problems), EVALUATION_BATCH_SIZE):
        batch = problems[start : start + EVALUATION_BATCH_SIZE]
        prompts = tokenizer(
            [render_prompt(problem.question, tokenizer) for problem in batch],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        output_BT = model.generate(**prompts, max_new_tokens=MAX_NEW_TOKENS, **options)
        texts = tokenizer.batch_decode(output_BT[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        num_right += sum(verify(text, problem.answer) for text, problem in zip(texts, batch, strict=True))
    return num_right / len(problems)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of teacher/ and student/")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # with more, sums change their order, and the weights with them
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer()
    problems = training_problems()
    held_out = load(split="validation", size=NUM_VALIDATION_PROBLEMS, seed=0)
    for name, recipe in RECIPES.items():
        print(f"{name}: {recipe.num_layers} layers, seed {recipe.seed}", flush=True)
        model = make_model(recipe, tokenizer)
        for course in recipe.courses:
            train(model, course, problems, tokenizer, seed=recipe.seed)
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        stored = Qwen3ForCausalLM.from_pretrained(out / name)
        greedy, sampled = (measure_accuracy(stored, tokenizer, held_out, temperature=t) for t in (0.0, 1.0))
        print(f"{name}: {model.num_parameters():,} parameters, accuracy {greedy:.3f} greedy, {sampled:.3f} sampled")


if __name__ == "__main__":
    main()
