"""An export loads in vLLM: its answers are the trainer's model's, token by token."""

from dataclasses import replace

import pytest
import torch

from distill_cli.checkpoint import store
from distill_cli.checkpoint.hf_export import trained
from distill_cli.checkpoint.saver import Saver, Trainable
from distill_cli.config.schema import Config
from distill_cli.config.variation import save_config
from distill_cli.engines.sampler import VllmSampler
from distill_cli.engines.settings import SamplingSettings
from distill_cli.folders.run_dir import RunDir
from distill_cli.student.safetensors_writer import write_weights

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_vllm_loads_an_export(changed_student, sampler, student_settings, tmp_path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    save_config(Config(), run.config)
    changed_student.requires_grad_(True)
    optimizer = torch.optim.AdamW(changed_student.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    saver = Saver(run, Trainable(changed_student, optimizer, schedule))
    saver.save(1, {"metrics": {}})
    saver.close()
    (checkpoint,) = store.find(run.checkpoints)
    folder = tmp_path / "export"
    folder.mkdir()
    changed_student.config.save_pretrained(folder)
    write_weights(trained(checkpoint), folder, dtype=torch.float32, max_file_bytes=100_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    sampler.sync(changed_student.named_parameters(), version=1)
    asked = ([[1, 2, 3], [4, 5, 6, 7]], {"seeds": [1, 2], "sampling": SamplingSettings(max_new_tokens=12)})
    exported = VllmSampler(replace(student_settings, path=str(folder)))
    try:
        theirs, ours = (engine.sample(asked[0], **asked[1]) for engine in (sampler, exported))
    finally:
        exported.close()
    for one, other in zip(theirs, ours, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logp == pytest.approx(other.logp, abs=1e-5)
