"""`python -m distill_cli` is `distill`."""

from distill_cli.cli import main

if __name__ == "__main__":
    main()
