"""Files of labels, pairs and contrasts: read, refused by line, and the commands on them."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers as T
from dense_ekfac import close
from fact_world import word_tokenizer
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from ekfac_fast import (
    LanguageModelTask,
    PreferenceTask,
    RewardTask,
    SequenceClassificationTask,
    TokenClassificationTask,
    fit,
    prepare_queries,
    referenced,
    score,
)
from ekfac_fast.cli import app
from ekfac_fast.data import read_labelled, read_pairs, read_queries
from ekfac_fast.errors import ArgumentError, DataError, StoreError
from ekfac_fast.stages.queries import Queries
from ekfac_fast.stages.scores import Scores

LABELS = {"neg": 0, "neutral": 1, "pos": 2}
NAMED = {"label2id": LABELS, "id2label": {i: name for name, i in LABELS.items()}}
WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    """[CLS] and [SEP] around a text, as BERT's."""
    made = word_tokenizer(["[CLS]", "[SEP]", *WORDS])
    ids = {name: made.convert_tokens_to_ids(name) for name in ("[CLS]", "[SEP]")}
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[*ids.items()]
    )
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return made


@pytest.fixture(scope="module")
def plain():
    """No special tokens."""
    return word_tokenizer(WORDS)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentence(rng, n=6):
    return " ".join(rng.choice(WORDS, n))


def test_labels_are_numbered_and_texts_have_their_special_tokens(tokenizer, tmp_path):
    rows = [
        {"text": "w1 w2", "label": "pos", "set": "a"},
        {"text": "w3", "text_pair": "w4 w5", "label": 1, "set": "b"},
        {"text": " ".join(WORDS[:9]), "label": ["neg", "pos"], "set": "b"},
    ]
    data = read_labelled(write(tmp_path / "a.jsonl", *rows), tokenizer, 8, LABELS, keep=["set"])
    said = [tokenizer.convert_ids_to_tokens(data[i]["input_ids"]) for i in range(3)]
    assert said[0] == ["[CLS]", "w1", "w2", "[SEP]"]
    assert said[1] == ["[CLS]", "w3", "[SEP]", "w4", "w5", "[SEP]"]
    assert data[1]["token_type_ids"].tolist() == [0, 0, 0, 1, 1, 1]
    assert said[2][-2:] == ["w5", "[SEP]"], "what is cut keeps its last special token"
    assert [data[i]["label"] for i in range(3)] == [2, 1, [1, 0, 1]]
    assert (data.truncated, data.dropped, data.column("set")) == (1, 3, ["a", "b", "b"])
    assert data.source(1).endswith("a.jsonl, line 2")
    other = [{"body": x["text"], "gold": 0} for x in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(other), tmp_path / "b.parquet")
    named = {"text": "body", "label": "gold"}
    assert read_labelled(tmp_path / "b.parquet", tokenizer, 8, fields=named)[2]["label"] == 0


def test_words_are_labelled_by_their_first_token(tokenizer, tmp_path):
    row = {"tokens": ["w1", "w2-w3", "w4"], "labels": ["neg", "pos", None]}
    data = read_labelled(write(tmp_path / "t.jsonl", row), tokenizer, 16, LABELS, words=True)
    said = dict(
        zip(
            tokenizer.convert_ids_to_tokens(data[0]["input_ids"]), data[0]["labels"].tolist(),
            strict=True,
        )
    )  # fmt: skip
    first = {"w1": 0, "w2": 2}
    assert said == dict.fromkeys(["[CLS]", "<unk>", "w3", "w4", "[SEP]"], -100) | first


