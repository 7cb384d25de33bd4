"""Conversations -> token ids, as a model sees them in training.

The text is what the tokenizer's chat template makes of the messages, without a token more. What
the assistant says in it has labels: the turn and what ends it. Templates with `{% generation %}`
tell where that is. Of others it is found by rendering the messages before a turn, and those with
it: both must be how the whole begins.
"""

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from ..errors import ArgumentError, DataError
from .encoding import encoded

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def is_conversation(record: dict[str, Any]) -> bool:
    """Whether a record is of messages; else of strings."""
    return "messages" in record or isinstance(record.get("prompt"), list)


def encode(tokenizer: Any, record: dict[str, Any], last: bool) -> array:
    """Ids of a conversation, [T]; of a token without a label ~id.

    Labels have what the assistant says, of a prompt and a completion in the completion; of messages
    in all turns or, with `last`, in the last.

    Raises:
        ArgumentError: the tokenizer has no chat template, or tells no places of its tokens.
        DataError: the template cannot render the record, or renders the beginning of a conversation
            otherwise than in the whole; the last turn is not the assistant's.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError(
            f"{record['source']}: a conversation, but the tokenizer has no chat template; give one "
            "(tokenizer.chat_template, or --chat-template FILE)"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(
            f"{record['source']}: a conversation needs a fast tokenizer, not a "
            f"{type(tokenizer).__name__}, which does not tell where its tokens stand in a text"
        )
    messages = record.get("messages") or [*record["prompt"], *record["completion"]]
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    if "messages" not in record:
        asked = [i for i in answers if i >= len(record["prompt"])]
    elif not last:
        asked = answers
    elif answers[-1:] == [len(messages) - 1]:
        asked = answers[-1:]
    else:
        raise DataError(
            f"{record['source']}: a query ends with what the assistant says; its last turn is of "
            f"{messages[-1]['role']!r}"
        )
    try:
        if GENERATION.search(tokenizer.get_chat_template(tools=record.get("tools"))):
            return _by_template(tokenizer, record, messages, answers, asked)
        return _by_prefix(tokenizer, record, messages, asked)
    except DataError:
        raise
    except Exception as error:  # whatever a template does
        raise DataError(
            f"{record['source']}: the chat template cannot render it ({error})"
        ) from error


def _by_template(
    tokenizer: Any,
    record: dict[str, Any],
    messages: list[dict],
    answers: Sequence[int],
    asked: Sequence[int],
) -> array:
    """What stands between `{% generation %}` and `{% endgeneration %}`."""

    def marked(count: int) -> tuple[list[int], list[tuple[int, int]]]:
        found = tokenizer.apply_chat_template(
            messages[:count], tools=record.get("tools"), return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        at, spans = 0, []
        for said, run in groupby(found["assistant_masks"]):
            start, at = at, at + len(list(run))
            if said:
                spans.append((start, at))
        return found["input_ids"], spans

    ids, spans = marked(len(messages))
    if asked != answers:
        # What is marked of the turns before is the prompt's: by its place, or, where a template
        # renders them otherwise when others follow, by its number.
        before, prompts = marked(asked[0]) if asked and asked[0] else ([], [])
        if ids[: len(before)] == before:
            spans = [span for span in spans if span[0] >= len(before)]
        else:
            spans = spans[len(prompts) :]
        if asked and not spans:
            raise DataError(
                f"{record['source']}: the chat template marks nothing of turn {asked[-1] + 1} as "
                "what the assistant says"
            )
    return _labelled(tokenizer, ids, spans)


def _by_prefix(
    tokenizer: Any, record: dict[str, Any], messages: list[dict], asked: Sequence[int]
) -> array:
    """From where the assistant is to begin, to where the text with its turn ends."""

    def rendered(count: int, **settings: Any) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tools=record.get("tools"), tokenize=False, **settings
        )

    text = rendered(len(messages))
    (one,) = encoded(tokenizer, [text], ends=True)
    special = {*getattr(tokenizer, "all_special_ids", ()), *_added(tokenizer)}

    def shared(*texts: str) -> int:
        """Up to where texts are alike, if a special token of the whole ends there; else 0."""
        same = next((n for n, x in enumerate(zip(*texts, strict=False)) if len({*x}) > 1), None)
        same = min(map(len, texts)) if same is None else same
        at = bisect_right(one.ends, same)
        while at and one.ids[at - 1] not in special:
            if text[one.ends[at - 2] if at > 1 else 0 : one.ends[at - 1]].strip():
                return 0
            at -= 1  # white space between
        return one.ends[at - 1] if at else 0

    spans = []
    for i in asked:
        if not i:
            continue  # nothing is there that it answers
        prompt, after = rendered(i, add_generation_prompt=True), rendered(i + 1)
        start, stop, whole = len(prompt), len(after.rstrip()), text.startswith(after)
        if not after.startswith(prompt):
            # The prompt of an answer goes on (with a tag to think in) where none is rendered.
            start = shared(text, prompt, after)
        if not whole or i + 1 == len(messages):
            # What ends a conversation stands after its last turn alone.
            short = shared(text, after, rendered(i + 1, add_generation_prompt=True))
            if short > start or not whole:
                stop = short
        if not (text.startswith(after[:start]) and 0 < start < max(stop, start + whole)):
            raise DataError(
                f"{record['source']}: the chat template renders turn {i + 1} otherwise where the "
                "conversation ends with it, or where it is to begin, so that its place is not "
                "known; give a template with {% generation %} and {% endgeneration %} around what "
                "the assistant says"
            )
        # A line end after the turn is the template's; a token that reaches over it is the turn's.
        if start < stop:
            last = max(bisect_right(one.ends, stop), bisect_left(one.ends, stop) + 1)
            spans.append((bisect_right(one.ends, start), last))
    return _labelled(tokenizer, one.ids, spans)


def _labelled(tokenizer: Any, ids: Sequence[int], spans: Iterable[tuple[int, int]]) -> array:
    """Ids within the spans as they are, others ~id.

    A special token that takes the white space after it along (Phi-3's `<|assistant|>`) begins
    before the answer, and has no label.
    """
    added = _added(tokenizer)
    marked = array("i", (~i for i in ids))
    for start, stop in spans:
        first = added.get(ids[start]) if start < len(ids) else None
        start += first is not None and bool(first.special and first.rstrip)
        marked[start:stop] = array("i", ids[start:stop])
    return marked


def _added(tokenizer: Any) -> dict[int, Any]:
    """Tokens beside the vocabulary's, by id."""
    found: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return found
