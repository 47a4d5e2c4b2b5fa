"""What Tab offers where Hydra, which knows groups, choices and keys, has nothing to say: verbs, flags, config groups.

Hydra's function in the shell asks `distill -sc query=bash` with the line in COMP_LINE. Where nothing is offered, the
shell offers files: for the folder of `resume RUN` that is what is wanted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence

from distill_cli.config.choices import conf_dir, groups

FLAGS: Mapping[str, Sequence[str]] = {
    "train": ("-m", "--cfg", "--wait"),
    "plan": ("-m", "--measure"),
    "resume": ("--step", "--wait"),
    "eval": ("--against", "--step", "--json"),
    "export": ("--step", "--max-shard-size", "--adapter", "--push"),
    "report": ("--out",),
    "doctor": ("--json",),
}
NUM_FOLDERS = {"resume": 1, "eval": 1}
"""Words after the verb that are no overrides; overrides follow them."""
NO_OVERRIDES = {"export", "report", "watch", "track", "ls", "doctor"}


def is_asked(argv: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether this is the shell that asks."""
    return bool({"-sc", "--shell-completion"} & set(argv)) and "COMP_LINE" in env


def offered(line: str, verbs: Sequence[str]) -> tuple[list[str], bool]:
    """What is offered for the last word of a line, and whether Hydra is to be asked for more."""
    _, *words = line.split(" ")
    word, before = words[-1] if words else "", [word for word in words[:-1] if word]
    if not before:
        flags = ["--help", "--version", *FLAGS["train"]] if word.startswith("-") else []
        return [*(verb for verb in verbs if verb.startswith(word)), *flags], not word.startswith("-")
    verb = before[0] if before[0] in verbs else "train"
    if word.startswith("-"):
        return ["--help", *FLAGS.get(verb, ())], False
    if verb == "ls":
        return groups([conf_dir()]), False
    if verb == "track":
        return ["sync"] if len(before) == 1 else [], False
    return [], verb not in NO_OVERRIDES and len(before) > NUM_FOLDERS.get(verb, 0)


def hide_verb(env: MutableMapping[str, str], verbs: Sequence[str]) -> None:
    """Takes the verb, its folder and flags out of the line that Hydra reads: it knows overrides alone."""
    command, *words = env["COMP_LINE"].split(" ")
    before, last = [word for word in words[:-1] if word], words[-1] if words else ""
    if before and before[0] in verbs:
        before = before[1 + NUM_FOLDERS.get(before[0], 0) :]
    env["COMP_LINE"] = " ".join([command, *(word for word in before if not word.startswith("-")), last])
    env["COMP_POINT"] = str(len(env["COMP_LINE"]))


def complete(verbs: Sequence[str], env: MutableMapping[str, str] = os.environ) -> bool:
    """Prints what is offered; whether Hydra is to be asked for more, of the line without the verb."""
    point = int(env.get("COMP_POINT") or len(env["COMP_LINE"]))
    env["COMP_LINE"] = env["COMP_LINE"][:point]
    found, asks_hydra = offered(env["COMP_LINE"], verbs)
    if found:
        print(" ".join(found))
    hide_verb(env, verbs)
    return asks_hydra
