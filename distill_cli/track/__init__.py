"""Trackers such as MLflow: they follow what a run's folder records."""
