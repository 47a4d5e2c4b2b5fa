"""From prompts to rollouts, and from rollouts to micro-batches."""
