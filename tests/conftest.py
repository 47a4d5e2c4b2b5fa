"""What several test folders share: small model folders made on the spot."""

import json
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from zlib import crc32

# xdist workers share the cores: with more threads than cores a run takes several times as long. Set before torch is
# imported; child processes inherit it.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))

import pytest
import torch
from safetensors.torch import save_file


def pytest_addoption(parser: pytest.Parser) -> None:
    shares = "K/N: run the K-th of N shares of the tests marked exhaustive too; all: run all of them"
    parser.addoption("--exhaustive", metavar="SHARE", help=f"{shares}; by default those of the files that are named")


def pytest_configure(config: pytest.Config) -> None:
    """Settle the order, the meaning of Ctrl-C, and which exhaustive tests run."""
    if hasattr(config.option, "loadscopereorder"):  # xdist would start files with many tests first: long ones have few
        config.option.loadscopereorder = False
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background; what the tests start would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.exhaustive is None:  # xdist's workers get what is decided here
        is_named = config.args_source is pytest.Config.ArgsSource.ARGS
        config.option.exhaustive = "all" if is_named else "0/1"
    if config.option.exhaustive != "all":
        shares(config.option.exhaustive)


def shares(share: str) -> tuple[int, int]:
    """Return K and N of K/N."""
    if not re.fullmatch(r"\d+/[1-9]\d*", share):
        raise pytest.UsageError(f"--exhaustive={share}: must be all or K/N, such as 2/8")
    part, parts = share.split("/")
    return int(part), int(parts)


def runs(item: pytest.Item, share: str) -> bool:
    """Whether a test is in this share of the exhaustive tests, or not one. A file marked as a whole stays together."""
    if share == "all" or item.get_closest_marker("exhaustive") is None:
        return True
    is_alone = any(mark.name == "exhaustive" for mark in item.own_markers)
    name = item.nodeid.partition("[" if is_alone else "::")[0]
    part, parts = shares(share)
    return crc32(name.encode()) % parts == part - 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave exhaustive tests out; start long files first: Slurm's, which mostly wait, then others with slow tests."""
    left_out = [item for item in items if not runs(item, config.option.exhaustive)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != "test_slurm.py", item.path not in slow))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With --durations, also print the files that took longest, their fixtures included."""
    if not terminalreporter.config.option.durations:
        return
    seconds: Counter[str] = Counter()
    for report in chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("slowest files")
    for file, total in seconds.most_common(40):
        terminalreporter.write_line(f"{total:7.0f}s {file}")


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder that looks like a model to everything that only reads configs and vocabularies."""

    def make(name: str, *, vocab: dict[str, int] | None = None, vocab_size: int = 8, **config: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        vocab = vocab if vocab is not None else {f"t{i}": i for i in range(vocab_size)}
        content = {"model_type": "llama", "vocab_size": vocab_size, "eos_token_id": 0, **config}
        (folder / "config.json").write_text(json.dumps(content))
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
        save_file({"w": torch.zeros(3, 4)}, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 800 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounts nothing here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def shared_memory_left() -> set[str]:
    """Shared memory that no process has: what was left behind. Others' may come and go meanwhile."""
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended
            mapped += maps.read_text()
    names = {name for name in os.listdir("/dev/shm") if f"/dev/shm/{name}" not in mapped}
    return {name for name in names if not name.startswith("sem.loky-")}  # scikit-learn's, which come with MLflow
