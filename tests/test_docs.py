"""What the documents say is so: commands compose, keys exist, the generated page is current."""

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from distill_cli.cli import split_verb
from distill_cli.config.compose import compose
from distill_cli.config.schema import Config
from distill_cli.jobs.search import read_search
from distill_cli.verbs.command_line import parser_of

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUPS = {file.name for file in (ROOT / "conf").iterdir() if file.is_dir()}
PLACEHOLDER = re.compile(r"\.\.\.|<[^>]+>|\b[A-Z]{3,}\b")


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each `distill` line in the pages' bash blocks; placeholders in capitals are left out."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            for words in (shlex.split(line, comments=True) for line in lines):
                while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] in ("uv", "run", "--extra", "cpu")):
                    words = words[1:]
                if words[:1] == ["distill"] and not any(PLACEHOLDER.search(word) for word in words):
                    found.append((page.name, words[1:]))
    return found


def keys_of(node: object, at: str = "") -> set[str]:
    """Every dotted key of the config, groups too."""
    if not isinstance(node, dict):
        return {at}
    return {at, *(key for name, value in node.items() for key in keys_of(value, f"{at}.{name}".lstrip(".")))}


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else None)
def test_a_documented_command_is_one(page: str, words: list[str], capsys: pytest.CaptureFixture) -> None:
    verb, rest = split_verb(words[: words.index(">")] if ">" in words else words)
    arguments = parser_of(verb).parse(rest)
    if verb not in ("train", "plan", "check") or "--shell-completion" in arguments.flags:
        return
    if verb == "train" and any(word.startswith("search.trials=") for word in rest):
        read_search(arguments.overrides, arguments.flags)
    else:
        compose(arguments.overrides, arguments.flags)


def test_every_key_beside_nemo_rl_exists() -> None:
    known = keys_of(OmegaConf.to_container(OmegaConf.structured(Config)))
    text = (ROOT / "docs/nemo_rl.md").read_text()
    table = text[text.index("## Keys") : text.index("## What differs")]
    ours = [row.split("|")[2] for row in table.splitlines() if row.startswith("| `")]  # theirs, ours, remark
    named = {key.split("=")[0] for cell in ours for key in re.findall(r"`([^`]+)`", cell)}
    free = {key for key in named if key.startswith(("data.train.", "data.validation."))}  # a source's own
    assert named - free - GROUPS - {""} <= known
    assert len(named) > 50


@pytest.mark.parametrize("script", ["make_configuration_doc.py", "make_metrics_doc.py", "make_models_doc.py"])
def test_generated_page_is_current(script: str) -> None:
    script = ROOT / "scripts" / script
    done = subprocess.run([sys.executable, script, "--check"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_contributing_lists_every_file() -> None:
    script = runpy.run_path(str(ROOT / "scripts/make_file_tree.py"))
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert script["with_tree"](page) == page, "run scripts/make_file_tree.py"


def test_readme_result_is_the_measured_one() -> None:
    shown = re.findall(r"\d\.\d{3} ± \d\.\d{3}", (ROOT / "README.md").read_text())
    measured = (ROOT / "docs/results.md").read_text().split("<!-- end -->")[0]
    assert len(shown) == 9
    assert [value for value in shown if f"| {value} |" not in measured] == []


def test_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "nemo_rl.md"], ids=lambda page: page.name)
def test_named_python_files_exist(page: Path) -> None:
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", page.read_text()))
    assert sorted(name for name in named if not any((ROOT / at / name).is_file() for at in (".", "distill_cli"))) == []


def quoted_errors() -> list[str]:
    """The errors of troubleshooting.md; an ellipsis stands for what varies."""
    return re.findall(r"(?m)^\| `([^`]*…[^`]*)` \|", (ROOT / "docs/troubleshooting.md").read_text())


@pytest.mark.parametrize("text", quoted_errors())
def test_a_quoted_error_exists(text: str) -> None:
    source = "\n".join(file.read_text() for file in (ROOT / "distill_cli").rglob("*.py"))
    parts = [part.strip(" :;,()=") for part in text.split("…")]
    assert [part for part in parts if part not in source] == []


def test_twenty_errors_are_quoted() -> None:
    assert len(quoted_errors()) >= 20


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_the_front_pages_exist(page: str) -> None:
    """`mkdocs build --strict` checks those between the pages of docs/."""
    targets = [link for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()) if "://" not in link]
    assert targets
    for target in targets:
        file, _, anchor = target.partition("#")
        assert (ROOT / file).exists(), target
        headings = re.findall(r"(?m)^#+ (.*)", (ROOT / (file or page)).read_text()) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}


def test_site_lists_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f": {page.name}\n" not in nav] == []


def test_changelog_has_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
