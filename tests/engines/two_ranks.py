"""Two ranks under torchrun: FSDP2 trains, each rank's sampler follows. Run by test_two_ranks.py: STUDENT TEACHER."""

from distill_cli.engines.process import prepare_process

prepare_process()

import os  # noqa: E402
import sys  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from distill_cli.engines.sampler import Sampler, SamplingSettings  # noqa: E402
from distill_cli.engines.scorer import Scorer  # noqa: E402
from distill_cli.engines.settings import EngineSettings  # noqa: E402
from distill_cli.errors import DistillError  # noqa: E402


def main(student_path: str, teacher_path: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    common = {"max_model_len": 64, "dtype": "float32", "kv_cache_bytes": 32 << 20}
    common["kwargs"] = {"skip_tokenizer_init": True}
    sampler = Sampler(EngineSettings(student_path, **common))
    scorer = Scorer(EngineSettings(teacher_path, **common), topk=8)
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"

    model = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    for version in (1, 2):
        prompt = [3 + rank, 4, 5]
        if rank == version - 1:  # uneven work: an engine is a rank's own
            sampler.sample([[9, 8, 7]], seeds=[0], sampling=SamplingSettings(max_new_tokens=5))
        (sample,) = sampler.sample(
            [prompt], seeds=[rank], sampling=SamplingSettings(max_new_tokens=20, ignore_eos=True)
        )
        token_ids = torch.tensor([prompt + sample.token_ids])
        logp_TV = model(token_ids).logits[0, :-1].log_softmax(-1)
        expected = logp_TV.gather(-1, token_ids[0, 1:, None])[len(prompt) - 1 :, 0].detach()
        torch.testing.assert_close(torch.tensor(sample.logp), expected, atol=1e-4, rtol=0)
        (scores,) = scorer.score(token_ids.tolist(), response_starts=[len(prompt)])
        assert scores.topk_ids.shape == (20, 8)

        (-logp_TV.gather(-1, token_ids[0, 1:, None]).mean()).backward()
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
    print(f"rank {rank} done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
