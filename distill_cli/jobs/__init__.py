"""Runs, sweeps and searches: check, prepare, run, submit, resume, evaluate. No torch."""
