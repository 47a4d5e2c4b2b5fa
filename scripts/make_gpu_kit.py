#!/usr/bin/env python3
"""Make a kit for a GPU node without package access: vLLM, what it needs and what distill needs, in one small archive.

    python scripts/make_gpu_kit.py --out gpu-kit      # needs package access, the standard library and pip
    sh gpu-kit/unpack.sh [PIECES [TARGET]]            # on the node; default: the folder of unpack.sh, /opt/kit
    export PYTHONPATH=/opt/kit:CHECKOUT

The node already has torch, transformers and other packages (docs/gpu.md lists them). The missing packages are
downloaded with pip, cut to what dense decoders in bfloat16 or float32 need on one GPU architecture, packed and split.
`unpack.sh` checks SHA-256 sums; `try_gpu_kit.py`, which is part of the kit, then tries the kernels on the GPU.

Why vLLM's 600 MB become small: a CUDA library holds each kernel once per architecture, in containers. Entries that the
target GPU cannot run are removed from their container, as if the library had been built for that GPU alone. Their space
is filled with zeros, which compress to nothing; so are symbol tables, which only debuggers read. Everything outside the
containers keeps its place. `cuobjdump --extract-elf` reads the same code from the cut library as from the uncut one.
`--originals` also packs the uncut library, 54 MB, as `original.*`: a fallback, see `try_gpu_kit.py`. `unpack.sh`
unpacks all pieces in its folder.

Left out of the kit: mixture-of-experts tuning files, FlashAttention 2 and 4, DeepGEMM, the Rust server, constrained
decoding, mlflow (run with tracker=none), vl-convert (reports without pictures) and cryptography (a served teacher's
own certificate, which only Slurm jobs of teachers make).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

VLLM = "vllm==0.25.1"
"""The release that was built against torch 2.11.0. Another torch needs another release: `--vllm`."""

PACKAGES = (
    # vLLM imports these when `vllm.LLM` is imported or an engine is built.
    *("cachetools==7.3.3", "cbor2==6.3.0", "distro==1.9.0", "fastapi==0.136.3", "jiter==0.19.0", "llguidance==1.7.6"),
    *(
        "msgspec==0.22.0",
        "openai==2.54.0",
        "openai-harmony==0.0.8",
        "partial-json-parser",
        "pybase64==1.5.1",
        "pyzmq==27.3.0",
    ),
    *(
        "annotated-types==0.8.0",
        "pydantic==2.14.4",
        "pydantic-core==2.50.5",
        "typing-inspection==0.4.5",
        "sniffio==1.3.1",
    ),
    *("prometheus-fastapi-instrumentator", "starlette==1.10.0"),
    # `distill serve`.
    *("click==8.5.1", "h11==0.16.0", "uvicorn==0.54.0"),
    # The project.
    *("antlr4-python3-runtime==4.9.3", "datasets==5.2.0", "dill==0.4.1", "hydra-core==1.3.8", "multiprocess==0.70.19"),
    *(
        "latex2sympy2-extended==1.11.0",
        "math-verify==0.9.0",
        "nvidia-ml-py==13.615.71",
        "omegaconf==2.3.1",
        "submitit==1.5.4",
    ),
)
"""Downloaded without their dependencies, which are in this list, on the node already, or unused."""

SOURCE_ONLY = ("antlr4-python3-runtime",)
"""Published as source alone: pip builds a wheel of plain Python here."""

STUBS = {
    "xgrammar": "constrained decoding, whose classes vLLM names in annotations alone.",
}
"""Packages that vLLM imports but that no run here uses: replaced by a module whose every name is an empty class."""

STUB = '''"""A stand-in for a package that the kit leaves out: {why}"""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(self, *args, **kwargs):
        raise ImportError("{name} is a stand-in in this kit")

    return type(name, (), {{"__init__": refuse}})
'''

REPLACED = {
    "vllm/model_executor/warmup/minimax_m3_msa_warmup.py": '"""One model\'s warm-up, which needs torchvision."""\n\n\n'
    "def minimax_m3_msa_warmup(worker):\n    return None\n",
}
"""Replacements for vLLM files that every engine imports."""

