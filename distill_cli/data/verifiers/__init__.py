"""Verifiers of answers: one file each, with a function `verify`."""