BAD = {
    "label 'bad' is none of the model's: 'neg', 'neutral', 'pos'": {"text": "a", "label": "bad"},
    "has no 'label', needs 'text', 'label'; it has 'text'": {"text": "a"},
    "'label' is null": {"text": "a", "label": None},
    "'text' is a int, not a string": {"text": 3, "label": 0},
    r"'label' is \['neg', 1\], names and numbers": {"text": "a", "label": ["neg", 1]},
    "has 'tokens', records before it have none": {"text": "a", "label": 0, "tokens": ["a"]},
    "holds a list, not an object": [1],
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_records_are_named(message, tokenizer, tmp_path):
    file = write(tmp_path / "a.jsonl", {"text": "w1", "label": 0}, BAD[message])
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: {message}"):
        read_labelled(file, tokenizer, 8, LABELS)


def test_wrong_words_and_files(tokenizer, tmp_path):
    for row, told in (
        ({"tokens": ["w1"], "labels": [0, 1]}, "1 tokens, but 2 labels"),
        ({"tokens": "w1", "labels": [0]}, "'tokens' is 'w1', not a list"),
        ({"text": "w1", "label": 0}, "has no 'tokens'"),
    ):
        with pytest.raises(DataError, match=f"line 1: {told}"):
            read_labelled(write(tmp_path / "t.jsonl", row), tokenizer, 8, LABELS, words=True)
    (tmp_path / "t.txt").write_text("w1\n")
    with pytest.raises(DataError, match=r"t\.txt, line 1: has no 'label'"):
        read_labelled(tmp_path / "t.txt", tokenizer, 8, LABELS)
    long = write(tmp_path / "l.jsonl", {"text": " ".join(WORDS), "label": 0})
    with pytest.raises(DataError, match="line 1: 42 tokens, but the context is 8"):
        read_labelled(long, tokenizer, 8, LABELS, on_long="refuse")
    with pytest.raises(ArgumentError, match=r"fields is .*'text' and 'label' and 'text_pair'"):
        read_labelled(long, tokenizer, 8, LABELS, fields={"body": "text"})


def test_pairs_of_texts_and_of_messages(plain, tokenizer, tmp_path):
    rows = [
        {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4 w5"},
        {"prompt": "w1", "chosen": " w3 w6", "rejected": " w4"},
    ]
    file = write(tmp_path / "p.jsonl", *rows)
    data = read_pairs(file, plain, 8)
    assert data[0]["sides"] == [3, 4]
    tokens = plain.convert_ids_to_tokens(data[0]["input_ids"])
    asked = [t for t, y in zip(tokens, data[0]["labels"], strict=True) if y >= 0]
    assert asked == ["w3", "w4", "w5"]
    special = read_pairs(file, tokenizer, 8, special_tokens=True)
    assert special[1]["sides"] == [5, 4]
    plain.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' [END] ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    )

    def says(role, text):
        return [{"role": role, "content": text}]

    asks, yes, no = says("user", "w1"), says("assistant", "w2"), says("assistant", "w3 w4")
    talks = [
        {"prompt": asks, "chosen": yes, "rejected": no},
        {"prompt": "w1", "chosen": yes, "rejected": no},
        {"chosen": asks + yes, "rejected": asks + no},
        {"prompt": "w1", "chosen": asks + yes, "rejected": asks + no},
    ]
    try:
        pairs = read_pairs(write(tmp_path / "m.jsonl", *talks), plain, 64)
    finally:
        plain.chat_template = None
    for index in range(1, 4):
        for name in ("input_ids", "labels", "sides"):
            assert np.array_equal(pairs[index][name], pairs[0][name])


BAD_PAIRS = {
    "'chosen' and 'rejected' are the same": {"prompt": "w1", "chosen": "w2", "rejected": "w2"},
    "has no 'rejected', needs 'chosen', 'rejected'": {"prompt": "w1", "chosen": "w2"},
    "has 'ref_chosen_logps', unlike": {"chosen": "w2 w3", "rejected": "w3", "ref_chosen_logps": -1},
    "nothing to predict": {"prompt": "w1", "chosen": "", "rejected": "w3"},
    "has 'text', records before it have none": {"text": "a", "chosen": "w2", "rejected": "w3"},
}


@pytest.mark.parametrize("message", BAD_PAIRS)
def test_wrong_pairs_are_named(message, plain, tmp_path):
    first = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}
    with pytest.raises(DataError, match=rf"p\.jsonl, line 2: .*{message}"):
        read_pairs(write(tmp_path / "p.jsonl", first, BAD_PAIRS[message]), plain, 16)


def test_questions_of_a_completion_against_another(plain, tmp_path):
    one = {"prompt": "w1 w2", "completion": " w3", "against": " w4 w5", "topic": "x"}
    data = read_queries(write(tmp_path / "q.jsonl", one), plain, 16, keep=["topic"])
    assert data[0]["sides"] == [3, 4]
    assert data.column("topic") == ["x"]
    two = {"prompt": "w1 w2", "completion": " w3"}
    for rows, told in (((one, two), "lacks"), ((two, one), "has")):
        with pytest.raises(
            DataError, match=rf"q\.jsonl, line 2: {told} 'against', unlike .*line 1"
        ):
            read_queries(write(tmp_path / "q.jsonl", *rows), plain, 16)
    same = one | {"against": " w3"}
    with pytest.raises(DataError, match=r"line 1: 'completion' and 'against' are the same"):
        read_queries(write(tmp_path / "q.jsonl", same), plain, 16)
    write(tmp_path / "q.jsonl", one | {"against": " " + " ".join(WORDS[:8])})
    with pytest.raises(DataError, match="line 1: 10 tokens, but the context is 8"):
        read_queries(tmp_path / "q.jsonl", plain, 8)


def causal(tokenizer, folder=None, seed=0):
    torch.manual_seed(seed)
    config = T.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=len(tokenizer), n_positions=32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = T.GPT2LMHeadModel(config).eval()
    return model if folder is None else saved(model, tokenizer, folder)


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def preferred(plain, tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    rows = [
        {
            "prompt": sentence(rng, 3),
            "chosen": f" {sentence(rng, 3)}",
            "rejected": f" {sentence(rng)}",
        }
        for _ in range(8)
    ]
    return write(folder / "pairs.jsonl", *rows)


def test_a_reference_is_asked_once(plain, preferred, tmp_path, monkeypatch):
    before, pairs = causal(plain, seed=1), read_pairs(preferred, plain, 32)
    data = referenced(before, pairs, file=tmp_path / "r.safetensors", batch_tokens=64)
    with torch.no_grad():
        one = data[2]
        ids, at = one["input_ids"], one["sides"][0]
        z = before(input_ids=ids[:at][None]).logits[0].log_softmax(-1)
        said = one["labels"][1:at] >= 0
        true = z[:-1].gather(1, ids[1:at, None])[said].sum()
    assert one["ref_chosen_logps"] == pytest.approx(float(true), abs=1e-4)
    monkeypatch.setattr(T.GPT2LMHeadModel, "forward", None)
    again = referenced(before, pairs, file=tmp_path / "r.safetensors")
    kept = referenced(None, pairs, file=tmp_path / "r.safetensors")
    assert again[2]["ref_chosen_logps"] == kept[2]["ref_chosen_logps"] == one["ref_chosen_logps"]
    assert kept.source(2).endswith("line 3")
    with pytest.raises(StoreError, match="log-probabilities with other model"):
        referenced(causal(plain, seed=2), pairs, file=tmp_path / "r.safetensors")
    first = json.loads(preferred.read_text().splitlines()[0])
    some = read_pairs(write(tmp_path / "o.jsonl", first), plain, 32)
    with pytest.raises(StoreError, match="log-probabilities with other pairs"):
        referenced(None, some, file=tmp_path / "r.safetensors")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*words, ok=True):
        done = CliRunner().invoke(app, [str(x) for x in words])
        assert (done.exit_code == 0) == ok, done.output + repr(done.exception)
        return " ".join(done.output.split())

    return command


def test_a_classifier_from_a_file_to_a_report(tokenizer, run, tmp_path):
    model = tiny_bert(T.BertForSequenceClassification, tokenizer, "model", **NAMED)
    rng = np.random.default_rng(0)
    rows = [{"text": sentence(rng), "label": rng.choice([*LABELS])} for _ in range(12)]
    write(tmp_path / "train.jsonl", *rows)
    write(tmp_path / "q.jsonl", *({**x, "group": g} for x, g in zip(rows[:3], "aab", strict=True)))
    task = ("--task", "sequence-classification", "--context", 16)
    run("fit", "model", "train.jsonl", "--out", "f", *task)
    # The task is noted with the factors.
    said = run("score", "model", "f", "q.jsonl", "train.jsonl", "--out", "s", "--context", 16,
               "--set", "group", "--measure", "margin", "--rank", 0)  # fmt: skip
    assert re.search(r"sum of log-odds = (?s:.)*train\.jsonl, line \d+, label \w+", said)
    read = [read_labelled(f"{n}.jsonl", tokenizer, 16, LABELS) for n in ("train", "q")]
    task = SequenceClassificationTask("margin")
    factors = fit(model, read[0], out=tmp_path / "g", task=task)
    queries = prepare_queries(model, factors, read[1], rank=None, task=task, sets=["a", "a", "b"])
    close(Queries.load("s").measurements, queries.measurements, 1e-5)
    expected = score(model, queries, read[0], out=tmp_path / "t", task=task).matrix
    close(Scores("s").matrix, torch.tensor(np.array(expected)), 1e-3)
    run("report", "s", "train.jsonl")
    page = (tmp_path / "report.html").read_text()
    assert all(x in page for x in ("how much sum of log-odds would change", "train.jsonl, line"))
    assert re.search(r"label \w+</span>", page)
    assert not any(x in page for x in ("predicts the token", "<mark></mark>"))
    run("table", "s", "train.jsonl", "--columns", "label", "--by", "label")
    run("self", "model", "f", "train.jsonl", "--out", "self", "--context", 16)
    refused = run("score", "model", "f", "q.jsonl", "train.jsonl", "--out", "x", "--task", "reward",
                  ok=False)  # fmt: skip
    assert "f was fitted with sequence-classification" in refused
    write(tmp_path / "bad.jsonl", rows[0], {"text": "w1", "label": "great"})
    refused = run("fit", "model", "bad.jsonl", "--out", "h", "--task", "sequence-classification",
                  ok=False)  # fmt: skip
    assert "bad.jsonl, line 2: label 'great' is none of the model's" in refused


def tiny_bert(kind, tokenizer, folder, **more):
    torch.manual_seed(0)
    config = T.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, **more,
    )  # fmt: skip
    model = kind(config).eval()
    saved(model, tokenizer, folder)
    return model


