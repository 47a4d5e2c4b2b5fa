"""Checkpoints: what lies on disk (`store`), and the ranks' side of writing and reading it (`saver`)."""
