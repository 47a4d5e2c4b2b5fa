"""Print what is installed, visible and reachable, and how to fix what is not.

examples
  distill doctor
  distill doctor --json
"""

import json
from dataclasses import asdict

from distill_cli.verbs.command_line import Arguments, Parser


def declare(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def main(arguments: Arguments) -> int:
    """Print a line or more for each check; return 1 if something that is needed is wrong, else 0."""
    from distill_cli.jobs.doctor_checks import run_checks

    findings = run_checks()
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            fix = f"; {finding.fix}" if finding.fix and not finding.ok else ""
            result = "ok  " if finding.ok else "FAIL" if finding.needed else "warn"
            print(f"{result} {finding.name:<14}{finding.detail}{fix}")
    return int(any(finding.needed and not finding.ok for finding in findings))
