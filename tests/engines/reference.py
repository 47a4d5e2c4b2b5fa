"""Tiny random models, and what transformers says of them."""

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from distill_cli.engines.settings import SamplingSettings

VOCAB_SIZE = 300  # not a multiple of 64: vLLM pads it
MAX_LEN = 320  # above two blocks of vLLM's prefix cache on a CPU
EOS = 2


def make_model(folder, *, hidden_size, seed, tied=True):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LEN,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
        initializer_range=0.1,  # far from uniform, so that a wrong position or temperature shows
    )
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    model.save_pretrained(folder)
    return model


def make_tokenizer(folder):
    """Token i reads `<i>`."""
    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(VOCAB_SIZE)}, unk_token="<0>"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"<{EOS}>").save_pretrained(folder)


def random_sequences(lengths, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def reference_logp(model, token_ids, *, temperature=1.0):
    """float32 [T - 1, V]: row i is transformers' distribution of token i + 1."""
    logits = model(torch.tensor([token_ids])).logits[0, :-1].float()
    return (logits / temperature).log_softmax(-1)


def sampled_reference_logp(model, prompt, response):
    """float32 [R]: of each response token."""
    logp_TV = reference_logp(model, prompt + response)[len(prompt) - 1 :]
    return logp_TV.gather(-1, torch.tensor(response)[:, None])[:, 0]


def ask(sampler, scorer):
    """Greedy and seeded answers, and scores: what engines of any size must agree on."""
    prompts = random_sequences([1, 5, 33, 140])
    greedy = SamplingSettings(max_new_tokens=24, temperature=0.0, ignore_eos=True)
    seeded = SamplingSettings(max_new_tokens=24, ignore_eos=True)
    samples = [sampler.sample(prompts, seeds=range(4), sampling=sampling) for sampling in (greedy, seeded)]
    scores = scorer.score(random_sequences([9, 60, 300, 17], seed=1), response_starts=[3, 20, 100, 17])
    return [sample for part in samples for sample in part], scores


def assert_answers_equal(ours, theirs):
    for sample, other in zip(ours[0], theirs[0], strict=True):
        assert sample.token_ids == other.token_ids
        torch.testing.assert_close(torch.tensor(sample.logp), torch.tensor(other.logp), atol=1e-5, rtol=0)
    for scores, other in zip(ours[1], theirs[1], strict=True):
        assert torch.equal(scores.topk_ids, other.topk_ids)
        torch.testing.assert_close(scores.topk_logp, other.topk_logp, atol=1e-5, rtol=0)
        torch.testing.assert_close(scores.sampled_logp, other.sampled_logp, atol=1e-5, rtol=0)
