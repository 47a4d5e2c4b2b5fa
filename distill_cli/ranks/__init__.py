"""The programs of torchrun's ranks: build a rank's part of a job from its config, and run it."""
