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
from typing import Any

from ..errors import ArgumentError, DataError
from .encoding import Encoded, encoded

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

    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(tools=record.get("tools"))

    def marked(count: int) -> tuple[str, list[tuple[int, int]]]:
        (text,), (spans,) = render_jinja_template(
            [messages[:count]], tools=record.get("tools"), chat_template=template,
            return_assistant_tokens_mask=True, **tokenizer.special_tokens_map,
        )  # fmt: skip
        return text, spans

    text, spans = marked(len(messages))
    if asked != answers:
        # What is marked of the turns before is the prompt's: by its place, or, where a template
        # renders them otherwise when others follow, by its number.
        before, prompts = marked(asked[0]) if asked and asked[0] else ("", [])
        if text.startswith(before):
            spans = [span for span in spans if asked and span[0] >= len(before)]
        else:
            spans = spans[len(prompts) :]
        if asked and not spans:
            raise DataError(
                f"{record['source']}: the chat template marks nothing of turn {asked[-1] + 1} as "
                "what the assistant says"
            )
    (one,) = encoded(tokenizer, [text], ends=True)
    # What is white space at its end may stand in no token.
    said = ((start, stop, start + len(text[start:stop].rstrip())) for start, stop in spans)
    return _labelled(tokenizer, text, one, said)


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
        # A line end after the turn is the template's.
        if start < stop:
            spans.append((start, stop, stop))
    return _labelled(tokenizer, text, one, spans)


def _labelled(
    tokenizer: Any, text: str, one: Encoded, spans: Iterable[tuple[int, int, int]]
) -> array:
    """Ids of tokens within the spans as they are, others ~id. A span: from where, to where, and
    where its last character that is no white space ends; a token that reaches over that is within.

    A special token that takes the white space after it along (Phi-3's `<|assistant|>`) may begin
    before the answer, and has no label then.
    """
    added = _added(tokenizer)
    marked = array("i", (~i for i in one.ids))
    for start, stop, end in spans:
        first, last = bisect_right(one.ends, start), bisect_right(one.ends, stop)
        if start < end:
            last = max(last, bisect_left(one.ends, end) + 1)
        token = added.get(one.ids[first]) if first < len(one.ids) else None
        if token is not None and token.special and token.rstrip:
            first += bool(text[one.ends[first - 1] if first else 0 : start].strip())
        marked[first:last] = array("i", one.ids[first:last])
    return marked


def _added(tokenizer: Any) -> dict[int, Any]:
    """Tokens beside the vocabulary's, by id."""
    found: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return found
