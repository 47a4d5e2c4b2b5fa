"""The questions of `distill check`: what is printed of each."""

from types import SimpleNamespace

from distill_cli.config.schema import Config
from distill_cli.config.variation import override
from distill_cli.ranks.check_rank import finding_line
from distill_cli.ranks.self_check import QUESTIONS, SelfCheck


def test_every_question_has_a_line() -> None:
    config = override(Config(), {"model.teacher.path": "other/teacher", "loss.temperature": 2.0})
    check = SimpleNamespace(config=config, name="")
    reported = [SelfCheck.answer(check, question, False, "1 (limit 0)") for question in QUESTIONS]
    lines = {finding.what: finding_line(finding) for finding in reported}
    assert len(lines) == len(QUESTIONS)
    assert all("1 (limit 0)" in line for line in lines.values())
    assert "model.teacher.path=other/teacher" in lines["teacher != student: the loss is not zero"]
    assert "loss.temperature=2.0" in lines["scorer and trainer agree on the student"]
