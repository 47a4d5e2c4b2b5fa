"""Runs, sweeps and searches: checking, preparing, carrying out, submitting, resuming, evaluating. No torch."""