@pytest.mark.parametrize("kind", ["reward", "token-classification"])
def test_commands_are_the_tasks(kind, tokenizer, run, tmp_path):
    """Files through the commands give the scores of the same tasks in Python."""
    rng, reward = np.random.default_rng(1), kind == "reward"
    if reward:
        rows = [{"chosen": sentence(rng), "rejected": sentence(rng, 4)} for _ in range(8)]
        model = tiny_bert(T.BertForSequenceClassification, tokenizer, "model", num_labels=1)
        read, task = partial(read_pairs, special_tokens=True), RewardTask()
    else:
        rows = [
            {"tokens": sentence(rng).split(), "labels": [*rng.choice([*LABELS], 6)]}
            for _ in range(8)
        ]
        model = tiny_bert(T.BertForTokenClassification, tokenizer, "model", **NAMED)
        read = partial(read_labelled, labels=LABELS, words=True)
        task = TokenClassificationTask()
    write(tmp_path / "train.jsonl", *rows)
    write(tmp_path / "q.jsonl", *rows[:2])
    run("fit", "model", "train.jsonl", "--out", "f", "--task", kind, "--context", 16)
    run("score", "model", "f", "q.jsonl", "train.jsonl", "--out", "s", "--context", 16, "--rank", 0)
    data, asked = (read(x, tokenizer, context=16) for x in ("train.jsonl", "q.jsonl"))
    factors = fit(model, data, out=tmp_path / "g", task=task)
    queries = prepare_queries(model, factors, asked, rank=None, task=task)
    expected = score(model, queries, data, out=tmp_path / "t", task=task).matrix
    close(Scores("s").matrix, torch.tensor(np.array(expected)), 1e-3)
    run("report", "s", "train.jsonl")
    run("self", "model", "f", "train.jsonl", "--out", "self", "--context", 16)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_references_without_an_adapter_are_those_of_its_own_model(plain, preferred, run, tmp_path):
    import peft

    drawn = {"target_modules": ["c_fc"], "fan_in_fan_out": True, "init_lora_weights": False}
    for n, right in ((0, True), (0, True), (1, False)):
        causal(plain, tmp_path / "base", n)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(causal(plain, seed=n), peft.LoraConfig(**drawn))
        adapted.save_pretrained("adapter")
        said = run("fit", "base", preferred, "--adapter", "adapter", "--task", "dpo", "--out", "f",
                   "--context", 32, ok=right)  # fmt: skip
        shutil.rmtree("f", ignore_errors=True)
    assert "f.references.safetensors: log-probabilities with other model" in said


