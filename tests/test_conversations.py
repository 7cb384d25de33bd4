"""Conversations as a model sees them: the chat template's text, labels on the assistant's words."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from test_data import bpe, jsonl
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from ekfac_fast.data import Tokens, read, read_queries, tokenize
from ekfac_fast.errors import ArgumentError, DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral's: a BOS token of its own, the system's words in the first question, turns alternate.
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] "
    "%}{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.first and system is defined else '') + m['content'] + "
    "'[/INST]' }}{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
# As Qwen3's: only a last turn shows that there was room to think.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What jumps over the lazy dog?"},
    {"role": "assistant", "content": "The quick brown fox. "},
    {"role": "user", "content": "And what is used by with?"},
    {"role": "assistant", "content": "A context manager."},
]


def speaking(template: str | None, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = bpe(bos)
    tokenizer.chat_template = template
    return tokenizer


def labelled(tokenizer: PreTrainedTokenizerFast, tokens: Tokens, index: int = 0) -> list[str]:
    """What has labels, one string for each run of tokens."""
    runs, open_ = [], False
    for i, label in zip(tokens[index]["input_ids"], tokens[index]["labels"], strict=True):
        if label >= 0:
            assert label == i
            runs[len(runs) - open_ :] = [[*runs[-1], i] if open_ else [i]]
        open_ = bool(label >= 0)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML, ["The quick brown fox. <|im_end|>", "A context manager.<|im_end|>"]),
        (TAGGED, ["The quick brown fox. <|im_end|>", "A context manager.<|im_end|>"]),
        (MISTRAL, [" The quick brown fox. </s>", " A context manager.</s>"]),
    ],
)
def test_what_the_assistant_says_has_labels(template: str, said: list[str]) -> None:
    tokenizer = speaking(template, bos=True)
    tokens = tokenize([{"messages": TALK}], tokenizer, 512)
    expected = tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"]
    assert tokens[0]["input_ids"].tolist() == expected  # no BOS but the template's own
    assert labelled(tokenizer, tokens) == said
    asked = tokenize([{"messages": TALK}], tokenizer, 512, last_turn=True)
    assert asked[0]["input_ids"].tolist() == expected
    assert labelled(tokenizer, asked) == said[1:]
    pair = {"prompt": TALK[:4], "completion": TALK[4:]}
    both = tokenize([pair], tokenizer, 512)
    assert both[0]["labels"].tolist() == asked[0]["labels"].tolist()


def test_a_template_that_renders_turns_by_their_place_needs_tags() -> None:
    tokenizer = speaking(THINKING)
    asked = tokenize([{"messages": TALK}], tokenizer, 512, last_turn=True)
    assert labelled(tokenizer, asked) == ["<think>\n\n</think>\n\nA context manager.<|im_end|>"]
    with pytest.raises(DataError, match=r"record 0: .* renders turn 3 otherwise .*\{% generation"):
        tokenize([{"messages": TALK}], tokenizer, 512)


# As Phi-3's: tokens that take white space along, a last token where no answer is asked for.
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else '<|endoftext|>' }}"
)
# As DeepSeek-R1's: an answer is to begin with a thought, and answers are rendered without.
THOUGHT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "rstrip", "said"),
    [
        (PHI, False, ["The quick brown fox. <|end|>", "A context manager.<|end|>"]),
        (PHI, True, ["The quick brown fox. <|end|>", "A context manager.<|end|>"]),
        (THOUGHT, False, ["The quick brown fox. <|end|>", "A context manager.<|end|>"]),
    ],
)
def test_special_tokens_tell_where_an_answer_is(template, rstrip, said) -> None:
    tokenizer = speaking(template)
    names = ("system", "user", "assistant", "end", "endoftext")
    special = [AddedToken(f"<|{x}|>", rstrip=rstrip, special=True) for x in names]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    assert labelled(tokenizer, tokenize([{"messages": TALK}], tokenizer, 512)) == said
    last = tokenize([{"messages": TALK}], tokenizer, 512, last_turn=True)
    assert labelled(tokenizer, last) == said[1:]
    # The same text without special tokens: nothing says where.
    if template == THOUGHT:
        with pytest.raises(DataError, match=r"renders turn 3 otherwise .*\{% generation"):
            tokenize([{"messages": TALK}], speaking(template), 512)


def test_an_answer_of_end_tokens_alone_keeps_them() -> None:
    tokenizer = speaking(PHI)
    names = ("user", "assistant", "end", "endoftext")
    special = [AddedToken(f"<|{x}|>", rstrip=True, special=True) for x in names]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    for said in ("", "<|end|>and more"):
        talk = [*TALK[1:2], {"role": "assistant", "content": said}]
        assert labelled(tokenizer, tokenize([{"messages": talk}], tokenizer, 512)) == [
            f"{said}<|end|>"
        ]


WORDS = ("[UNK]", "user", "assistant", "hello", "yes", "again", "no", ":")
ENDING = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '\n' }}{% endgeneration %}{% else %}{{ m.content + '\n' }}{% endif %}"
    "{% endfor %}"
)
BEGINNING = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ ' ' + m.content }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '\n' }}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("template", [ENDING, BEGINNING])
def test_white_space_without_a_token_moves_no_label(template) -> None:
    """A tag that opens or closes at white space which the tokenizer drops."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.chat_template = template
    said = [("user", "hello"), ("assistant", "yes"), ("user", "again"), ("assistant", "no")]
    talk = [{"role": role, "content": content} for role, content in said]
    assert labelled(tokenizer, tokenize([{"messages": talk}], tokenizer, 512)) == ["yes", "no"]
    first = [{"role": "assistant", "content": "yes"}, *talk]
    found = labelled(tokenizer, tokenize([{"messages": first}], tokenizer, 512))
    assert found == ["yes", "yes", "no"]


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_a_completion_without_the_assistant_has_nothing_to_predict(template) -> None:
    pair = {"prompt": TALK[1:4], "completion": [{"role": "tool", "content": "fox"}]}
    with pytest.raises(DataError, match="nothing to predict"):
        tokenize([pair], speaking(template), 512)


