"""A run's folder: its paths and tables, its lock, its attempts, and folders that are written whole or not at all."""
