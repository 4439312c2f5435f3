"""What may stand in a page: characters that XML forbids, or that would change how the text around them reads, by name.

Model output may hold anything: control characters, lone surrogates, marks that turn the direction of what follows.
"""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup

# Controls but tab and line feed, what Unicode calls no character, lone surrogates, and what reorders a line.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufeff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
    "|[" + "".join(chr(plane * 0x10000 + end) for plane in range(17) for end in (0xFFFE, 0xFFFF)) + "]"
)


def _named(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"


def visible(value: Any) -> Any:
    """The value with every such character replaced by a visible name; markup and what is no text stay as they are."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _HIDDEN.sub(_named, value)


def shown_token(text: str) -> str:
    """A token's text with its line feeds and tabs visible; an empty one as a mark."""
    return text.replace("\n", "\u21b5\n").replace("\t", "\u2192\t") or "\u2205"
