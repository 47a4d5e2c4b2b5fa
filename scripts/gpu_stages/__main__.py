"""Run one stage: `python -m gpu_stages NAME REPORT SCRATCH [--rehearse]`."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import psutil

from distill_cli.machine.processes import die_with_parent
from gpu_stages import STAGES
from gpu_stages.figures import Stage, StageFailed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("report", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    die_with_parent()
    faulthandler.enable()
    stage = Stage(arguments.report, arguments.scratch, rehearse=arguments.rehearse)
    module = STAGES[arguments.name].module if arguments.name in STAGES else arguments.name
    try:
        importlib.import_module(f"gpu_stages.{module}").run(stage)
    except StageFailed as error:
        stage.fail(str(error))
    except Exception as error:
        traceback.print_exc()
        stage.fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # skip waiting for the threads of compilers and engines; the report is on disk


if __name__ == "__main__":
    main()
