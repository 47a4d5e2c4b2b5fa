"""Write docs/configuration.md from the config's schema in distill_cli/config/ and the files of conf/.

python scripts/make_configuration_doc.py            # write it
python scripts/make_configuration_doc.py --check    # exit with status 1 if it is not current
"""

from __future__ import annotations

import argparse
import ast
import sys
from dataclasses import dataclass
from pathlib import Path

from distill_cli.config.fields import LIMITS
from distill_cli.losses import divergence, token_weight

ROOT = Path(__file__).parent.parent
SCHEMA = [ROOT / "distill_cli/config" / name for name in ("schema.py", "loss_schema.py", "execution_schema.py")]
PAGE = ROOT / "docs/configuration.md"
CONF = ROOT / "conf"

INTRODUCTION = """\
# Configuration

Every key, with its type, default and meaning. `python scripts/make_configuration_doc.py` writes this page from
`schema.py`, `loss_schema.py` and `execution_schema.py` in `distill_cli/config/`,
`distill_cli/losses/divergence.py` and `conf/`; a test checks that it is current.

Defaults are those of the Qwen3 recipe on GPUs. The files of `conf/` set others by group; `model=tiny`, the default
choice, selects sizes for a laptop in several groups. `distill --cfg job` prints what a command composes to.

```bash
distill --cfg job                                   # every key with its value
distill --cfg job --package loss                    # the keys of one group
distill ls                                          # the groups, and `distill ls loss` the choices of one
distill loss=reverse loss.topk=32                   # a choice of a group, and a key
distill 'rollout.stop=["\\n\\n"]' data.system_prompt=null   # quote lists for the shell; null is none
distill 'model.chat_template_kwargs={enable_thinking: false}'   # quote dictionaries too
```
"""


@dataclass(frozen=True)
class Field:
    """One key, as a row of the table."""

    key: str
    kind: str
    default: str
    meaning: str


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--check", action="store_true")
    if not arguments.parse_args().check:
        PAGE.write_text(page())
        return 0
    if PAGE.read_text() == page():
        return 0
    print(f"{PAGE.relative_to(ROOT)} is not current: python scripts/make_configuration_doc.py", file=sys.stderr)
    return 1


def page() -> str:
    """Return the text of the page."""
    nodes = [node for file in SCHEMA for node in ast.parse(file.read_text()).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    assigned = {ast.unparse(node.targets[0]): node.value for node in nodes if isinstance(node, ast.Assign)}
    calls = {name: value for name, value in assigned.items() if isinstance(value, ast.Call)}
    enums = {name: enum_values(call) for name, call in calls.items() if ast.unparse(call.func) == "Enum"}
    parts = [INTRODUCTION]
    for group in fields_of(classes["Config"]):
        node = classes[group.kind]
        parts.append(f"## {group.key}\n")
        if about := ast.get_docstring(node):
            parts.append(_one_line(about) + "\n")
        parts += [table(rows(node, group.key, classes, enums)), choices(group.key)]
    return "\n".join(part for part in parts if part)


def rows(node: ast.ClassDef, prefix: str, classes: dict, enums: dict) -> list[Field]:
    """Return the keys of a dataclass and of those inside it, with their dotted names."""
    fields = []
    for field in fields_of(node):
        key = f"{prefix}.{field.key}"
        inner = field.kind.removesuffix(" | None")
        if inner in classes:
            fields += rows(classes[inner], key, classes, enums)
            continue
        kind = field.kind.replace(inner, ", ".join(enums[inner])) if inner in enums else field.kind
        default = field.default.split(".")[-1] if inner in enums else field.default
        fields.append(Field(key, kind.replace(" | None", " or null"), default, field.meaning))
    return fields + (parameter_rows() if node.name == "LossConfig" else [])


def parameter_rows() -> list[Field]:
    """Return the keys that the signatures of divergences and token weights declare."""
    fields = []
    for family in (divergence.SIGNATURES, token_weight.SIGNATURES):
        for name, kind in family.parameters.items():
            takers = {one: family.parameters_of(one).get(name) for one in family.functions}
            uses = [f"{one} ({own.annotation.__metadata__[0]}; {own.default})" for one, own in takers.items() if own]
            meaning = f"A parameter of {family.key}={', '.join(uses)}; null is its default there."
            fields.append(Field(f"loss.{name}", f"{kind.__name__} or null", "null", meaning))
    return fields


def fields_of(node: ast.ClassDef) -> list[Field]:
    """Return the annotated attributes of a dataclass; the limits of a key follow its meaning."""
    fields = []
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or statement.value is None:
            continue
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        meaning = _one_line(ast.literal_eval(ast.unparse(after))) if after is not None and is_text else ""
        keywords = {word.arg: word.value for word in getattr(statement.value, "keywords", [])}
        limits = [f"{name.replace('_', ' ')} {ast.unparse(keywords[name])}" for name in LIMITS if name in keywords]
        parts = [meaning, *([" and ".join(limits).capitalize() + "."] if limits else [])]
        name, kind = ast.unparse(statement.target), ast.unparse(statement.annotation).removeprefix("execution.")
        fields.append(Field(name, kind, default_of(statement.value, keywords), " ".join(parts).strip()))
    return fields


def default_of(value: ast.expr, keywords: dict[str | None, ast.expr]) -> str:
    """Return the default of a key as YAML has it; `keywords` are those of its call of key()."""
    if "factory" in keywords:
        factory = keywords["factory"]
        text = ast.unparse(factory.body if isinstance(factory, ast.Lambda) else factory)
        return {"dict": "{}", "list": "[]"}.get(text, text)
    text = ast.unparse(value.args[0] if isinstance(value, ast.Call) else value)
    return {"None": "null", "True": "true", "False": "false", "MISSING": "needed"}.get(text, text.strip("'"))


def enum_values(call: ast.Call) -> list[str]:
    return list(ast.literal_eval(call.args[1]).values())


def table(fields: list[Field]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        cells = (f"`{field.key}`", field.kind, f"`{field.default}`", field.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def choices(group: str) -> str:
    """Return the files of a config group, each with its first comment."""
    lines = []
    for file in sorted((CONF / group).glob("*.yaml")):
        comments = [line for line in file.read_text().splitlines() if line.startswith("#") and "@package" not in line]
        lines.append(f"- `{group}={file.stem}`: {comments[0].lstrip('# ') if comments else ''}")
    return "\n".join(lines) + "\n" if lines else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
