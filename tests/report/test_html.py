"""The page in a real browser: drawn completely, without errors or requests, with any text."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_cli.errors import DistillError
from distill_cli.folders.run_dir import Element, SweepDir, element_name
from distill_cli.report.html import write_report
from distill_cli.report.read import read_histories, read_results, thinned
from distill_cli.report.samples import MAX_TOKENS, longest_shown
from tests.report.browser import CHROMIUM, Browser, browser
from tests.report.made import make_run

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

HOSTILE = (
    "</script><script>window.hurt = 1</script>",
    "<img src=x onerror='window.hurt = 2'>",
    "{{ 7 * 7 }} ${window.hurt = 3} --> ]]>",
    '"><svg onload=window.hurt=4>',
    "' onmouseover='window.hurt=5",
)
PAIRS_AND_SEEDS = list(itertools.product((16, 32), (0.3, 0.7), (1, 2)))
EVERY_CHART = {
    "accuracy", "kl", "loss", "entropy", "mass", "agreement", "grad_norm", "time", "speed", "memory", "peak", "length",
    "truncated", "positions",
}  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


def page_of(folder: Path, *runs: Path) -> Path:
    return write_report(read_results(list(runs)), folder / "page.html")


def drawn(page: Browser) -> set[str]:
    """Return the figures with marks: lines, points, rectangles or bars with an extent."""
    marks = ".role-mark.mark-line path, .role-mark.mark-rect path, .role-mark.mark-symbol path"
    has_extent = "m => m.getBoundingClientRect().width + m.getBoundingClientRect().height > 1"
    has_marks = f"c => [...c.querySelectorAll('{marks}')].some({has_extent})"
    ids = page.run(f"[...document.querySelectorAll('.chart')].filter({has_marks}).map(c => c.id)")
    return {id.removeprefix("chart-") for id in ids}


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_figure_is_drawn(chromium: Browser, tmp_path: Path, dark: bool) -> None:
    run = make_run(tmp_path / "run")
    chromium.open(page_of(tmp_path, run.path), dark=dark)
    assert drawn(chromium) == EVERY_CHART
    assert chromium.run("document.documentElement.scrollWidth") <= 1280
    assert "of the gap closed" in chromium.run("document.getElementById('headline').textContent")
    assert "of the KL is gone" in chromium.run("document.getElementById('findings').textContent")
    background = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 23, 27)") == dark
    assert chromium.run("document.getElementById('tip').hidden")
    chromium.hover(".answer .tokens .t:nth-child(3)", until="!document.getElementById('tip').hidden")
    assert chromium.run("document.querySelectorAll('#tip .bar').length") == 10
    tip = chromium.run("document.getElementById('tip').innerText")
    for words in ("the student's likeliest", "the teacher's likeliest", "kl forward", "%"):
        assert words in tip
    chromium.hover(
        ".answer .tokens .t:nth-child(6)",
        until="document.getElementById('tip').innerText.includes('observation')",
    )
    chromium.hover(
        ".answer .tokens .t:nth-child(2)",
        until="document.getElementById('tip').innerText.includes('kl forward not a number')",
    )
    chromium.hover("h1", until="document.getElementById('tip').hidden")
    chromium.hover(
        "#chart-kl .role-mark.mark-symbol path",
        until="document.querySelector('#vg-tooltip-element.visible')?.innerText.includes('step')",
    )
    assert chromium.messages == []


@needs_browser
def test_disagreement_view_shows_recorded_steps(chromium: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", recorded=(0, 10, 20))
    chromium.open(page_of(tmp_path, run.path))
    headers = "[...document.querySelectorAll('.answer > header b')].map(b => b.textContent)"
    assert chromium.run(headers) == ["before training", "after step 20"]
    chromium.run("[...document.querySelectorAll('#steps button')].find(b => b.textContent === '10').click()")
    assert chromium.run(headers) == ["before training", "after step 10", "after step 20"]
    colours = "[...document.querySelectorAll('.tokens .t')].map(t => t.style.background)"
    by_kl = chromium.run(colours)
    assert len(set(by_kl)) > 10
    chromium.run("(m => { m.value = 'entropy'; m.onchange({target: m}); })(document.getElementById('measure'))")
    assert chromium.run(colours) != by_kl
    chromium.run("document.querySelector('#worst tbody tr').click()")
    assert chromium.run("document.querySelectorAll('.tokens .aim').length") == 1
    assert chromium.run("document.querySelectorAll('#worst tbody tr').length") == 12
    assert chromium.messages == []


@needs_browser
def test_hostile_texts_stay_texts(chromium: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=window.hurt=6>"
    config = "loss: {kl_type: '</script><script>window.hurt = 7</script>', topk: 64}\n'<b id=boo>': 1\n"
    run = make_run(folder, words=HOSTILE, config=config)
    run.command.write_text("distill '</dd><script>window.hurt = 8</script>'\n")
    other = make_run(tmp_path / "other{{ 1 }}", words=HOSTILE)
    for runs in ([run.path], [run.path, other.path]):
        chromium.open(page_of(tmp_path, *runs))
        chromium.hover(".answer .tokens .t:nth-child(2)", until="!document.getElementById('tip').hidden")
        chromium.hover(
            "#chart-positions .role-mark.mark-symbol path",
            until="document.querySelector('#vg-tooltip-element.visible') !== null",
        )
        assert chromium.run("window.hurt") is None
        assert chromium.run("document.querySelectorAll('img, b#boo, svg[onload]').length") == 0
        shown = chromium.run("document.body.innerText")
        for words in ("<img src=x onerror", "</script><script>window.hurt = 7</script>"):
            assert words in shown
        assert chromium.messages == []


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    pairs = list(itertools.product((16, 32, 64), (0.3, 0.5, 0.7)))
    swept = [[f"loss.topk={topk}", f"loss.kl_weight={weight}"] for topk, weight in pairs]
    elements = [Element(index, element_name(index, words), words) for index, words in enumerate(swept)]
    folder = SweepDir(tmp_path / "sweep")
    folder.write(command=["distill", "-m"], elements=elements)
    for element, (topk, weight) in zip(elements, pairs, strict=True):
        config = f"loss: {{kl_type: mixed, topk: {topk}, kl_weight: {weight}}}\nrun: {{name: x{topk}}}\n"
        make_run(folder.path / element.folder, config=config, seed=element.index, slowness=5 + element.index)
    return folder.path


@needs_browser
def test_sweep_has_heat_maps(chromium: Browser, sweep: Path) -> None:
    chromium.open(page_of(sweep, sweep))
    heat = {"grid-val_accuracy", "grid-train_kl_forward", "grid-train_kl_reverse"}
    assert drawn(chromium) == (EVERY_CHART - {"time", "memory"}) | heat
    assert chromium.run("document.querySelectorAll('#chart-grid-val_accuracy .role-mark.mark-rect path').length") == 9
    assert chromium.run("document.querySelectorAll('#comparison tbody tr').length") == 9
    assert chromium.run("document.querySelector('#comparison tr.best td').textContent") == "topk=16 kl_weight=0.3"
    lines = "[...document.querySelectorAll('#chart-loss .role-mark.mark-line path')]"
    lines += ".map(l => l.getAttribute('opacity') ?? '1')"
    assert chromium.run(lines) == ["1"] * 9
    chromium.run("document.querySelectorAll('#legend button')[2].click()")
    chromium.wait(f"{lines}.filter(o => o === '1').length === 1")
    keys = chromium.run("[...document.querySelectorAll('#config thead th')].map(k => k.textContent)")
    assert keys == ["run", "loss.topk", "loss.kl_weight"]
    assert chromium.run("document.querySelector('#config table').offsetWidth") < 1240
    assert chromium.run("document.querySelectorAll('#run option').length") == 9
    assert chromium.run("document.documentElement.scrollWidth") <= 1280
    assert chromium.messages == []


@needs_browser
def test_seeds_are_pooled(chromium: Browser, tmp_path: Path) -> None:
    keys = ("loss.topk", "loss.kl_weight", "train.seed")
    swept = [[f"{key}={value}" for key, value in zip(keys, values, strict=True)] for values in PAIRS_AND_SEEDS]
    elements = [Element(index, element_name(index, words), words) for index, words in enumerate(swept)]
    sweep = SweepDir(tmp_path / "sweep")
    sweep.write(command=["distill", "-m"], elements=elements)
    for element, (topk, weight, seed) in zip(elements, PAIRS_AND_SEEDS, strict=True):
        config = f"loss: {{topk: {topk}, kl_weight: {weight}}}\ntrain: {{seed: {seed}}}\n"
        make_run(sweep.path / element.folder, config=config, seed=seed, slowness=topk / 4 + seed, recorded=())
    chromium.open(page_of(tmp_path, sweep.path))
    assert chromium.run("document.querySelectorAll('#chart-grid-val_accuracy .role-mark.mark-rect path').length") == 4
    rows = chromium.run("[...document.querySelectorAll('#comparison tbody tr')].map(r => r.innerText)")
    assert [row.split("\t")[:4] for row in rows] == [
        [f"topk={topk} kl_weight={weight}", "finished", "2", "20"] for topk in (16, 32) for weight in (0.3, 0.7)
    ]
    accuracies = [row.split("\t")[5] for row in rows]
    assert all("% ± " in accuracy for accuracy in accuracies)
    assert [accuracy.endswith("≈") for accuracy in accuracies] == [False, True, True, True]
    assert "more within its interval" in chromium.run("document.querySelector('.headline').textContent")
    assert chromium.run("document.querySelectorAll('#legend button').length") == 8
    assert chromium.run("document.documentElement.scrollWidth") <= 1280
    assert chromium.messages == []


@needs_browser
def test_unfinished_run_has_a_page(chromium: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=1, recorded=())
    run.outcome.unlink()
    run.resolved.unlink()
    run.metrics.write_text('{"step": 0, "time": 0, "val/accuracy": 0.5}\n')
    chromium.open(page_of(tmp_path, run.path))
    assert drawn(chromium) == {"accuracy"}
    run.metrics.unlink()
    chromium.open(page_of(tmp_path, run.path))
    assert drawn(chromium) == set()
    assert "Nothing was measured yet" in chromium.run("document.getElementById('headline').textContent")
    assert chromium.messages == []


@needs_browser
def test_damaged_answers_are_left_out(chromium: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", recorded=(0, 10, 20))
    (run.rollouts / "step_20.parquet").write_bytes(b"PAR1 cut off")
    chromium.open(page_of(tmp_path, run.path))
    assert chromium.run("[...document.querySelectorAll('#steps button')].map(b => b.textContent)") == [
        "0, before",
        "10",
    ]
    note = chromium.run("document.getElementById('cut').innerText")
    assert note == "Left out, since they cannot be read: run/step_20.parquet."
    assert chromium.messages == []


@pytest.mark.parametrize("file", ["outcome.json", "resolved.json", "metrics.jsonl"])
def test_damaged_run_is_named(tmp_path: Path, file: str) -> None:
    run = make_run(tmp_path / "run", recorded=())
    (run.path / file).write_text("[1]\n")
    with pytest.raises(DistillError, match="run: one of its files is damaged"):
        read_histories(read_results([run.path]))


def test_page_needs_no_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    code = "import sys; from distill_cli.cli import run; run(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "report", "run"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "report   run/report.html" in done.stdout
    assert (tmp_path / "run/report.html").stat().st_size < 2e6


def test_long_answers_are_cut() -> None:
    assert longest_shown([30] * 10) == 30
    assert longest_shown([7000] * 100) == MAX_TOKENS // 100
    cut = longest_shown([10] * 100 + [9000] * 10)
    assert 10 * 100 + cut * 10 <= MAX_TOKENS < 10 * 100 + (cut + 1) * 10


def test_many_steps_are_averaged() -> None:
    rows = [{"step": step, "loss": float(step)} | ({"val": 1.0} if step == 7 else {}) for step in range(1, 11)]
    assert thinned(rows, 10) == rows
    few = thinned(rows, 5)
    assert [row["step"] for row in few] == [2, 4, 6, 8, 10]
    assert few[0]["loss"] == 1.5
    assert [row.get("val") for row in few] == [None, None, None, 1.0, None]