def test_what_is_marked_belongs_to_the_turn_that_is_asked_about() -> None:
    """Thoughts and answers are two spans, calls of tools are none: numbers tell nothing."""
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' and "
        "m['content'] %}{% if m['thought'] %}{% generation %}{{ m['thought'] }}{% endgeneration %}"
        "{{ '|' }}{% endif %}{% generation %}{{ m['content'] + '<end>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    tokenizer = speaking(template)
    asked, call = {"role": "user", "content": "What?"}, {"role": "assistant", "content": ""}
    thought = {"role": "assistant", "content": "fox", "thought": "hm"}
    last = {"last_turn": True}
    with pytest.raises(DataError, match="marks nothing of turn 4"):
        tokenize([{"messages": [asked, thought, asked, call]}], tokenizer, 512, **last)
    found = tokenize([{"messages": [asked, call, asked, thought]}], tokenizer, 512, **last)
    assert labelled(tokenizer, found) == ["hm", "fox<end>"]
    pair = {"prompt": [asked, thought, asked], "completion": [thought]}
    assert labelled(tokenizer, tokenize([pair], tokenizer, 512)) == ["hm", "fox<end>"]


def test_parts_of_text_are_text() -> None:
    tokenizer = speaking(
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] | trim + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    parts = [{"type": "text", "text": "The quick"}, {"type": "text", "text": " fox"}]
    talk = [TALK[1], {"role": "assistant", "content": parts}]
    tokens = tokenize([{"messages": talk}], tokenizer, 512)
    assert labelled(tokenizer, tokens) == ["The quick fox"]


def test_a_greeting_answers_nothing() -> None:
    tokenizer = speaking(CHATML)
    tokens = tokenize([{"messages": TALK[2:]}], tokenizer, 512)
    assert labelled(tokenizer, tokens) == ["A context manager.<|im_end|>"]


def test_a_template_sees_the_tools() -> None:
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    listed = "{% for t in tools or [] %}{{ t.function.name + '\n' }}{% endfor %}"
    tokenizer = speaking(listed + CHATML)
    calls = [{"type": "function", "function": {"name": "clock", "arguments": {}}}]
    turns = [*TALK[:2], {"role": "assistant", "content": "", "tool_calls": calls}]
    record = {"messages": turns, "tools": tools}
    tokens = tokenize([record], tokenizer, 512)
    assert tokenizer.decode(tokens[0]["input_ids"]).startswith("clock\n<|im_start|>system")
    assert labelled(tokenizer, tokens) == ["<|im_end|>"]


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        ({"messages": TALK}, None, "the tokenizer has no chat template; give one"),
        ({"messages": []}, CHATML, "'messages' is not a list of messages"),
        ({"messages": "What?"}, CHATML, "'messages' is not a list of messages"),
        ({"messages": [*TALK, "x"]}, CHATML, "turn 6 of messages is a str, not a message"),
        ({"messages": [{"content": "x"}]}, CHATML, "turn 1 of messages has no 'role'"),
        ({"messages": [{"role": "user"}]}, CHATML, "turn 1 of messages has no 'content'"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            CHATML,
            "'turn 1 of messages, content' is a int, not a string",
        ),
        (
            {"messages": [{"role": "user", "content": [{"text": "\ud83d"}]}]},
            CHATML,
            "'turn 1 of messages' holds half of a character",
        ),
        ({"messages": TALK[:2]}, CHATML, "the assistant says nothing in the first 512 tokens of"),
        ({"messages": TALK[1:2] * 2}, MISTRAL, "cannot render it .*roles must alternate"),
        ({"messages": TALK[2:3]}, CHATML, "the assistant says nothing in the first 512 tokens of"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            CHATML,
            "turn 1 of messages has a part that is no text",
        ),
        ({"messages": TALK, "tools": "clock"}, CHATML, "'tools' is not a list of objects"),
        ({"prompt": TALK[:2], "completion": "A fox."}, CHATML, "'completion' is not a list of"),
    ],
)
def test_what_is_no_conversation_is_named(record, template, message: str) -> None:
    with pytest.raises((DataError, ArgumentError), match=f"record 0: .*{message}"):
        tokenize([record], speaking(template), 512)


