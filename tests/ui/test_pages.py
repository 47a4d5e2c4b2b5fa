"""The pages in a real browser: the list, a run that goes on, comparisons, and a server that is away for a while."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.report.browser import CHROMIUM, Browser, browser
from tests.report.made import make_run
from tests.report.test_html import HOSTILE
from tests.ui.serving import CONFIG, append, make_running, make_sweep, serving

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def started() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder for runs, and the address of the page about it; the tests share the server."""
    root = tmp_path_factory.mktemp("ui")
    with serving(root) as address:
        yield root, address


@pytest.fixture
def root(server: tuple[Path, str]) -> Iterator[Path]:
    yield server[0]
    for folder in server[0].iterdir():
        shutil.rmtree(folder)


@pytest.fixture
def page(started: Browser, server: tuple[Path, str]) -> Browser:
    started.call("Page.navigate", url="about:blank")
    started.origins = ("file:", "data:", server[1])
    return started


@pytest.fixture
def address(server: tuple[Path, str]) -> str:
    return server[1]


def rows(page: Browser) -> list[list[str]]:
    """Return the texts of the list's cells, row by row."""
    cells = page.run("[...document.querySelectorAll('#runs tbody tr')].map(r => [...r.cells].map(c => c.innerText))")
    return [[cell.strip() for cell in row[1:]] for row in cells]


def names(page: Browser) -> list[str]:
    return page.run("[...document.querySelectorAll('#runs tbody tr')].map(r => r.dataset.name)")


def press(page: Browser, key: str, *, times: int = 1) -> None:
    for _ in range(times):
        for kind in ("keyDown", "keyUp"):
            code = {"Enter": 13, "Tab": 9, " ": 32}.get(key, 0)
            text = {"Enter": "\r", " ": " "}.get(key, "")
            page.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)


def click(page: Browser, selector: str) -> None:
    page.run(f"document.querySelector({json.dumps(selector)}).click()")


def test_list_shows_runs_and_sweeps(page: Browser, root: Path, address: str) -> None:
    make_run(root / "one", config=CONFIG, recorded=())
    make_running(root / "project/two", recorded=())
    make_sweep(root / "sweep", (0.3, 0.7), finished=1)
    page.open(address)
    found = dict(zip(names(page), rows(page), strict=True))
    assert list(found) == ["sweep", "sweep/0_kl_weight=0.3", "sweep/1_kl_weight=0.7", "project/two", "one"]
    assert found["one"][:4] == ["one", "finished", "pupil\nfrom master", "mixed"]
    assert re.fullmatch(r"30\.0% → 9\d\.\d%\nteacher 95\.0%", found["one"][4])
    assert found["one"][7] == "1:02:03"
    assert found["project/two"][1] == "running \nstep 12/40, 0:28 left"
    assert found["sweep"][0].split("\n")[1:] == ["sweep over loss.kl_weight"]
    assert found["sweep"][1] == "1 finished, 1 waiting"
    assert found["sweep/1_kl_weight=0.7"][:2] == ["kl_weight=0.7", "waiting"]
    assert page.run("document.title") == "1 running - runs - distill"
    assert page.messages == []


def test_list_is_sorted_and_filtered(page: Browser, root: Path, address: str) -> None:
    for name, num_steps in (("b", 5), ("a", 20), ("c", 10)):
        make_run(root / name, config=CONFIG, recorded=(), num_steps=num_steps)
    page.open(address)
    head = "[...document.querySelectorAll('.sort')].find(b => b.textContent.startsWith('{}'))"
    page.run(head.format("run") + ".click()")
    assert names(page) == ["a", "b", "c"]
    page.run(head.format("accuracy") + ".click()")
    assert names(page) == ["a", "c", "b"]
    page.run(head.format("accuracy") + ".click()")
    assert names(page) == ["b", "c", "a"]
    assert page.run("document.querySelectorAll('[aria-sort=ascending]').length") == 1
    page.run("document.getElementById('filter').focus()")
    page.call("Input.insertText", text="FINISHED c")
    assert names(page) == ["c"]
    assert page.run("document.getElementById('count').textContent") == "1 of 3 runs shown"
    page.call("Input.insertText", text="xyz")
    assert page.run("document.getElementById('none').innerText") == "No run matches the filter."
    page.call("Page.reload")
    page.wait("document.getElementById('filter')?.value === 'FINISHED cxyz'")
    page.run("sessionStorage.clear()")
    assert page.messages == []