LEFT_OUT = (
    r"vllm/vllm-rs$",  # the server in Rust
    r"vllm/vllm_flash_attn/_vllm_fa2_C\.",  # Hopper uses FlashAttention 3; vLLM catches the failed import
    r"vllm/vllm_flash_attn/cute/",  # FlashAttention 4, which needs cutlass-dsl
    r"vllm/_flashmla",  # MLA models; vLLM catches the failed import
    r"vllm/_qutlass_C\.",  # Blackwell; vLLM suppresses the failed import
    r"vllm/third_party/(deep_gemm|fmha_sm100|flashmla|flash_linear_attention_cute)/",  # FP8, Blackwell; imported at use
    r"vllm/kernels/helion/configs/",
    r"vllm/benchmarks/",
    r"vllm/model_executor/layers/(fused_moe|quantization/utils)/configs/",
    r"vllm/model_executor/layers/mamba/.*configs/",
    r"vllm/entrypoints/.*/static/",
    r".*\.(jpg|jpeg|png|gif|svg|pyi|md|c|cc|cpp|cu|cuh|h|hpp|pyx|pxd|js|css|html)$",
    r".*\.dist-info/(RECORD|.*licenses?/.*)$",
    r"(.*/)?(tests?|testing_data|__pycache__)/",
)
"""Patterns of files to leave out, matched at the start; wheels' scripts and shared data are left out too."""

KEPT = (r"numpy/", r"vllm/.*\.jinja$", r".*/licenses/LICENSE.*", r"hydra/", r"vllm/tests?\b.*\.py$")
"""Patterns that win over LEFT_OUT."""

CUT = "vllm/_C_stable_libtorch.abi3.so"
"""The one library that dense decoders use and that has code for other GPUs; FlashAttention 3's has none."""

CONTAINER, ENTRY = struct.Struct("<IHHQ"), struct.Struct("<HHIQ")
"""Heads in CUDA's containers of device code ("fatbin"): magic, version, head's size, size of what follows; and kind,
version, head's size, payload's size."""

MAGIC = 0xBA55ED50
ELF = 2
"""Kind of an entry that is machine code; the other is PTX."""
NOBITS = 8
"""Type of an ELF section that takes no room in the file."""

