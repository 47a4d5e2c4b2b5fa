"""Data: sources of examples, the prompts made of them, their order, verifiers and environments."""