def test_list_follows_the_folder(page: Browser, root: Path, address: str) -> None:
    page.open(address)
    assert "No runs yet" in page.run("document.getElementById('none').innerText")
    run = make_running(root / "one", recorded=())
    page.wait("document.querySelectorAll('#runs tbody tr').length === 1")
    page.run("document.querySelector('tbody input').focus()")
    append(run, 13)
    page.wait("document.querySelector('tbody').innerText.includes('step 13/40')")
    assert page.run("document.activeElement === document.querySelector('tbody input')")
    (run.path / "config.yaml").write_text("[")
    page.wait("document.querySelector('tbody').innerText.includes('unreadable')")
    shutil.rmtree(run.path)
    page.wait("document.querySelectorAll('#runs tbody tr').length === 0")
    assert page.messages == []


def test_run_page_follows_its_run(page: Browser, root: Path, address: str) -> None:
    run = make_running(root / "run", recorded=(0, 10))
    run.rank_log(0).write_text("".join(f"line {number}\n" for number in range(100)))
    page.open(f"{address}report?run=run")
    page.wait("document.title === 'running 12/40 - run - distill'")
    page.run("window.mark = document.querySelector('#chart-loss svg')")
    click(page, "#prompts li:nth-child(3)")
    click(page, "#log summary")
    page.wait("document.getElementById('lines').innerText.includes('line 99')")
    page.point_at("#chart-loss")
    kept = "[scrollY, shown.prompt, document.querySelector('#log details').open, "
    kept += "document.querySelector('#prompts [aria-selected=true] .text').innerText]"
    before = page.run(kept)
    assert before[0] > 300
    last = "Math.max(...figures.get('loss').view.data('steps').map(row => row.step))"
    assert page.run(last) == 12
    append(run, 13, 14)
    run.beat("train 40")
    with run.rank_log(0).open("a") as file:
        file.write("line 100\n")
    page.wait(f"document.title.startsWith('running 14/40') && {last} === 14")
    assert page.run(kept) == before
    assert page.run("window.mark === document.querySelector('#chart-loss svg')")
    assert page.run("document.getElementById('now').innerText").startswith("running, step 14 of 40, train")
    assert "in 14 steps" in page.run("document.getElementById('headline').innerText")
    page.wait("document.getElementById('lines').innerText.includes('line 100')")
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.wait("window.mark !== document.querySelector('#chart-loss svg')")
    append(run, 15)
    page.wait(f"{last} === 15")
    run.outcome.write_text(json.dumps({"state": "finished", "num_steps": 14, "seconds": 61.0}))
    page.wait("document.title === 'finished - run - distill'")
    assert page.run("document.getElementById('now').innerText") == "finished, step 14, 1:01 in all"
    assert page.run("window.mark !== undefined")
    assert page.messages == []


def test_new_answers_and_figures_appear(page: Browser, root: Path, address: str) -> None:
    run = make_running(root / "run", recorded=())
    later = make_run(root.parent / "later", config=CONFIG, recorded=(0, 10, 20))
    later.rollouts.rename(root.parent / "rollouts")
    shutil.rmtree(later.path)
    page.open(f"{address}report?run=run")
    assert page.run("document.getElementById('disagreement')") is None
    run.rollouts.mkdir()
    moved = [root.parent / f"rollouts/step_{step}.parquet" for step in (0, 10, 20)]
    for file in moved[:2]:
        shutil.copy(file, run.rollouts)
    steps = "[...document.querySelectorAll('#steps button[aria-pressed=true]')].map(b => b.textContent).join()"
    page.wait(f"{steps} === '0, before,10'")
    page.wait("document.querySelectorAll('#chart-positions .role-mark.mark-line path').length > 0")
    assert page.run("document.querySelectorAll('nav a[href=\"#disagreement\"]').length") == 1
    shutil.copy(moved[2], run.rollouts)
    page.wait(f"{steps} === '0, before,20'")
    click(page, "#step-10")
    (run.rollouts / "step_20.parquet").unlink()
    page.wait(f"{steps} === '0, before,10'")
    append(run, 13, **{"rollout/oldest": 4})
    page.wait("document.querySelectorAll('#chart-ages .role-mark.mark-symbol path').length > 0")
    shutil.rmtree(root.parent / "rollouts")
    assert page.messages == []


