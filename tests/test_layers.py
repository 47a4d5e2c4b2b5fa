"""The package is a stack: a module imports only from layers below its own, and what answers fast imports no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from distill_cli.verbs.command_line import VERBS

PACKAGE = Path(__file__).parent.parent / "distill_cli"
LAYERS = [  # the lowest first; a name is the first component under distill_cli
    {"errors", "types"},
    {"user_code"},
    {"losses"},
    {"metrics"},
    {"config", "terminal"},
    {"machine", "models", "folders"},
    {"parallel"},
    {"resolved"},
    {"memory", "data", "engines", "launch", "report"},
    {"tokens"},
    {"rollout", "serving", "ui"},
    {"student"},
    {"checkpoint"},
    {"train", "track"},
    {"ranks", "jobs"},
    {"chat"},
    {"verbs"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
NO_TORCH = [
    "distill_cli.cli",
    *(f"distill_cli.jobs.{name}" for name in ("doctor_checks", "evaluation", "plan_tables", "prepared_run")),
    *(f"distill_cli.jobs.{name}" for name in ("run_jobs", "served_teachers", "serving")),
    *(f"distill_cli.jobs.{name}" for name in ("submit", "vllm_teachers")),
    *(f"distill_cli.chat.{name}" for name in ("main", "setup", "engine", "kl_view", "commands")),
    *(f"distill_cli.engines.{name}" for name in ("companion_process", "from_config", "server_info", "wire")),
    "distill_cli.launch.slurm",
    *(f"distill_cli.verbs.{verb}" for verb in VERBS),
    "distill_cli.ranks.worker",
    "distill_cli.metrics",
    "distill_cli.report.comparison",
    "distill_cli.ui.server",
]
NO_CONFIG = ["student", "parallel", "losses", "checkpoint/saver.py", "data/prompts.py"]
"""Take plain arguments; `ranks` passes them the values of the config."""
FILES = sorted(file for file in PACKAGE.rglob("*.py") if "assets" not in file.relative_to(PACKAGE).parts)


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    me = unit(path)
    if me == "__init__":
        return
    for line, name in imported_modules(path):
        head, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if head == "distill_cli" and other in LEVEL and other != me:
            assert LEVEL[other] < LEVEL[me], f"{path}:{line} {me} imports {other}"


@pytest.mark.parametrize("name", NO_CONFIG)
def test_plain_arguments_below_ranks(name: str) -> None:
    files = [path for path in FILES if path.is_relative_to(PACKAGE / name)]
    assert files
    for path in files:
        for line, module in imported_modules(path):
            assert not module.startswith("distill_cli.config."), f"{path}:{line} imports {module}"


def test_every_module_has_a_layer() -> None:
    assert {unit(path) for path in FILES} - {"__init__"} <= set(LEVEL)


@pytest.mark.parametrize("module", NO_TORCH)
def test_the_command_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
