"""On-policy distillation of language models from one command."""
