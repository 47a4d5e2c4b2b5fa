"""Checkpoints: files on disk (`store`), and the ranks' side of writing and reading them (`saver`)."""
