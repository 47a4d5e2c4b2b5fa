"""The families that the installed transformers has, read from its source: importing its models takes seconds."""

import ast
import re
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

CONFIGS, CAUSAL_LMS = "CONFIG_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
MASKED_LMS, FOLDERS = "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME"
ATTENTION_CLASS = re.compile(r"^class \w*Attention\w*\(", re.MULTILINE)
ATTENTION_INTERFACE, ROUTER_LOSS = "ALL_ATTENTION_FUNCTIONS", "load_balancing_loss_func"
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


def encoder_families() -> frozenset[str]:
    """Return each `model_type` whose models predict masked tokens, unless their config says `is_decoder`."""
    return _keys("modeling_auto.py", MASKED_LMS)


def has_own_attention(code: str) -> bool:
    """Return whether a model's code computes attention itself, past transformers' interface of attention functions."""
    return ATTENTION_INTERFACE not in code and bool(ATTENTION_CLASS.search(code))


@cache
def source_of(family: str, kind: Literal["modeling", "configuration"]) -> str:
    """Return the source of a family's classes, by its `model_type`; empty if it is not where it is expected."""
    models = _models_folder()
    folder = dict(_pairs("auto_mappings.py", FOLDERS) + _pairs("configuration_auto.py", FOLDERS)).get(family, family)
    folder = folder.replace("-", "_")
    file = models / folder / f"{kind}_{folder}.py" if models and folder.isidentifier() else None
    return file.read_text(encoding="utf-8") if file and file.is_file() else ""


@cache
def head_classes() -> frozenset[str]:
    """Return the classes with a head over the vocabulary; none if the source is not laid out as expected."""
    nodes = (node for statement in _source("modeling_auto.py") for node in ast.walk(statement))
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return frozenset(text for text in texts if text.isidentifier() and text.endswith(HEADS))


def _keys(file: str, mapping: str) -> frozenset[str]:
    return frozenset(key for key, _ in _pairs(file, mapping))


@cache
def _pairs(file: str, mapping: str) -> list[tuple[str, str]]:
    """Return the entries of a mapping: the pairs of texts in its value, and the entries of a dict."""
    pairs: list[tuple[ast.expr | None, ast.expr]] = []
    for statement in _source(file):
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if any(isinstance(target, ast.Name) and target.id == mapping for target in targets):
            for node in ast.walk(statement):
                if isinstance(node, ast.Tuple) and len(node.elts) == 2:
                    pairs.append((node.elts[0], node.elts[1]))
                elif isinstance(node, ast.Dict):
                    pairs += zip(node.keys, node.values, strict=True)
    texts = [[one.value if isinstance(one, ast.Constant) else None for one in pair] for pair in pairs]
    return [(key, str(value)) for key, value in texts if isinstance(key, str)]


@cache
def _source(file: str) -> list[ast.stmt]:
    """Return the statements of a file of transformers' `models/auto`; none if there is no such file."""
    models = _models_folder()
    path = models / "auto" / file if models else None
    return ast.parse(path.read_text(encoding="utf-8")).body if path and path.is_file() else []


@cache
def _models_folder() -> Path | None:
    spec = find_spec("transformers")
    return Path(spec.origin).parent / "models" if spec and spec.origin else None