def test_a_query_ends_with_the_assistant(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "q.jsonl", json.dumps({"messages": TALK, "name": "with"}))
    tokenizer = speaking(CHATML)
    tokens = read_queries(path, tokenizer, 512)
    assert labelled(tokenizer, tokens) == ["A context manager.<|im_end|>"]
    assert tokens.records[0]["name"] == "with"
    jsonl(path, json.dumps({"messages": TALK[:4]}))
    with pytest.raises(DataError, match=r"q\.jsonl, line 1: a query ends with what .* of 'user'"):
        read_queries(path, tokenizer, 512)


def test_a_long_conversation_loses_its_end() -> None:
    tokenizer = speaking(CHATML)
    whole = tokenize([{"messages": TALK}], tokenizer, 512)[0]
    first = int((whole["labels"] >= 0).nonzero()[0])
    tokens = tokenize([{"messages": TALK}], tokenizer, first + 3)
    assert (len(tokens), tokens.truncated) == (1, 1)
    assert tokens.dropped == len(whole["labels"]) - first - 3
    assert tokens[0]["labels"].equal(whole["labels"][: first + 3])
    skipped = tokenize([{"messages": TALK}, {"text": "The fox"}], tokenizer, first, on_empty="skip")
    assert (len(skipped), skipped.skipped) == (1, 1)
    with pytest.raises(DataError, match=f"{len(whole['labels'])} tokens, but the context is 32"):
        tokenize([{"messages": TALK}], tokenizer, 32, on_long="refuse")


def test_conversations_of_files(tmp_path: Path) -> None:
    """JSON lines of three kinds, and parquet, in the order in which they stand."""
    tokenizer = speaking(CHATML)
    shared = [
        {"from": {"user": "human", "assistant": "gpt"}.get(t["role"], t["role"]),
         "value": t["content"]} for t in TALK
    ]  # fmt: skip
    path = jsonl(
        tmp_path / "a.jsonl",
        json.dumps({"messages": TALK}),
        json.dumps({"text": "The quick fox"}),
        json.dumps({"conversations": shared}),
    )
    tokens = tokenize(read(path), tokenizer, 512)
    assert tokens[0]["labels"].equal(tokens[2]["labels"])
    assert tokenizer.decode(tokens[1]["input_ids"]) == "The quick fox"
    pa.parquet.write_table(
        pa.table({"n": [1, 2], "messages": [TALK, TALK[:3]], "name": ["a", "b"]}),
        tmp_path / "b.parquet",
    )
    records = read(tmp_path / "b.parquet")
    assert records[1] == {
        "messages": TALK[:3], "name": "b", "source": f"{tmp_path / 'b.parquet'}, row 2"
    }  # fmt: skip
    assert tokenize(records, tokenizer, 512)[0]["labels"].equal(tokens[0]["labels"])


def test_fields_of_instructions(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "alpaca.jsonl",
        json.dumps({"instruction": "Name it.", "input": "The lazy", "output": "dog"}),
        json.dumps({"instruction": "Jump.", "input": "", "output": "fox"}),
        json.dumps({"instruction": "Jump.", "input": None, "output": "fox"}),
    )
    plain = read(path, fields={"prompt": "instruction+input", "completion": "output"})
    assert [r["prompt"] for r in plain] == ["Name it.\n\nThe lazy", "Jump.", "Jump."]
    assert [r["completion"] for r in plain] == ["dog", "fox", "fox"]
    assert read(path, fields={"text": "output"})[1]["text"] == "fox"
    talk = read(path, fields={"user": "instruction+input", "assistant": "output"})
    turns = [{"role": "user", "content": "Jump."}, {"role": "assistant", "content": "fox"}]
    assert talk[1]["messages"] == turns
    tokenizer = speaking(CHATML)
    assert labelled(tokenizer, tokenize(talk, tokenizer, 512), 1) == ["fox<|im_end|>"]
    with pytest.raises(DataError, match="line 1: needs 'question', 'output'; it has 'instr"):
        read(path, fields={"prompt": "question", "completion": "output"})[0]
    for wrong in ({"prompt": "instruction"}, {"body": "x"}, {"text": ""}, {}, "text=output"):
        with pytest.raises(ArgumentError, match=r"fields is .*, expected a mapping of 'text'"):
            read(path, fields=wrong)
