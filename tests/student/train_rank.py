"""One rank of `test_equality`: a few optimizer steps on made-up rollouts; rank 0 writes what came of them.

torchrun --nproc-per-node N train_rank.py OUT MICRO_BATCH_TOKENS ACTIVATION_CHECKPOINTING BF16
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from distill_cli.config.schema import TrainConfig
from distill_cli.losses.divergence import DistillLoss
from distill_cli.parallel.mesh import init_parallel
from distill_cli.rollout.pack import pack
from distill_cli.student import attention
from distill_cli.student.model import Student, wrap
from distill_cli.student.optimizer import build_optimizer, build_schedule, optimizer_step
from distill_cli.types import Example, Prompt, Rollout, Sample, TeacherScores

VOCAB, TOPK, NUM_SEQUENCES, NUM_STEPS = 64, 8, 7, 3


def made_up_rollout(seed: int) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    num_prompt, num_response = (int(torch.randint(1, 20, (), generator=generator)) for _ in range(2))
    ids = torch.randint(0, VOCAB, (num_prompt + num_response,), generator=generator).tolist()
    logp, top = torch.randn(num_response, VOCAB, generator=generator).mul(2).log_softmax(-1).topk(TOPK)
    return Rollout(
        Prompt(seed, ids[:num_prompt], Example("q")),
        Sample(ids[num_prompt:], [-1.0] * num_response, "stop"),
        scores=TeacherScores(top.int(), logp, logp[:, 0]),
    )


def main() -> None:
    out, micro_batch_tokens = sys.argv[1], int(sys.argv[2])
    checkpointing, bf16 = (word == "True" for word in sys.argv[3:5])
    attention.register()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, attn_implementation=attention.NAME,
    )  # fmt: skip
    parallel = init_parallel(device=torch.device("cpu"))
    student = Student(Qwen3ForCausalLM(config).train(), loss=DistillLoss(kl_type="mixed"), temperature=1.0)
    wrap(student, parallel, bf16=bf16, activation_checkpointing=checkpointing)
    settings = TrainConfig(lr=1e-2, warmup_steps=0, eps=1e-5, max_grad_norm=0.05)
    optimizer = build_optimizer(student, settings)
    schedule = build_schedule(optimizer, settings, num_steps=NUM_STEPS)
    results = []
    for step in range(NUM_STEPS):
        rollouts = [made_up_rollout(100 * step + number) for number in range(NUM_SEQUENCES)]
        batches = pack(rollouts[parallel.data_rank :: parallel.data_size], max_tokens=micro_batch_tokens)
        results.append(
            optimizer_step(
                student, optimizer, schedule, batches, topk=TOPK, max_grad_norm=0.05, parallel=parallel
            )
        )  # fmt: skip
    params = {n: p.full_tensor().detach() if isinstance(p, DTensor) else p for n, p in student.named_parameters()}
    if parallel.is_main:
        torch.save(([r.loss for r in results], [r.grad_norm for r in results], params), out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
