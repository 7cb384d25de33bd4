"""Texts -> token ids by a tokenizer of transformers' kind; long ones piece by piece.

What a tokenizer keeps beside its ids is some 180 bytes a character. A text longer than `PIECE` is
therefore cut into pieces that overlap, and two pieces are joined in the middle of a run of tokens
that both have at the same place: there neither knows of its edge any more.
"""

import json
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..store.fingerprint import fingerprint

# Characters of a piece, and of what two have in common; tokens that two must agree on.
PIECE, OVERLAP, AGREED = 1 << 18, 1 << 12, 32


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Identifies a tokenizer by all that its ids depend on, or, where that is not at hand, by its
    vocabulary; None of one that tells neither. How it pads and cuts is left out: we do not ask it
    to.
    """
    rules = getattr(tokenizer, "backend_tokenizer", None)
    if rules is not None:
        told = json.loads(rules.to_str()) | {"padding": None, "truncation": None}
        return fingerprint(
            json.dumps(told, sort_keys=True), getattr(tokenizer, "bos_token_id", None)
        )
    find = getattr(tokenizer, "get_vocab", None)
    if not callable(find):
        return None
    words = sorted((repr(word), i) for word, i in find().items())
    return fingerprint(type(tokenizer).__name__, words, getattr(tokenizer, "bos_token_id", None))


@dataclass
class Encoded:
    """ids of a text, and the character that each token ends before (none if not asked for)."""

    ids: array
    ends: array


def encoded(tokenizer: Callable[..., Any], texts: list[str], ends: bool = False) -> list[Encoded]:
    """Every text without special tokens; `ends` needs a fast tokenizer."""
    if getattr(tokenizer, "is_fast", False) and max(map(len, texts)) > PIECE:
        one_by_one = (
            _long(tokenizer, x) if len(x) > PIECE else _whole(tokenizer, [x], ends)[0]
            for x in texts
        )
        return list(one_by_one)
    return _whole(tokenizer, texts, ends)


def _whole(tokenizer: Callable[..., Any], texts: list[str], ends: bool) -> list[Encoded]:
    more = {"return_offsets_mapping": True} if ends else {}
    found = tokenizer(texts, add_special_tokens=False, verbose=False, **more)
    spans: Sequence[Any] = found["offset_mapping"] if ends else [()] * len(texts)
    return [
        Encoded(array("i", ids), array("q", (stop for _, stop in places)))
        for ids, places in zip(found["input_ids"], spans, strict=True)
    ]


def _long(tokenizer: Callable[..., Any], text: str) -> Encoded:
    """One text, a piece at a time; as a whole where two pieces agree nowhere."""
    (one,) = _whole(tokenizer, [text[:PIECE]], True)
    for start in range(PIECE - OVERLAP, len(text) - OVERLAP, PIECE - OVERLAP):
        (new,) = _whole(tokenizer, [text[start : start + PIECE]], True)
        new.ends = array("q", (start + end for end in new.ends))
        place = _agreement(one, new)
        if place is None:
            return _whole(tokenizer, [text], True)[0]
        old, at = place
        del one.ids[old:], one.ends[old:]
        one.ids.extend(new.ids[at:])
        one.ends.extend(new.ends[at:])
    return one


def _agreement(one: Encoded, new: Encoded) -> tuple[int, int] | None:
    """Where, in either, the middle of the first run lies that both have; None without any."""
    for at, end in enumerate(new.ends):
        old = bisect_left(one.ends, end)
        if old + AGREED > len(one.ids) or at + AGREED > len(new.ids):
            return None
        both = ((x.ids[i : i + AGREED], x.ends[i : i + AGREED]) for x, i in ((one, old), (new, at)))
        if next(both) == next(both):
            return old + AGREED // 2, at + AGREED // 2
    return None
