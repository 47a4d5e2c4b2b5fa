"""Measure the memory of an export, of a checkpoint that four ranks wrote of a student with random weights.

    python scripts/bench_export.py --layers 12 --hidden 768         # 193 million parameters

Four ranks on this machine's CPU save a checkpoint with its optimizer state; another process exports it. Its anonymous
memory is measured (RssAnon of /proc/self/status): the kernel can free pages of the checkpoint's files at any time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 12), ("hidden", 768), ("vocab", 151_936), ("ranks", 4)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--max-shard-size", default="5GB")
    given = arguments.parse_args()
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [processes.Process(target=save, args=(rank, given, folder)) for rank in range(given.ranks)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        exporter = processes.Process(target=export, args=(Path(folder), given.max_shard_size))
        exporter.start()
        exporter.join()


def save(rank: int, given: argparse.Namespace, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(given.ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": "29517", "LOCAL_RANK": str(rank)}
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    from distill_cli.checkpoint.saver import Saver, Trainable, start_moments
    from distill_cli.config.schema import Config
    from distill_cli.config.variation import save_config
    from distill_cli.folders.run_dir import RunDir
    from distill_cli.parallel.mesh import init_parallel

    init_parallel(device=torch.device("cpu"))
    run = RunDir(Path(folder))
    if rank == 0:
        save_config(Config(), run.config)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=given.vocab, hidden_size=given.hidden, intermediate_size=given.hidden * 4,
        num_hidden_layers=given.layers, num_attention_heads=given.hidden // 64, num_key_value_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = fully_shard(AutoModelForCausalLM.from_config(config))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
    optimizer = torch.optim.AdamW(model.parameters())
    trainable = Trainable(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    start_moments(trainable, num_updates=1)
    saver = Saver(run, trainable)
    saver.save(1, {"metrics": {}})
    saver.close()
    dist.destroy_process_group()


def export(folder: Path, max_shard_size: str) -> None:
    import torch

    from distill_cli.checkpoint import store
    from distill_cli.checkpoint.hf_export import trained
    from distill_cli.student.safetensors_writer import write_weights
    from distill_cli.verbs.export import parse_size

    (checkpoint,) = store.find(folder / "checkpoints")
    out = folder / "export"
    out.mkdir()
    before, peak, ended = anonymous_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    write_weights(trained(checkpoint), out, dtype=torch.bfloat16, max_file_bytes=parse_size(max_shard_size))
    seconds = time.perf_counter() - begin
    ended.set()
    watcher.join()
    files = list(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 2**20
    of = sum(file.stat().st_size for file in checkpoint.path.iterdir()) / 2**20
    print(
        f"a checkpoint of {of:.0f} MiB, exported as {size:.0f} MiB in {len(files)} files: {seconds:.1f} s, "
        f"{peak - before:.0f} MiB of memory in addition to {before:.0f} MiB of the imports"
    )


def anonymous_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon: not Linux")


if __name__ == "__main__":
    main()
