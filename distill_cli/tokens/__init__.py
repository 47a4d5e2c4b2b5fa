"""Tokenizers as bytes, and what a teacher with a tokenizer of its own says about the student's tokens."""
