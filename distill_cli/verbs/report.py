"""Write one self-contained HTML page about a run, or several compared.

The page is also written at the end of every run. Final KL, loss and accuracy over what was swept are printed here:
runs that differ only in train.seed as one row of means, with 95% intervals.

examples
  distill report runs/latest
  distill report runs/first runs/second --out both.html
"""

from pathlib import Path

from distill_cli.verbs.command_line import Arguments, Parser, given


def declare(parser: Parser) -> None:
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN|SWEEP", help="folders, such as runs/latest")
    text = "the page; by default report.html in the run's or sweep's folder"
    parser.add_argument("--out", type=given, metavar="FILE", help=text)


def main(arguments: Arguments) -> int:
    """Print the comparison and write the page; return 0.

    Raises:
        ConfigError: a folder is neither a run's nor a sweep's.
    """
    from distill_cli.report.comparison import print_comparison
    from distill_cli.report.html import FILE, write_report
    from distill_cli.report.read import read_histories, read_results
    from distill_cli.report.verdict import verdict
    from distill_cli.terminal.console import Console

    results = read_results(arguments.paths)
    print_comparison(Console(highlight=False), results)
    for history in read_histories(results) if len(results) == 1 else ():
        for sentence in verdict(history.rows, history.config):
            print(f"verdict  {sentence}")
    default = arguments.paths[0] / FILE if len(arguments.paths) == 1 else FILE
    print(f"report   {write_report(results, Path(arguments.out or default))}")
    return 0
