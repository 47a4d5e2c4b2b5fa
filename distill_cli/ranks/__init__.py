"""What torchrun's ranks run: they build their side of a job from its config.yaml, and carry it out."""
