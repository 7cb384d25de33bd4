"""Records of texts with a label, or of words with one each -> examples for classification.

    {"text", "label"}    {"text", "text_pair", "label"}    {"tokens": [...], "labels": [...]}

Tokens are the tokenizer's own, special ones with them, as in training with transformers: what is
longer than the context is cut by the tokenizer, whose last special token stays.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checks import listed, place, require, shown, whole
from ..errors import ArgumentError, DataError
from .choices import OnLong, Split
from .encoding import tokenizer_fingerprint
from .examples import IGNORED, Indexable
from .fields import Named, text_of
from .forms import LABELLED, TAGGED, Form
from .recorded import Recorded
from .records import read_columns
from .tables import Written

TEXTS = Named(wanted=("text", "label"), more=("text_pair",), foreign=("tokens",))
WORDS = Named(wanted=("tokens", "labels"), foreign=("text",))


@dataclass(frozen=True, eq=False)
class Labelled(Recorded):
    """Examples with labels; `truncated` records lost `dropped` tokens."""

    examples: Sequence[Mapping[str, Any]]
    form: Form
    truncated: int = 0
    dropped: int = 0
    tokenizer_fingerprint: str | None = None

    def __getitem__(self, index: int) -> dict[str, Any]:
        held = self.examples[place(index, len(self))].items()
        return {k: torch.from_numpy(x).long() if isinstance(x, np.ndarray) else x for k, x in held}


def read_labelled(
    path: str | Path | Indexable,
    tokenizer: Callable[..., Any],
    context: int,
    labels: Mapping[str, int] | None = None,
    *,
    words: bool = False,
    split: Split = "line",
    fields: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    on_long: OnLong = "truncate",
) -> Labelled:
    """Texts and their labels (`words`: words and a label each) as examples of at most `context`
    tokens.

    A label is a number, a name, or a list of one kind (several labels, several numbers); names are
    numbered by `labels`, a model's config.label2id. Of a word's tokens the first has its label. A
    label of null is -100 in a list of words: none.

    Args:
        path: a file or folder, as in `read`; or records that are in memory.
        split, keep: as in `read`.
        fields: {"text": ..., "text_pair": ..., "label": ...} or {"tokens": ..., "labels": ...} to a
            file's own names.
        on_long: "refuse" what is longer than the context; else it is cut.

    Raises:
        DataError: a record lacks a field, has a label that is not known or is too long; names file
            and line.
        ArgumentError: a tokenizer without places of its words, or names that are no labels.
    """
    whole("context", context, 2)
    require(callable(tokenizer), "tokenizer", tokenizer, "a tokenizer of transformers' kind")
    columns = replace(WORDS if words else TEXTS, fields=fields, keep=tuple(keep))
    records = read_columns(path, split, columns)
    known = labels or {}
    encode = _words if words else _text
    examples, dropped = [], []
    for index in range(len(records)):
        found, lost = encode(record := records[index], tokenizer, context, known)
        if lost and on_long == "refuse":
            raise DataError(
                f"{record['source']}: {context + lost} tokens, but the context is {context}"
            )
        examples.append(found)
        dropped.append(lost)
    form = TAGGED if words else LABELLED
    return Labelled(
        records, examples, form, sum(map(bool, dropped)), sum(dropped),
        tokenizer_fingerprint(tokenizer),
    )  # fmt: skip


def _text(
    record: Mapping[str, Any], tokenizer: Callable[..., Any], context: int, known: Mapping[str, int]
) -> tuple[dict[str, Any], int]:
    """A text, or two, with one label; and how many tokens were cut off."""
    where, label = record["source"], record["label"]
    names = [name for name in ("text", "text_pair") if record.get(name) is not None]
    texts = [text_of(record[name], name, where) for name in names]
    if label is None or label == []:
        raise DataError(f"{where}: 'label' is {'null' if label is None else 'empty'}")
    found, lost = tokens_of(tokenizer, where, context, *texts)
    if isinstance(label, Written) and label not in known:
        label = str(label) if label.number is None else label.number
    some = label if isinstance(label, list) else [label]
    named = [isinstance(x, str) for x in some]
    if any(named):
        if not all(named):
            raise DataError(f"{where}: 'label' is {shown(label)}, names and numbers")
        some = [_number(x, known, where) for x in some]
        if isinstance(label, list):
            return _model_inputs(found) | {
                "label": [int(n in some) for n in range(len(known))]
            }, lost
    return _model_inputs(found) | {"label": some if isinstance(label, list) else some[0]}, lost


def _words(
    record: Mapping[str, Any], tokenizer: Callable[..., Any], context: int, known: Mapping[str, int]
) -> tuple[dict[str, Any], int]:
    """Words with a label each: the first token of a word has it."""
    where, words, labels = record["source"], record["tokens"], record["labels"]
    for name, values in (("tokens", words), ("labels", labels)):
        if not isinstance(values, list):
            raise DataError(f"{where}: {name!r} is {shown(values)}, not a list")
    if len(words) != len(labels):
        raise DataError(f"{where}: {len(words)} tokens, but {len(labels)} labels")
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(
            f"words need a fast tokenizer, not a {type(tokenizer).__name__}, which does not tell "
            "which tokens are which word's"
        )
    words = [text_of(word, "tokens", where) for word in words]
    numbers = [IGNORED if x is None else _number(x, known, where) for x in labels]
    found, lost = tokens_of(tokenizer, where, context, words, is_split_into_words=True)
    own, before = [], None
    for word in found.word_ids():
        own.append(IGNORED if word is None or word == before else numbers[word])
        before = word
    return _model_inputs(found) | {"labels": np.array(own, np.int32)}, lost


def tokens_of(
    tokenizer: Callable[..., Any], where: str, context: int, *texts: Any, **more: Any
) -> tuple[Any, int]:
    """What a tokenizer makes of a text, cut to the context, and how many tokens it lost."""
    try:
        found = tokenizer(*texts, verbose=False, **more)
        lost = max(0, len(found["input_ids"]) - context)
        if lost:
            found = tokenizer(*texts, truncation=True, max_length=context, **more)
    except Exception as error:  # of any kind: tokenizers assert what they were not made for
        raise ArgumentError(f"{where}: the tokenizer cannot encode it ({error})") from error
    if not len(found["input_ids"]):
        raise DataError(f"{where}: its text has no tokens")
    return found, lost


def _model_inputs(found: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens, and their types where there are two."""
    made = {"input_ids": np.array(found["input_ids"], np.int32)}
    if any(types := found.get("token_type_ids") or ()):
        made["token_type_ids"] = np.array(types, np.int32)
    return made


def _number(label: Any, known: Mapping[str, int], where: str) -> Any:
    """A label as it is, or the number of its name."""
    if not isinstance(label, str):
        return label
    if label not in known:
        names = listed([repr(x) for x in known], 8) or "none by name"
        raise DataError(f"{where}: label {label!r} is none of the model's: {names}")
    return known[label]
