"""Tiny random models, and what transformers says of them."""

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

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
