"""Show names and texts of strangers: control characters escaped, paths as a shell reads them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but for tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # they change the direction of what follows
    "\u2028\u2029\ud800-\udfff]"  # other line ends, and the bytes of a path that is not UTF-8
)


def escaped(text: str) -> str:
    r"""Return `text` with unsafe characters as Python writes them: ESC becomes \x1b."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    r"""Return `text` with unsafe characters and line feeds escaped: a line feed becomes \n."""
    return escaped(text).replace("\n", r"\n")


def quoted(path: Path | str) -> str:
    r"""Return a path as a shell reads it, for a command that can be copied from a message.

    What can't be printed is escaped in $'...', as bash does, and a leading dash is no flag.
    """
    text = f"./{path}" if str(path).startswith("-") else str(path)
    if text.isprintable():
        return shlex.quote(text)
    return f"$'{''.join(map(_spelt, text))}'"


def _spelt(character: str) -> str:
    r"""Return a character within $'...'. U+DC80 to U+DCFF are bytes that are not UTF-8."""
    number = ord(character)
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    if number < 0x80 or 0xDC80 <= number <= 0xDCFF:
        return f"\\x{number & 0xFF:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
