"""Text that others wrote, such as a model, made safe to print: no character of it can control the terminal."""

import unicodedata

KEPT = "\n\t"
PICTURES, DELETE = 0x2400, 0x7F
"""Unicode's pictures of the control characters from 0 on."""


def printable(text: str) -> str:
    """Return text with its control characters replaced by what shows them, one by one, so that parts can be printed.

    Escape sequences begin with one of them. Also replaced: characters that reverse the direction of the text around
    them or are not seen, and halves of surrogate pairs, which cannot be encoded.
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    code, kind = ord(character), unicodedata.category(character)
    if character in KEPT or kind not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in JOINERS:
        return character
    if code < 0x20:
        return chr(PICTURES + code)
    return "\u2421" if code == DELETE else f"\\u{code:04x}"


JOINERS = "\u200c\u200d"
"""Not seen, but scripts and emoji are wrong without them."""
