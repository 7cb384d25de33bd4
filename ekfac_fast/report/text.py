"""Tokens and numbers as a reader sees them. Nothing here is HTML: the templates escape it."""

import json
import math
import re
from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from typing import Any

# What would vanish, break the line order or turn the text around: controls, soft hyphen, bidi and
# other format characters, fillers, variation selectors, surrogates, private use, noncharacters. The
# joiners U+200C and U+200D stay, since scripts and emoji need them.
HIDDEN = re.compile(
    "([\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff\ud800-\uf8ff\U000e0000-\U000e01ef"
    "\U000f0000-\U0010ffff])"
)
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def amount(n: int) -> str:
    """A number of parameters: 12,345 or 1.2M."""
    return f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n:,}"


def pieces(token: str) -> list[str]:
    """Text and placeholders by turns, text first; an empty token is one placeholder."""
    if not token:
        return ["", "‹empty›"]
    found = HIDDEN.split(token)
    found[1::2] = map(placeholder, found[1::2])
    return found


def placeholder(char: str) -> str:
    """A visible name: ↵ for a line end, ‹E2› for a byte that is no UTF-8, else the code point."""
    code = ord(char)
    if code in (0x09, 0x0A):
        return "⇥\t" if code == 0x09 else "↵\n"
    if 0xDC80 <= code <= 0xDCFF:  # bytes.decode("utf-8", "surrogateescape")
        return f"‹{code - 0xDC00:02X}›"
    return f"‹U+{code:04X}›"


def plain(tokens: tuple[str, ...]) -> str:
    """Tokens as one line, for titles and navigation."""
    return " ".join("".join(piece for token in tokens for piece in pieces(token)).split())


def number(x: float, digits: int = 3, sign: bool = False) -> str:
    """1234.5 -> 1,230; 1.23e-5 -> 1.23·10⁻⁵; a true minus; a sign always on request."""
    if not math.isfinite(x):
        return "not finite"
    plus = "+" if sign and x > 0 else ""
    if x == 0:
        return "0"
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    if -3 <= int(exponent) < 6:
        places = max(digits - 1 - int(exponent), 0)
        shown = f"{round(x, digits - 1 - int(exponent)):,.{places}f}"
    else:
        shown = f"{mantissa}·10{str(int(exponent)).translate(SUPERSCRIPT)}"
    return plus + shown.replace("-", "−")


def tick(x: float) -> str:
    """Three digits at most, for an axis: 0.02, 5·10⁻⁵."""
    mantissa, times, power = number(x).partition("·")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return mantissa + times + power


def signed(x: float) -> str:
    """Three digits and the sign."""
    return number(x, 3, sign=True)


def brief(x: float) -> str:
    """Two digits in few bytes, for the title of every token: +1.2e-5."""
    shown = f"{x:+.1e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return shown.removesuffix("e0")


def duration(seconds: float) -> str:
    """0.42 s, 7.3 s, 1 min 35 s, 2 h 10 min."""
    if seconds < 60:
        return f"{number(seconds, 2)} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} min"


def short_names(layers: tuple[str, ...]) -> list[str]:
    """Layer names without the modules that all of them share, last to first: as rows are drawn."""
    paths = [name.split(".") for name in layers]
    common = len(list(takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))))
    return [".".join(path[common:] or path[-1:]) for path in reversed(paths)]


class TokenTexts:
    """The text of each token by itself; bytes that are no UTF-8 become surrogates.

    What depends on the tokenizer alone is found once: its JSON is megabytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_tokens)
        self._table = _byte_of_character() if _byte_level(tokenizer) else None

    def __call__(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The texts of token ids."""
        pieces = self._tokenizer.convert_ids_to_tokens(list(ids))
        return tuple(p if p in self._special else _text(p, self._table) for p in pieces)


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's stand-ins for bytes, inverted: printable ones are themselves, others are 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and '"ByteLevel"' in json.dumps(
        json.loads(backend.to_str()).get("decoder")
    )


def _text(piece: str, table: dict[str, int] | None) -> str:
    if table is not None and all(c in table for c in piece):
        return bytes(table[c] for c in piece).decode("utf-8", "surrogateescape")
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes([int(byte[1], 16)]).decode("utf-8", "surrogateescape")
    return piece.replace("\u2581", " ")
