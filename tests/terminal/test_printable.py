"""Nothing that a model writes controls the terminal."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from distill_cli.terminal.printable import JOINERS, KEPT, printable


def test_control_characters_become_pictures() -> None:
    assert printable("\x1b[31mred\x07\x7f\r") == "␛[31mred␇␡␍"
    assert printable("\x9b2J \u202egpj\u2066 \u2028 \ufeff") == r"\u009b2J \u202egpj\u2066 \u2028 \ufeff"
    assert printable("\ud83d") == r"\ud83d"


def test_ordinary_text_stays() -> None:
    for text in ("", "a b\n\tc", "naïve 日本語 🙂", "\u0645\u06cc\u200c\u062e", "👩\u200d🚀"):
        assert printable(text) == text


@given(st.text(st.characters()), st.text(st.characters()))
def test_parts_are_as_safe_as_the_whole(one: str, other: str) -> None:
    shown = printable(one) + printable(other)
    assert shown == printable(one + other)
    assert {character for character in shown if unicodedata.category(character) in ("Cc", "Cf", "Cs")} <= {
        *KEPT,
        *JOINERS,
    }
