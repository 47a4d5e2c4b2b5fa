"""The pair that ships with distill is what its README says: measured, not recorded."""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from distill_cli.data.sources.arithmetic import load, worked_solution
from distill_cli.data.verifiers.exact import verify
from distill_cli.models.model_files import locate, vocab_size, vocabulary

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "make_tiny_pair.py"))
NAMES = ["teacher", "student"]
FOLDERS = {name: locate(f"package://tiny_pair/{name}", key="model") for name in NAMES}
PROMPT = "<|im_start|>user\nWhat is 47 + 85 - 16?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDERS[name], local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDERS[name], local_files_only=True)


def test_the_folders_are_complete_and_small() -> None:
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for folder in FOLDERS.values():
        assert {file.name for file in folder.iterdir()} == files | {"chat_template.jinja"}
    pair = FOLDERS["teacher"].parent
    assert (pair / "README.md").is_file()
    assert sum(file.stat().st_size for file in pair.rglob("*") if file.is_file()) < 8 * 2**20


def test_both_share_vocabulary_and_template() -> None:
    teacher, student = FOLDERS["teacher"], FOLDERS["student"]
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (teacher / file).read_bytes() == (student / file).read_bytes(), file
    assert sorted(vocabulary(teacher).values()) == list(range(512))


def test_the_model_is_tied_float32_qwen3(name: str, model: Qwen3ForCausalLM) -> None:
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.config.vocab_size == vocab_size(FOLDERS[name]) == 512
    assert model.config.head_dim % 32 == 0, "what vLLM's attention on CPUs takes"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(FOLDERS[name] / "model.safetensors", "pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118
        assert {stored.get_tensor(key).dtype for key in stored.keys()} == {torch.float32}  # noqa: SIM118


def test_ends_and_padding_agree(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    for config in (model.config, model.generation_config, tokenizer):
        assert (config.pad_token_id, config.eos_token_id) == (0, 2)
        assert config.bos_token_id is None


def test_the_chat_template_renders(tokenizer: PreTrainedTokenizerBase) -> None:
    user = {"role": "user", "content": "What is 47 + 85 - 16?"}
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == PROMPT
    chat = [{"role": "system", "content": "Be right."}, user, {"role": "assistant", "content": "#### 116"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>system\nBe right.<|im_end|>\n"
        "<|im_start|>user\nWhat is 47 + 85 - 16?<|im_end|>\n"
        "<|im_start|>assistant\n#### 116<|im_end|>\n"
    )


@pytest.mark.parametrize(
    "text", [PROMPT, "47 + 85 = 132\n#### 116", "Ünïcödé 数学 🦜\t\r\n  two  spaces ", "it's 1,234.5"]
)
def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    digits = "10203948576"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(digits, add_special_tokens=False)) == list(digits)


def test_validation_problems_were_not_trained_on() -> None:
    seen = {problem.question for problem in SCRIPT["training_problems"]()}
    for split in ("train", "validation"):
        assert not seen & {problem.question for problem in load(split=split, size=20_000, seed=0)}


class Coin:
    """A random number generator that always says the same."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


@pytest.mark.parametrize(
    ("question", "careless"),
    [
        ("What is 47 + 85 - 16?", "47 + 85 = 122\n122 - 16 = 114\n#### 114"),
        ("What is 42 - 17 + 11?", "42 - 17 = 35\n35 + 11 = 46\n#### 46"),
        ("What is 99 + 99 + 99?", "99 + 99 = 188\n188 + 99 = 277\n#### 277"),
        ("What is 44 + 33 - 12?", "44 + 33 = 77\n77 - 12 = 65\n#### 65"),
    ],
)
def test_careless_solutions_forget_carries(question: str, careless: str) -> None:
    assert SCRIPT["careless_solution"](question, Coin(0.0)) == careless
    assert SCRIPT["careless_solution"](question, Coin(1.0)) == worked_solution(question)


@torch.inference_mode()
def test_only_the_teacher_is_right(name: str, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    problems = load(split="validation", size=128, seed=0)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}], tokenize=False, add_generation_prompt=True
        )
        for problem in problems
    ]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    output = model.generate(**prompts, max_new_tokens=48, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(output, skip_special_tokens=True)
    accuracy = sum(verify(a, problem.answer) for a, problem in zip(answers, problems, strict=True)) / len(problems)
    assert all("####" in answer for answer in answers), "both know the format"
    assert accuracy >= 0.95 if name == "teacher" else 0.1 < accuracy < 0.5
