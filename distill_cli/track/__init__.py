"""Trackers (MLflow, W&B, TensorBoard): they follow what a run's folder records."""
