"""A run's folder: paths, tables, lock, attempts, and atomic writes."""