UNPACK = """#!/bin/sh
# Check the pieces that are here and unpack them: sh unpack.sh [FOLDER OF THE PIECES [TARGET]]
set -eu
pieces=${{1:-$(dirname "$0")}}
target=${{2:-/opt/kit}}
mkdir -p "$target"
target=$(cd "$target" && pwd)
cd "$pieces"
cat >"$target/SHA256SUMS" <<'SUMS'
{sums}
SUMS
for set in kit original; do
  ls $set.*of* >/dev/null 2>&1 || continue
  grep "  $set[.]" "$target/SHA256SUMS" | sha256sum -c --quiet -
  cat $(grep "  $set[.]" "$target/SHA256SUMS" | cut -c67-) | python3 -c '
import sys, tarfile
with tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz") as tar:
    tar.extractall(sys.argv[1], filter="data")
' "$target"
done
python3 -m compileall -q -j 0 "$target" >/dev/null 2>&1 || true # else the first import takes a minute
echo "unpacked into $target; next: python3 $target/try_gpu_kit.py, export PYTHONPATH=$target:CHECKOUT"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-kit"), help="folder of the pieces")
    parser.add_argument("--python", default="312", help="the node's Python, as in 312")
    parser.add_argument("--arch", type=int, default=90, help="the node's GPU: 80 for an A100, 90 for an H100")
    parser.add_argument("--vllm", default=VLLM, help="the release that was built against the node's torch")
    parser.add_argument("--vllm-wheel", type=Path, help="a local wheel, instead of a download")
    parser.add_argument("--originals", action="store_true", help="also pack the uncut library, in separate pieces")
    parser.add_argument("--piece-mib", type=int, default=58, help="largest piece, MiB")
    parser.add_argument("--preset", type=int, default=9, help="xz preset, 0 to 9")
    parser.add_argument("--stage", type=Path, help="also keep the unpacked kit in this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        stage = args.stage or Path(scratch, "stage")
        if stage.exists():
            shutil.rmtree(stage)
        stage.mkdir(parents=True)
        wheels = Path(scratch, "wheels")
        say("download")
        vllm = args.vllm_wheel or download([args.vllm], wheels / "vllm", python=args.python)[0]
        carried = [vllm, *download(PACKAGES, wheels, python=args.python)]
        for wheel in carried:
            extract(wheel, stage)
        for name, why in STUBS.items():
            Path(stage, f"{name}.py").write_text(STUB.format(name=name, why=why))
        for name, text in REPLACED.items():
            if not (stage / name).is_file():
                sys.exit(f"{name}: this vLLM has no such file; see REPLACED")
            Path(stage, name).write_text(text)
        shutil.copyfile(Path(__file__).with_name("try_gpu_kit.py"), stage / "try_gpu_kit.py")
        original = Path(stage, CUT).read_bytes()
        for library in sorted(stage.rglob("*.so")):
            slim(library, arch=args.arch)
        write_facts(stage / "KIT.json", carried, args)
        say("pack")
        sets = {"kit": pack(stage, preset=args.preset)}
        if args.originals:
            sets["original"] = pack_files(
                [(f"original/{CUT}", io.BytesIO(original), len(original))], preset=args.preset
            )
        write_pieces(sets, args.out, size=args.piece_mib << 20)
    say("done")


STARTED = time.monotonic()


def say(what: str) -> None:
    print(f"{time.monotonic() - STARTED:6.0f} s  {what}", flush=True)


def pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"pip {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")


def download(requirements: Sequence[str], folder: Path, *, python: str) -> list[Path]:
    """Download wheels of `requirements` for the node's Python; its glibc must be 2.28 or newer."""
    folder.mkdir(parents=True, exist_ok=True)
    built = [requirement for requirement in requirements if requirement.split("=")[0] in SOURCE_ONLY]
    ready = [requirement for requirement in requirements if requirement not in built]
    for requirement in built:
        pip("wheel", "-q", "--no-deps", "-w", str(folder), requirement)
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux2010_x86_64", "--platform=manylinux1_x86_64"]
    target = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
    pip("download", "-q", "--no-deps", *target, "-d", str(folder), *ready)
    return sorted(folder.glob("*.whl"))