def test_tokens_are_shown_by_key(page: Browser, root: Path, address: str) -> None:
    make_run(root / "run", config=CONFIG)
    page.open(f"{address}report?run=run")
    page.hover(".answer .tokens .t:nth-child(3)", until="!document.getElementById('tip').hidden")
    page.hover("h1", until="document.getElementById('tip').hidden")
    page.run("document.getElementById('prompts').focus()")
    press(page, "ArrowDown", times=2)
    assert page.run("document.querySelectorAll('#prompts li')[2].getAttribute('aria-selected')") == "true"
    press(page, "ArrowUp")
    assert page.run("document.querySelectorAll('#prompts li')[1].getAttribute('aria-selected')") == "true"
    page.run("document.querySelector('.tokens').focus()")
    press(page, "ArrowRight", times=3)
    assert page.run("document.querySelectorAll('.tokens .t')[2].classList.contains('here')")
    tip = page.run("document.getElementById('tip').innerText")
    for part in ("the student's likeliest", "the teacher's likeliest", "kl forward"):
        assert part in tip
    assert page.run("document.querySelectorAll('#tip .bar').length") == 10
    press(page, "Escape")
    assert page.run("document.getElementById('tip').hidden")
    page.run("document.querySelector('#worst tbody tr').focus()")
    press(page, "Enter")
    assert page.run("document.querySelectorAll('.tokens .aim').length") == 1
    assert page.messages == []


def test_chosen_runs_are_compared(page: Browser, root: Path, address: str) -> None:
    make_run(root / "one", config=CONFIG, slowness=4)
    running = make_running(root / "two")
    make_sweep(root / "sweep", (0.3, 0.5, 0.7), finished=3)
    page.open(address)
    assert page.run("document.getElementById('compare').disabled")
    pick = "tr[data-name='{}'] input"
    page.run(f'document.querySelector("{pick.format("one")}").focus()')
    press(page, " ")
    click(page, pick.format("sweep"))
    assert page.run("document.getElementById('compare').textContent") == "Compare 4 runs"
    assert page.run("comparison().join('&')") == "run=one&run=sweep"
    click(page, pick.format("sweep/0_kl_weight=0.3"))
    assert page.run(f'document.querySelector("{pick.format("sweep")}").indeterminate')
    click(page, "#clear")
    click(page, pick.format("one"))
    click(page, pick.format("two"))
    click(page, "#compare")
    page.wait("document.documentElement?.dataset.drawn > 0 && document.title.startsWith('2 runs: ')")
    assert set(page.run("[...document.querySelectorAll('#legend button')].map(b => b.textContent)")) == {"one", "two"}
    click(page, "#legend button")
    page.run("document.querySelector('#legend button').focus()")
    append(running, 13)
    page.wait("[...document.querySelectorAll('#comparison tbody tr')].some(r => r.cells[2].innerText === '13')")
    assert page.run("document.activeElement === document.querySelector('#legend button[aria-pressed=true]')")
    page.open(f"{address}report?run=sweep")
    assert page.run("document.querySelectorAll('#comparison tbody tr').length") == 3
    assert page.run("[...document.querySelectorAll('#config thead th')].at(-1).innerText") == "loss.kl_weight"
    assert page.messages == []


