"""`distill chat` as a user types it: at a terminal, in a pipe, and with what cannot be."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_cli.folders.run_dir import Element, SweepDir
from distill_cli.models.model_files import ASSETS
from tests.chat.terminal import Terminal
from tests.end_to_end.conftest import Finished, refused

pytestmark = pytest.mark.slow

COMMAND = (sys.executable, "-m", "distill_cli", "chat")
QUESTIONS = ("What is 47 + 85 - 16?", "What is 99 + 13?")
ESCAPES = "\x1b[31m\x9b2J\x1b]0;mine\x07"


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A mark in the environment of every process that the test starts; none may be left after it."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("DISTILL_TEST_MARK", mark)
    yield mark
    assert processes_with(mark) == []


def processes_with(mark: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("DISTILL_TEST_MARK") == mark:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped student, which here never ends an answer and writes escape sequences in place of ####."""
    folder = tmp_path_factory.mktemp("models") / "endless"
    shutil.copytree(ASSETS / "tiny_pair/student", folder)
    for name, ends in (("config.json", 511), ("generation_config.json", 511), ("tokenizer_config.json", None)):
        content = json.loads((folder / name).read_text())
        key = "eos_token" if ends is None else "eos_token_id"
        (folder / name).write_text(json.dumps(content | {key: ends}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    replaced = {"type": "Replace", "pattern": {"String": "####"}, "content": ESCAPES}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"], replaced]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def places(one_rank: Finished, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name: two models, one without its tokenizer, a run without weights, and a sweep."""
    root, model = tmp_path_factory.mktemp("places"), ASSETS / "tiny_pair/student"
    found = {name: root / name for name in ("weightless", "sweep", "untokenized")}
    found["weightless"].mkdir()
    for name in ("config.yaml", "command.txt", "resolved.json"):
        shutil.copy(one_rank.run.path / name, found["weightless"])
    SweepDir(found["sweep"]).write(command=["distill"], elements=[Element(0, "0_topk=4", [])])
    shutil.copytree(model, found["untokenized"], ignore=shutil.ignore_patterns("tokenizer*"))
    return {**found, "model": model, "other": ASSETS / "tiny_pair/other_teacher"}


def logp_of(folder: Path, ids: Sequence[int], *, start: int, temperature: float) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary at each token from `start` on, by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)


def test_lines_with_the_kl_of_each_token(one_rank: Finished, marked: str) -> None:
    """The run's loss: mixed with weight 0.3, the teacher's top-16 and the rest, temperature 1.5."""
    done = subprocess.run(
        [*COMMAND, "runs/latest", "--against", "before", "--json", "--kl"],
        cwd=one_rank.folder, input="\n\n".join(QUESTIONS), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    name, teacher = one_rank.run.path.name, ASSETS / "tiny_pair/teacher"
    assert [(row["question"], row["model"]) for row in rows] == [(q, m) for q in QUESTIONS for m in (name, "before")]
    tokenizer = AutoTokenizer.from_pretrained(one_rank.run.student)
    for row in rows:
        student = one_rank.run.student if row["model"] == name else ASSETS / "tiny_pair/student"
        prompt = f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        assert tokenizer.decode(row["token_ids"], skip_special_tokens=True) == row["answer"]
        assert (len(row["token_ids"]), row["ended"]) == (row["tokens"], "stop" if row["tokens"] < 30 else "length")
        ids, kl = prompt_ids + row["token_ids"], row["kl"]
        p, q = (logp_of(one, ids, start=len(prompt_ids), temperature=1.5) for one in (teacher, student))
        top = p.topk(16).indices
        classes = []
        for logp in (p, q):
            rest = logp.scatter(1, top, -torch.inf).logsumexp(-1, keepdim=True)
            classes.append(torch.cat([logp.gather(1, top), rest], dim=1))
        forward = (classes[0].exp() * (classes[0] - classes[1])).sum(-1)
        reverse = (classes[1].exp() * (classes[1] - classes[0])).sum(-1)
        assert kl["kl_forward"] == pytest.approx(forward.tolist(), rel=2e-3, abs=1e-5)
        assert kl["loss"] == pytest.approx((0.3 * forward + 0.7 * reverse).tolist(), rel=2e-2, abs=1e-4)
        assert kl["mean"]["kl_forward"] == pytest.approx(float(forward.mean()), rel=2e-3)
        sampled = torch.tensor(row["token_ids"])[:, None]
        assert kl["teacher_logp"] == pytest.approx(p.gather(1, sampled)[:, 0].tolist(), rel=1e-3, abs=1e-4)
        assert "the teacher's top-16 and the rest as one more class, at temperature 1.5" in kl["of"]
        assert "mixed, kl_weight=0.3" in kl["trained"]
        likeliest = [(text, probability) for (text, probability), *_ in kl["student_top"]]
        best = q.exp().max(-1)
        assert [text for text, _ in likeliest] == [tokenizer.decode([token]) for token in best.indices]
        assert [probability for _, probability in likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)
    by_model = {row["model"]: row["kl"]["mean"]["kl_forward"] for row in rows[:2]}
    assert by_model[name] < by_model["before"]


@pytest.mark.exhaustive
def test_a_conversation_at_a_terminal(one_rank: Finished, endless: Path, marked: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved.jsonl"
    flags = ("--against", str(endless), "--max-new-tokens", "480")
    terminal = Terminal([*COMMAND, "runs/latest", *flags], folder=one_rank.folder, width=120)
    try:
        terminal.wait_for("Ctrl-D leaves")
        talk(terminal, one_rank.run.path.name, saved)
        terminal.type("\x04")
        assert terminal.end() == 0, terminal.seen
        assert terminal.modes() == terminal.modes_before
    finally:
        terminal.close()
    seen = terminal.seen
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")  # the cursor is back
    assert "␛[31m" in seen
    assert not re.search("\x1b\\[31m|\x9b|\x1b]0;", seen)
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [row["question"] for row in rows] == [*QUESTIONS, QUESTIONS[0]]
    assert all(row["messages"][0] == {"role": "system", "content": "Be brief."} for row in rows)
    assert ESCAPES in rows[2]["answer"]


def talk(terminal: Terminal, name: str, saved: Path) -> None:
    """Type what a user may, and check what is shown."""

    def do(line: str, *expected: str) -> None:
        terminal.type(f"{line}\r")
        for text in expected:
            terminal.wait_for(text)
        terminal.wait_for("> \x1b[0m")

    terminal.wait_for("> \x1b[0m")
    do("/systm", "no such command; did you mean /system?")
    do("/kl", "nothing was answered yet")
    do("/system Be brief.", "system prompt from the next answer on: Be brief.")
    terminal.type(f"{QUESTIONS[0]}\r")
    for text in (name[:20], "endless", "␛[31m"):  # two columns, as they are written
        terminal.wait_for(text)
    terminal.type("\x03")
    terminal.wait_for("stopped; what is written stays")
    terminal.wait_for("> \x1b[0m")
    do("/kl", "starting the teacher", name, "means of", "endless", "means of", "at temperature 1.5", "kl_weight=0.3")
    terminal.interrupt_for("(Ctrl-D or /exit leaves)")
    do("/retry", "cut off: the context of 512 tokens is full; /reset")
    do(QUESTIONS[1], "endless: the conversation has", "tokens with this message, and the context 512")
    do("/help", "Ctrl-C")
    do(f"/save {saved}", "saved 3 rows")
    do("/reset", "a new conversation begins")
    do(f"/save {saved}", "nothing was answered yet")


@pytest.mark.exhaustive
def test_a_dead_engine_ends_the_chat(one_rank: Finished, marked: str) -> None:
    with subprocess.Popen(
        [*COMMAND, "runs/latest", "--temperature", "0"],
        cwd=one_rank.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as chat:  # fmt: skip
        assert chat.stdin
        assert chat.stdout
        chat.stdin.write(f"{QUESTIONS[0]}\n")
        chat.stdin.flush()
        assert chat.stdout.readline()
        (engine,) = psutil.Process(chat.pid).children()
        engine.send_signal(signal.SIGKILL)
        engine.wait()
        _, stderr = chat.communicate(f"{QUESTIONS[1]}\n", timeout=60)
    assert chat.returncode == 1
    assert f"({one_rank.run.student}) was killed by SIGKILL" in stderr
    assert "Traceback" not in stderr


def test_a_signal_leaves_no_engine(one_rank: Finished, marked: str) -> None:
    chat = subprocess.Popen([*COMMAND, "runs/latest"], cwd=one_rank.folder, stdin=subprocess.PIPE, stderr=-1, text=True)
    while not psutil.Process(chat.pid).children():
        assert chat.poll() is None
    chat.terminate()
    _, stderr = chat.communicate(timeout=60)
    assert chat.returncode == 128 + signal.SIGTERM
    assert stderr == "stopped by SIGTERM; no process was left behind\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "are required: RUN|MODEL"),
        (["/nowhere"], "/nowhere: no such folder"),
        (["{weightless}"], "has no trained student and no checkpoint yet; give another run, or a model"),
        (["{sweep}"], "is a sweep; give one of its runs, such as"),
        (["{untokenized}"], "has no tokenizer"),
        (["runs/latest", "--step", "2"], "no checkpoint 2"),
        (["runs/latest", "--against", "befor"], "befor: no such run, folder or model of the run; did you mean before?"),
        (["runs/latest", "--against", "/nowhere"], "/nowhere: no such folder"),
        (
            ["runs/latest", "--against", "teacher", "model.teacher.url=http://127.0.0.1:1"],
            "it is on a server; give its",
        ),
        (["package://tiny_pair/student", "--against", "before"], "and package://tiny_pair/student is no run"),
        (["{model}", "--against", "teacher"], "no teacher is known; give a run, or set model.teacher.path"),
        (["{model}", "--kl"], "KL: from which teacher? set model.teacher.path, or give a run"),
        (["runs/latest", "--teacher", "techer"], "--teacher techer: no such teacher; did you mean teacher?"),
        (["runs/latest", "--kl", "model.teachers.a.path=x", "model.teachers.b.path=y"], "give --teacher, one of a, b"),
        (["runs/latest", "--kl", "model.teacher.path=/nowhere"], "model.teacher.path=/nowhere: no such folder"),
        (["runs/latest", "--kl", "model.teacher.path={other}"], "vocabulary is not the student's"),
        (["runs/latest", "--kl", "model.teacher.path=student", "model.teacher.ema=0.9"], "whose weights are gone"),
        (["runs/latest", "--temperature", "3"], "rollout.temperature=3.0: must be at least 0 and at most 2"),
        (["runs/latest", "--max-new-tokens", "0"], "rollout.max_new_tokens=0: must be a number of tokens"),
        (["runs/latest", "--seed", "x"], "train.seed=x"),
        (["runs/latest", "eval.temperature=1"], "a chat does not read it; set rollout.temperature"),
        (["runs/latest", "train.lr=1"], "train.lr=1: a chat does not read it; leave it out"),
        (["runs/latest", "loss.topk=4,8"], "loss.topk=4,8: takes no sweep"),
        (["runs/latest", "cluster=slurm"], "distill chat runs where it is typed"),
        (["runs/latest", "engine.student.max_model_len=513"], "must be from 2 to 512, the positions of"),
        (["runs/latest", "engine.student.kv_cache_gib=1e6"], "do not fit into the"),
        (["runs/latest", "--kl", "engine.teacher.kv_cache_gib=1e6"], "do not fit into the"),
        (["runs/latest", "cluster.gpus_per_node=99"], "visible GPUs"),
        (["runs/latest", "data.prompt_template=x"], "data.prompt_template=x: must contain {question}"),
    ],
)
def test_impossible_chats_are_refused(
    one_rank: Finished,
    places: dict[str, Path],
    argv: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    typed = [word.format_map(places) for word in argv]
    assert message in "\n".join(refused(one_rank.folder, monkeypatch, capsys, "chat", *typed))
