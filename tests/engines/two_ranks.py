"""Two ranks under torchrun whose engines are cut over them. Run by test_two_ranks.py.

Arguments: STUDENT TEACHER EXPECTED, and how many ranks share a sampler and a scorer. EXPECTED holds what engines of one
rank answered.
"""

from distill_cli.engines.process_setup import prepare_process

prepare_process()

import os  # noqa: E402
import sys  # noqa: E402
import weakref  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from distill_cli.engines import sampler as sampler_module  # noqa: E402
from distill_cli.engines.companion import CompanionTeacher, needs_companion  # noqa: E402
from distill_cli.engines.sampler import VllmSampler  # noqa: E402
from distill_cli.engines.settings import EngineSettings, SamplingSettings  # noqa: E402
from distill_cli.engines.teacher import VllmTeacher  # noqa: E402
from distill_cli.engines.weight_sync import full_tensors  # noqa: E402
from distill_cli.errors import DistillError  # noqa: E402
from tests.engines.reference import ask, assert_answers_equal  # noqa: E402


class Gathered:
    """Watches over full parameters: how many elements live at once."""

    def __init__(self) -> None:
        self.live = self.most = 0

    def watch(self, weights, **kwargs):
        for name, tensor in full_tensors(weights, **kwargs):
            self.live += tensor.numel()
            self.most = max(self.most, self.live)
            weakref.finalize(tensor, self.forget, tensor.numel())
            yield name, tensor
            del tensor

    def forget(self, numel: int) -> None:
        self.live -= numel


def main(student_path: str, teacher_path: str, expected_path: str, sampler_ranks: str, scorer_ranks: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    expected = torch.load(expected_path, weights_only=False)
    common = {"max_model_len": 320, "dtype": "float32", "kv_cache_bytes": 32 << 20}
    common["kwargs"] = {"skip_tokenizer_init": True}
    student = EngineSettings(student_path, tensor_parallel=int(sampler_ranks), **common)
    teacher = EngineSettings(teacher_path, tensor_parallel=int(scorer_ranks), **common)
    scorer = (CompanionTeacher if needs_companion(student, teacher, on_gpu=False) else VllmTeacher)(teacher, topk=16)
    sampler = VllmSampler(student)
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"
    if scorer.num_ranks == 1 and rank == 0:  # uneven work: an engine of one rank is its own
        scorer.score([[9, 8, 7]], response_starts=[1])
    assert_answers_equal(ask(sampler, scorer), expected)

    model = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gathered = Gathered()
    sampler_module.full_tensors = gathered.watch

    for version in (1, 2):
        prompt, seed = ([3, 4, 5], 7) if sampler.num_ranks == 2 else ([3 + rank, 4, 5], rank)
        (sample,) = sampler.sample(
            [prompt], seeds=[seed], sampling=SamplingSettings(max_new_tokens=20, ignore_eos=True)
        )
        token_ids = torch.tensor([prompt + sample.token_ids])
        logp_TV = model(token_ids).logits[0, :-1].log_softmax(-1)
        logp_R = logp_TV.gather(-1, token_ids[0, 1:, None])[len(prompt) - 1 :, 0]
        torch.testing.assert_close(torch.tensor(sample.logp), logp_R.detach(), atol=1e-5, rtol=0)

        (-logp_R.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        try:
            sampler.sync([("model.wrong", torch.zeros(1))], version=version)
        except DistillError:
            sampler.sync(model.named_parameters(), version=version)

    scorer.close()
    sampler.close()
    dist.barrier()
    dist.destroy_process_group()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    # One full parameter at a time leaves us; vLLM keeps those that it joins to one matrix until it has them all, and a
    # vocabulary that it pads until the end.
    joined = 2 * sizes["model.layers.0.mlp.up_proj.weight"] + sizes["model.norm.weight"]
    vocabulary = sum(numel for name, numel in sizes.items() if "embed_tokens" in name or "lm_head" in name)
    assert 0 < gathered.most <= joined + vocabulary < sum(sizes.values()) / 2, gathered.most
    print(f"rank {rank} done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
