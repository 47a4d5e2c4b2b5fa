"""The model that is trained: build, wrap, step, and export its weights."""
