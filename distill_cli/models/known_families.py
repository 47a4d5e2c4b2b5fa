"""The families that the installed transformers has, read from its source: importing its models takes seconds."""

import ast
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

CONFIGS, CAUSAL_LMS = "CONFIG_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
HEADS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""Ends of the names of classes with a head over the vocabulary."""


def transformers_version() -> str:
    return version("transformers")


def families() -> frozenset[str]:
    """Return each `model_type` that has a config; none if the source is not laid out as expected."""
    return _keys("configuration_auto.py", CONFIGS) | _keys("auto_mappings.py", CONFIGS)


def causal_families() -> frozenset[str]:
    """Return each `model_type` that has a causal LM; none if the source is not laid out as expected."""
    return _keys("modeling_auto.py", CAUSAL_LMS)


@cache
def head_classes() -> frozenset[str]:
    """Return the classes with a head over the vocabulary; none if the source is not laid out as expected."""
    nodes = (node for statement in _source("modeling_auto.py") for node in ast.walk(statement))
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return frozenset(text for text in texts if text.isidentifier() and text.endswith(HEADS))


@cache
def _keys(file: str, mapping: str) -> frozenset[str]:
    """Return the keys of a mapping: the first of each pair of texts in its value, and of each entry of a dict."""
    keys: set[str] = set()
    for statement in _source(file):
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if any(isinstance(target, ast.Name) and target.id == mapping for target in targets):
            for node in ast.walk(statement):
                pair = node.elts[:1] if isinstance(node, ast.Tuple) and len(node.elts) == 2 else []
                given = node.keys if isinstance(node, ast.Dict) else pair
                keys |= {one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    return frozenset(keys)


@cache
def _source(file: str) -> list[ast.stmt]:
    """Return the statements of a file of transformers' `models/auto`; none if there is no such file."""
    spec = find_spec("transformers")
    path = Path(spec.origin).parent / "models" / "auto" / file if spec and spec.origin else None
    return ast.parse(path.read_text(encoding="utf-8")).body if path and path.is_file() else []
