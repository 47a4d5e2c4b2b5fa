"""Measure a served teacher relative to the same teacher in this process, and what many clients do to a server.

    python scripts/bench_serve.py

The servers are a `distill serve` and a `vllm serve` of its own on loopback. All score the same batch in turns on one
machine; medians over the rounds are printed. Then clients of `distill serve` score at once: the seconds of each, and
the resident memory of the server and of its engine over time.
"""

import os

from distill_cli.engines.process_setup import prepare_process
from distill_cli.launch.local import SHORT_SPIN

os.environ.update(SHORT_SPIN)  # as the engines of a server have it
prepare_process()

import argparse  # noqa: E402
import socket  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import httpx  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from bench_score import VOCAB_SIZE, make_model  # noqa: E402
from gpu_stages.timing import alternating_seconds  # noqa: E402

from distill_cli.engines.base import Teacher  # noqa: E402
from distill_cli.engines.served import ServedTeacher  # noqa: E402
from distill_cli.engines.settings import EngineSettings  # noqa: E402
from distill_cli.engines.teacher import VllmTeacher  # noqa: E402
from distill_cli.engines.vllm_server import VllmServerTeacher  # noqa: E402

NUM_SEQUENCES, LENGTH, TOPK = 32, 256, 64
NUM_CLIENTS = 8
SAMPLE_S = 0.5
"""Seconds between two readings of the memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=8, help="calls of each of the clients at once")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        model = make_model(path, hidden_size=args.hidden_size, num_layers=args.num_layers)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"vocabulary {VOCAB_SIZE}, {num_parameters / 1e6:.1f}M parameters, {torch.get_num_threads()} threads")
        with served(path) as (address, process):
            with vllm_served(path) as vllm_address:
                compare(path, address, vllm_address, rounds=args.rounds, folder=Path(folder))
            many_clients(address, process, num_calls=args.calls)


@contextmanager
def served(path: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server; yield its address and its process, and stop it."""
    keys = "model.teacher.dtype=float32 engine.teacher.max_model_len=1023 engine.teacher.kv_cache_gib=0.25"
    command = [sys.executable, "-m", "distill_cli", "serve", f"model.teacher.path={path}", *keys.split(), "--port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = {}
        for line in process.stdout:
            name, _, rest = line.partition(" ")
            lines[name] = rest.strip()
            if name == "address":
                break
        yield lines["address"], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def vllm_served(path: Path) -> Iterator[str]:
    """Start what `vllm serve` starts; yield its address, and stop it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    keys = f"--dtype=float32 --max-model-len=1024 --max-logprobs={TOPK} --enforce-eager --host=127.0.0.1 --port={port}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={path}", *keys.split()]
    # Else it binds its threads to all cores but one, and the others are bound to none.
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # `prepare_process` set it for engines of this process
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, f"ended with status {process.returncode}: {' '.join(command)}"
            time.sleep(1.0)
            try:
                httpx.get(f"{address}/health", trust_env=False)
                break
            except httpx.TransportError:
                continue
        yield address
    finally:
        process.terminate()
        process.wait()


def compare(path: Path, address: str, vllm_address: str, *, rounds: int, folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
    settings = EngineSettings(str(path), max_model_len=1023, dtype="float32", kv_cache_bytes=256 << 20)
    teachers: dict[str, Teacher] = {
        "in this process": VllmTeacher(settings, topk=TOPK),
        "distill serve": ServedTeacher([address], topk=TOPK),
        "vllm serve": VllmServerTeacher([vllm_address], topk=TOPK),
    }
    sequences = random_sequences(seed=0)
    for starts in ([1] * NUM_SEQUENCES, [LENGTH // 2] * NUM_SEQUENCES):
        compare_scores(teachers, sequences, starts, rounds=rounds)
    for teacher in teachers.values():
        teacher.close()
    dist.destroy_process_group()


def compare_scores(teachers: dict[str, Teacher], sequences: list[list[int]], starts: list[int], *, rounds: int) -> None:
    calls = {name: partial(teacher.score, sequences, response_starts=starts) for name, teacher in teachers.items()}
    own, *others = [call() for call in calls.values()]
    pairs = [pair for other in others for pair in zip(own, other, strict=True)]
    largest = max(float((a.topk_logp - b.topk_logp).abs().max()) for a, b in pairs)
    seconds = alternating_seconds(calls, device="cpu", rounds=rounds)
    tokens = NUM_SEQUENCES * LENGTH
    print(f"score {NUM_SEQUENCES} x {LENGTH} from {starts[0]} on, k={TOPK}; largest difference {largest:.1e}")
    print("| teacher         | seconds | tokens/s | of in-process |")
    print("|-----------------|---------|----------|---------------|")
    for name, one in seconds.items():
        share = seconds["in this process"] / one
        print(f"| {name:<15} | {one:7.3f} | {tokens / one:8.0f} | {share:13.0%} |")


def many_clients(address: str, process: psutil.Process, *, num_calls: int) -> None:
    """Let clients score at once; print the median and the longest call of each, and the memory over time."""
    seconds: dict[int, list[float]] = {number: [] for number in range(NUM_CLIENTS)}
    readings, ended = [], threading.Event()

    def score(number: int) -> None:
        teacher, sequences = ServedTeacher([address], topk=TOPK), random_sequences(seed=number)
        for _ in range(num_calls):
            begin = time.perf_counter()
            teacher.score(sequences, response_starts=[1] * NUM_SEQUENCES)
            seconds[number].append(time.perf_counter() - begin)
        teacher.close()

    def read() -> None:
        while not ended.wait(SAMPLE_S):
            readings.append([one.memory_info().rss / 2**20 for one in (process, *process.children())])

    reader = threading.Thread(target=read)
    reader.start()
    clients = [threading.Thread(target=score, args=(number,)) for number in seconds]
    begin = time.perf_counter()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    wall = time.perf_counter() - begin
    ended.set()
    reader.join()
    tokens = NUM_CLIENTS * num_calls * NUM_SEQUENCES * LENGTH
    print(f"{NUM_CLIENTS} clients at once, {num_calls} calls each: {wall:.1f} s, {tokens / wall:.0f} tokens/s")
    print("| client | median s | longest s |")
    print("|--------|----------|-----------|")
    for number, own in seconds.items():
        print(f"| {number:6} | {statistics.median(own):8.2f} | {max(own):9.2f} |")
    quarters = [readings[len(readings) * part // 4] for part in range(4)] + [readings[-1]]
    for name, column in (("server", 0), ("engine", 1)):
        print(f"resident memory of the {name} over time, MiB: {', '.join(f'{one[column]:.0f}' for one in quarters)}")


def random_sequences(*, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (NUM_SEQUENCES, LENGTH), generator=generator).tolist()


if __name__ == "__main__":
    main()
