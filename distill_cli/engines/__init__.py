"""Engines of student and teacher: their protocols, vLLM in the trainer's process, and the sync of weights."""
