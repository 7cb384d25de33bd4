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
    found = tokenizer.apply_chat_template(
        messages, tools=record.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    ids, at, spans = found["input_ids"], 0, []
    for said, run in groupby(found["assistant_masks"]):
        start, at = at, at + len(list(run))
        if said:
            spans.append((start, at))
    if asked != answers:
        if len(spans) != len(answers):
            raise DataError(
                f"{record['source']}: the chat template marks {len(spans)} answers, the "
                f"conversation has {len(answers)} turns of the assistant"
            )
        spans = [span for i, span in zip(answers, spans, strict=True) if i in asked]
    return _labelled(ids, spans)


def _by_prefix(
    tokenizer: Any, record: dict[str, Any], messages: list[dict], asked: Sequence[int]
) -> array:
    """From where the assistant is to begin, to where the text with its turn ends."""

    def rendered(count: int, **settings: Any) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tools=record.get("tools"), tokenize=False, **settings
        )

    text, places = rendered(len(messages)), []
    for i in asked:
        before, after = rendered(i, add_generation_prompt=True), rendered(i + 1)
        if not (text.startswith(after) and after.startswith(before)):
            raise DataError(
                f"{record['source']}: the chat template renders turn {i + 1} otherwise where the "
                "conversation ends with it, so that its place is not known; give a template with "
                "{% generation %} and {% endgeneration %} around what the assistant says"
            )
        # A line end after the turn is the template's: the assistant has stopped before.
        places.append((len(before), max(len(before), len(after.rstrip()))))
    (one,) = encoded(tokenizer, [text], ends=True)
    spans = (
        (bisect_right(one.ends, x), max(bisect_right(one.ends, y), bisect_left(one.ends, y) + 1))
        for x, y in places
        if x < y
    )
    return _labelled(one.ids, spans)


def _labelled(ids: Sequence[int], spans: Iterable[tuple[int, int]]) -> array:
    """Ids within the spans as they are, others ~id."""
    marked = array("i", (~i for i in ids))
    for start, stop in spans:
        marked[start:stop] = array("i", ids[start:stop])
    return marked