def test_hostile_runs_execute_nothing(page: Browser, root: Path, address: str) -> None:
    folder = "<img src=x onerror=window.hurt=6>"
    config = "loss: {kl_type: '</script><script>window.hurt = 7</script>', topk: 64}\n'<b id=boo>': 1\n"
    config += "model: {student: {path: 'x<img src=x onerror=window.hurt=9>'}}\n"
    run = make_running(root / folder, words=HOSTILE, recorded=(0, 10))
    run.config.write_text(config)
    run.command.write_text("distill '</dd><script>window.hurt = 8</script>'\n")
    run.beat("<b>stage</b> 40")
    run.rank_log(0).write_text("<script>window.hurt = 10</script><img src=x onerror=window.hurt=11>\n")
    bad = {"</script><img src=x onerror=window.hurt=12>": 1.0, "teacher/<svg onload=window.hurt=13>/kl_forward": 0.5}
    append(run, 13, **bad, **{"val/');window.hurt=14;('/accuracy": 0.5, "teacher/'+(hurt=15)+'/kl_reverse": 0.1})
    make_sweep(root / "'><svg onload=window.hurt=16>", (0.3,), finished=1)
    broken = make_run(root / "broken", config="loss: ['<img src=x onerror=window.hurt=17>", recorded=())
    page.open(address)
    assert page.run("document.querySelectorAll('#runs tbody tr').length") == 4
    assert folder in page.run("document.body.innerText")
    query = page.run(
        f"[...document.querySelectorAll('tbody a')].find(a => a.textContent === {json.dumps(folder)}).href"
    )
    for path in (query, query + "&run=" + "%27%3E%3Csvg%20onload%3Dwindow.hurt%3D16%3E"):
        page.open(path)
        page.hover(".answer .tokens .t:nth-child(2)", until="!document.getElementById('tip').hidden")
        click(page, "#log summary")
        append(run, 14 if path == query else 15)
        page.wait(f"page.data.datasets.steps.some(row => row.step === {14 if path == query else 15})")
        page.hover(
            "#chart-positions .role-mark.mark-symbol path",
            until="document.querySelector('#vg-tooltip-element.visible') !== null",
        )
        assert "<img src=x onerror" in page.run("document.body.innerText")
        assert page.run("[window.hurt, document.querySelectorAll('img, b#boo, svg[onload]').length]") == [None, 0]
    assert page.messages == []
    page.call("Page.navigate", url=f"{address}report?run=nope<script>window.hurt=18</script>")
    page.wait("document.body?.innerText.includes('there is no such run')")
    assert page.run("window.hurt") is None
    assert broken.path.exists()


def test_policy_forbids_inline_scripts(page: Browser, root: Path, address: str) -> None:
    page.open(address)
    page.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hurt = 1'}))")
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=/x onerror=\"window.hurt = 2\">')")
    page.run("fetch('http://127.0.0.1:9/').catch(() => 0)")
    page.wait("document.querySelector('img').complete")
    assert page.run("window.hurt") is None
    assert any("script-src" in message for message in page.messages)
    assert any("connect-src" in message for message in page.messages)


def test_server_away_and_back(page: Browser, tmp_path: Path) -> None:
    run = make_running(tmp_path / "run", recorded=())
    with serving(tmp_path) as address:
        page.origins = (*page.origins, address)
        page.open(f"{address}report?run=run")
        page.wait("document.title.startsWith('running 12/40')")
    page.wait("!document.getElementById('notice').hidden")
    assert "The connection to distill ui is lost" in page.run("document.getElementById('notice').innerText")
    append(run, 13)
    with serving(tmp_path, port=urlsplit(address).port or 0):
        page.wait("document.title.startsWith('running 13/40') && document.getElementById('notice').hidden")
        run.path.rename(tmp_path / "moved")
        page.wait("document.getElementById('notice').innerText.includes('there is no such run')")
        (tmp_path / "moved").rename(run.path)
        page.wait("document.getElementById('notice').hidden")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_narrow_windows_are_not_exceeded(page: Browser, root: Path, address: str, dark: bool) -> None:
    make_run(root / ("long_name_" * 12), config=CONFIG)
    make_sweep(root / "sweep", (0.3, 0.7), finished=1)
    for path in ("", f"report?run={'long_name_' * 12}", "report?run=sweep"):
        page.call("Page.navigate", url="about:blank")
        page.open(address + path, dark=dark, width=420)
        assert page.run("document.documentElement.scrollWidth") <= 420
        background = page.run("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(20, 23, 27)") == dark
        if "long" in path:
            page.run("document.querySelector('.tokens').focus()")
            press(page, "ArrowRight", times=9)
            assert page.run("document.getElementById('tip').getBoundingClientRect().right") <= 420
    assert page.messages == []