def test_preferences_from_a_file_to_a_report(plain, preferred, run, tmp_path):
    model, before = (causal(plain, tmp_path / str(n), n) for n in (0, 1))
    given = ("--context", 32, "--reference", before)
    refused = run("fit", model, preferred, "--out", "f", "--task", "dpo", "--beta", 0.5, ok=False)
    assert "give --reference" in refused
    run("fit", model, preferred, "--out", "f", "--task", "dpo", "--beta", 0.5, *given)
    pair = json.loads(preferred.read_text().splitlines()[0])
    write(tmp_path / "pairs.jsonl", pair)
    # What the reference says of the corpus lies beside the factors; of the queries it is asked.
    said = run("score", model, "f", "pairs.jsonl", preferred, "--out", "s", *given, "--rank", 0)
    assert "log p(chosen is preferred) = " in said
    assert (tmp_path / "f.references.safetensors").exists()
    assert not (tmp_path / "s.references.safetensors").exists()
    networks = [T.AutoModelForCausalLM.from_pretrained(x).eval() for x in (model, before)]
    data, asked = (
        referenced(networks[1], read_pairs(x, plain, 32)) for x in (preferred, "pairs.jsonl")
    )
    task = PreferenceTask(0.5)
    factors = fit(networks[0], data, out=tmp_path / "g", task=task)
    queries = prepare_queries(networks[0], factors, asked, rank=None, task=task)
    expected = score(networks[0], queries, data, out=tmp_path / "t", task=task).matrix
    close(Scores("s").matrix, torch.tensor(np.array(expected)), 1e-3)
    run("report", "s", preferred)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<em>chosen</em>") == page.count("<em>rejected</em>") > 0
    against = {"prompt": "w1 w2", "completion": " w3", "against": " w4 w5"}
    write(tmp_path / "q.jsonl", against, against | {"completion": " w6"})
    said = run("score", model, "f", "q.jsonl", preferred, "--out", "c", "--context", 32)
    assert "log p(completion) - log p(against) = " in said
    asked = read_queries("q.jsonl", plain, 32)
    own = prepare_queries(networks[0], factors, asked, task=LanguageModelTask())
    close(Queries.load("c").measurements, own.measurements, 1e-4)
    run("report", "c", preferred, "--out", "c.html")
    page = re.sub(r"<[^>]*>", "", (tmp_path / "c.html").read_text())
    assert "log p(completion) - log p(against)" in page
