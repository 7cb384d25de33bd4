"""Where the turns of a conversation stand among its tokens."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any


def turns(record: Any, tokens: Sequence[str]) -> tuple[tuple[int, str], ...]:
    """(first token, role) of every turn of a record of messages whose text is found, in order.

    tokens: their texts, as `TokenTexts` gives them. A chat template writes what is said as it is;
    where it does not, or the end was cut off, that turn is not marked.
    """
    if not isinstance(record, Mapping):
        return ()
    asked, answered = record.get("prompt"), record.get("completion")
    messages = record.get("messages")
    if messages is None and isinstance(asked, list) and isinstance(answered, list):
        messages = [*asked, *answered]
    pieces = [token.encode("utf-8", "surrogateescape") for token in tokens]
    ends, text, at = list(accumulate(map(len, pieces))), b"".join(pieces), 0
    found = []
    for message in messages or ():
        said = message.get("content")
        words = said.strip().encode("utf-8", "replace") if isinstance(said, str) else b""
        place = text.find(words, at) if words else -1
        if place < 0:
            continue
        at = place + len(words)
        first = next(t for t, end in enumerate(ends) if end > place)
        found.append((first, str(message.get("role", ""))))
    return tuple(found)