def extract(wheel: Path, stage: Path) -> None:
    """Unpack a wheel's packages, without what LEFT_OUT names."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            name = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", info.filename)
            is_dropped = any(re.match(pattern, name) for pattern in LEFT_OUT)
            is_kept = any(re.match(pattern, name) for pattern in KEPT)
            if info.is_dir() or ".data/" in name or (is_dropped and not is_kept):
                continue
            path = stage / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(info))


@dataclass(frozen=True)
class Entry:
    """Code for one GPU, or PTX, in a container."""

    kind: int
    arch: int
    """As in 90, also of code for 9.0a."""
    begin: int
    payload: int
    """Offset in the file where the payload starts."""
    end: int


def sections(data: bytes) -> dict[str, tuple[int, int]]:
    """Return name -> (offset, size) for the sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    width, count, names = struct.unpack_from("<HHH", data, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", data, table + index * width) for index in range(count)]
    text = heads[names][4] if heads else 0
    return {
        data[text + name : data.index(b"\0", text + name)].decode(): (offset, size)
        for name, kind, _flags, _address, offset, size in heads
        if kind != NOBITS
    }


def containers(data: bytes) -> Iterator[tuple[int, list[Entry]]]:
    """Yield each container of device code: where it starts in the file, and its entries."""
    offset, size = sections(data).get(".nv_fatbin", (0, 0))
    end = offset + size
    while offset < end:
        magic, _version, head, length = CONTAINER.unpack_from(data, offset)
        if magic != MAGIC:  # padding
            offset += 8
            continue
        start, at, entries = offset, offset + head, []
        offset = (at + length + 7) // 8 * 8
        while at < offset - 7:
            kind, _version, head, payload = ENTRY.unpack_from(data, at)
            (arch,) = struct.unpack_from("<I", data, at + 28)
            entries.append(Entry(kind, arch, at, at + head, at + head + payload))
            at += head + payload
        yield start, entries


def slim(library: Path, *, arch: int) -> None:
    """Take everything but machine code for `arch` out of a library's containers, and zero its symbol tables.

    A container without such code gets the library's smallest entry for another GPU instead of its own, so that it
    stays valid and the driver finds no kernel in it. Dense decoders call no kernel that comes as PTX alone. A library
    that has nothing for other GPUs is left as it is.
    """
    data = bytearray(library.read_bytes())
    found = list(containers(data))
    entries = [entry for _, part in found for entry in part]
    ours = [entry for entry in entries if entry.kind == ELF and entry.arch == arch]
    others = [entry for entry in entries if entry.kind == ELF and entry.arch != arch]
    if not others:
        return
    smallest = min(others, key=lambda entry: entry.end - entry.begin)
    stand_in = bytes(data[smallest.begin : smallest.end])
    for start, part in found:
        kept = b"".join(data[entry.begin : entry.end] for entry in part if entry in ours) or stand_in
        begin, end = part[0].begin, part[-1].end
        magic, version, head, _length = CONTAINER.unpack_from(data, start)
        CONTAINER.pack_into(data, start, magic, version, head, len(kept))
        data[begin:end] = kept.ljust(end - begin, b"\0")
    tables = sections(data)
    for offset, size in (tables[name] for name in (".symtab", ".strtab") if name in tables):
        data[offset : offset + size] = bytes(size)
    library.write_bytes(data)
    total, left = (sum(entry.end - entry.begin for entry in part) / 1e6 for part in (entries, ours))
    say(f"{library.name}: {left:.1f} of {total:.1f} MB of device code kept")


def write_facts(path: Path, wheels: Iterable[Path], args: argparse.Namespace) -> None:
    """Write KIT.json: for which node the kit is, and the version of everything that it carries."""
    names = [wheel.name.split("-") for wheel in wheels]
    facts = {
        "python": f"{args.python[0]}.{args.python[1:]}",
        "arch": args.arch,
        "torch": wheel_torch(next(wheel for wheel in wheels if wheel.name.startswith("vllm-"))),
        "stand_ins": sorted(STUBS),
        "packages": {name.replace("_", "-").lower(): version for name, version, *_ in sorted(names)},
    }
    path.write_text(json.dumps(facts, indent=2) + "\n")


def wheel_torch(wheel: Path) -> str | None:
    """Return the torch version that the vLLM wheel requires."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found = re.search(r"^Requires-Dist: torch==(\S+)", archive.read(name).decode(), re.MULTILINE)
    return found and found[1]


def pack(stage: Path, *, preset: int) -> bytes:
    """Return the folder as .tar.xz; the same files give the same bytes."""
    # Files of a kind next to each other compress best.
    paths = sorted((p for p in stage.rglob("*") if p.is_file()), key=lambda p: (p.suffix, str(p)))
    return pack_files(((str(p.relative_to(stage)), p.open("rb"), p.stat().st_size) for p in paths), preset=preset)


def pack_files(files: Iterable[tuple[str, io.BufferedIOBase, int]], *, preset: int) -> bytes:
    """Return names, streams and sizes as .tar.xz, and close the streams."""
    packed = io.BytesIO()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": 256 << 20 if preset == 9 else 8 << 20}]
    with lzma.open(packed, "wb", filters=filters) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        for name, file, size in files:
            info = tarfile.TarInfo(name)
            info.size, info.mode = size, 0o755 if name.endswith(".so") else 0o644
            with file:
                tar.addfile(info, file)
    return packed.getvalue()


def write_pieces(sets: dict[str, bytes], folder: Path, *, size: int) -> None:
    """Write each set as few pieces of equal size, and the script that unpacks them."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (path for name in ("kit", "original") for path in folder.glob(f"{name}.*of*")):
        old.unlink()
    sums = []
    for name, packed in sets.items():
        count = -(-len(packed) // size)
        step = -(-len(packed) // count)
        for index in range(count):
            part, piece = packed[index * step : (index + 1) * step], f"{name}.{index + 1}of{count}"
            Path(folder, piece).write_bytes(part)
            sums.append(f"{hashlib.sha256(part).hexdigest()}  {piece}")
            say(f"{piece}: {len(part) / (1 << 20):.1f} MiB")
    script = folder / "unpack.sh"
    script.write_text(UNPACK.format(sums="\n".join(sums)))
    script.chmod(0o755)


if __name__ == "__main__":
    main()
