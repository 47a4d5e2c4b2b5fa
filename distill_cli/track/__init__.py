"""Where a run is recorded: metrics.jsonl, which is the truth, and MLflow, which follows it."""
