"""Measure the engines: scoring relative to the same engine's bare prefill and to vLLM's own log-probabilities.

    python scripts/bench_score.py

All variants alternate in one process, on a random Qwen3 model; medians over the rounds are printed. Scoring returns
log-probabilities at every position, the worst case: positions of a prompt would need none.
"""

from distill_cli.engines.process_setup import prepare_process

prepare_process()

import argparse  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gpu_stages.timing import alternating_seconds  # noqa: E402
from tokenizers import Tokenizer, decoders, models  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from distill_cli.engines.engine import request_params, sampling_params  # noqa: E402
from distill_cli.engines.sampler import VllmSampler  # noqa: E402
from distill_cli.engines.settings import EngineSettings, SamplingSettings  # noqa: E402
from distill_cli.engines.teacher import VllmTeacher  # noqa: E402

VOCAB_SIZE = 1024
SHAPES = ((32, 67), (16, 259))
"""Number of sequences of a batch to score, and tokens of each."""
TOPKS = (32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        path = Path(folder) / "model"
        model = make_model(path, hidden_size=args.hidden_size, num_layers=args.num_layers)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"vocabulary {VOCAB_SIZE}, {num_parameters / 1e6:.1f}M parameters, {torch.get_num_threads()} threads")
        settings = EngineSettings(str(path), max_model_len=1023, dtype="float32", kv_cache_bytes=256 << 20)
        for topk in TOPKS:
            bench_scorer(settings, topk=topk, rounds=args.rounds)
        bench_sampler(settings, model, rounds=args.rounds)
        dist.destroy_process_group()


def make_model(path: Path, *, hidden_size: int, num_layers: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=2,
        initializer_range=0.05,
    )
    model = Qwen3ForCausalLM(config).requires_grad_(False)
    model.save_pretrained(path)
    # vLLM's own log-probabilities come with text: byte-level, as in Qwen's tokenizer.
    tokenizer = Tokenizer(models.BPE(vocab={f"t{i:x}": i for i in range(VOCAB_SIZE)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t2").save_pretrained(path)
    return model


def bench_scorer(settings: EngineSettings, *, topk: int, rounds: int) -> None:
    scorer = VllmTeacher(settings, topk=topk)
    for num_sequences, length in SHAPES:
        sequences = torch.randint(3, VOCAB_SIZE, (num_sequences, length)).tolist()
        seconds = alternating_seconds(scoring_calls(scorer, sequences, topk=topk), device="cpu", rounds=rounds)
        bare, stock, ours = seconds["bare"], seconds["stock"], seconds["ours"]
        print(
            f"score {num_sequences} x {length}, k={topk}: bare {bare:.3f} s, stock {stock:.3f} s, ours {ours:.3f} s"
            f" = {bare / ours:.0%} of the prefill's throughput, {stock / ours:.1f} x stock;"
            f" hidden states {seconds['hidden']:.3f} s = {bare / seconds['hidden']:.0%} of the prefill's",
            flush=True,
        )
    scorer.close()


def scoring_calls(scorer: VllmTeacher, sequences: list[list[int]], *, topk: int) -> dict[str, Callable[[], object]]:
    from vllm import SamplingParams

    num_sequences, generate = len(sequences), scorer.generate
    bare = [request_params(max_tokens=1, temperature=0.0, detokenize=False)] * num_sequences
    stock = [SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=topk)] * num_sequences
    return {
        "bare": lambda: generate(sequences, bare),
        "stock": lambda: generate(sequences, stock),
        "ours": lambda: scorer.score(sequences, response_starts=[1] * num_sequences),
        "hidden": lambda: scorer.score(sequences, response_starts=[1] * num_sequences, hidden=True),
    }


def bench_sampler(settings: EngineSettings, model: Qwen3ForCausalLM, *, rounds: int) -> None:
    sampler = VllmSampler(settings)
    sampling = SamplingSettings(max_new_tokens=64, ignore_eos=True)
    prompts = torch.randint(3, VOCAB_SIZE, (32, 8)).tolist()
    bare = [sampling_params(sampling, seed=seed, max_tokens=64) for seed in range(32)]
    for params in bare:
        params.logprobs = None
    seconds = alternating_seconds(
        {
            "bare": lambda: sampler.generate(prompts, bare),
            "ours": lambda: sampler.sample(prompts, seeds=range(32), sampling=sampling),
            "sync": lambda: sampler.sync(model.named_parameters(), version=0),
        },
        device="cpu",
        rounds=rounds,
    )
    bare, ours = seconds["bare"], seconds["ours"]
    print(
        f"sample 32 x 64: {32 * 64 / bare:.0f} tokens/s bare, {32 * 64 / ours:.0f} tokens/s with log-probabilities"
        f" = {bare / ours:.0%}"
    )
    print(f"sync: {seconds['sync']:.3f} s")
    sampler.close()


if __name__ == "__main__":
    main()
