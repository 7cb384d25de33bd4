"""Every study by its command, shortened, on a small model; the corpus of texts that are there."""

import gzip
import json

import fact_world
import numpy as np
import pytest
from typer.testing import CliRunner

from ekfac_fast.cli import app
from ekfac_fast.cli import demo_small as demo
from ekfac_fast.data import read, tokenize
from ekfac_fast.errors import DataError
from ekfac_fast.stages.scores import Scores
from ekfac_fast.studies import scale, write_corpus
from ekfac_fast.studies.overlap import overlaps
from ekfac_fast.studies.sizes import Scan

ALL = ("study", "all", "model", "factors", "corpus.jsonl", "--top", 10, "--largest", 20, "--draws",
       9, "--context", 128, "--out", "all")  # fmt: skip
STUDIES = ("layers", "tail", "memorisation", "scale", "word-order", "languages")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The demo's model, small and hardly trained, its factors, a corpus of 40 paragraphs."""
    folder = tmp_path_factory.mktemp("every")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VOCABULARY": 512, "LAYERS": 3, "WIDTH": 24, "HEADS": 2}.items():
            patch.setattr(demo, name, value)
        patch.setattr(demo, "CONTEXT", 256)
        demo.write_corpus(folder / "topics", 4)
        tokenizer = demo.train_tokenizer(folder / "topics", folder / "model")
        data = tokenize(read(folder / "topics", split="paragraph"), tokenizer, 64, on_empty="skip")
        demo.train_model(data, folder / "model", 3)
    texts = (folder / "topics/class.txt").read_text() + (folder / "topics/import.txt").read_text()
    rows = [{"text": text} for text in texts.split("\n\n") if len(text) > 60][:40]
    fact_world.write(folder / "corpus.jsonl", rows)
    run(folder, "fit", "model", "corpus.jsonl", "--out", "factors", "--context", 128)
    return folder


def run(folder, *words, code=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_all_studies_in_one_command(made):
    said = run(made, *ALL)
    for name in STUDIES:
        assert f"all/{name}/{name}.jsonl" in said
        assert rows_of(made / f"all/{name}/{name}.jsonl")
        assert (made / f"all/{name}/{name}.svg").read_text().startswith("<?xml")


def test_each_study_by_itself_finds_the_same(made):
    given = ("model", "factors", "corpus.jsonl", "--context", 128)
    run(made, "study", "layers", *given, "--top", 10, "--out", "layers")
    run(made, "study", "memorisation", *given, "--out", "memorisation")
    run(made, "study", "languages", "model", "factors", "--out", "languages")
    files = [made / f"all/{name}/{name}.jsonl" for name in STUDIES]
    before = [file.read_bytes() for file in files]
    run(made, *ALL)  # goes on from what is there
    assert [file.read_bytes() for file in files] == before
    for name in ("layers", "memorisation"):
        pairs = zip(rows_of(made / f"{name}/{name}.jsonl"),
                    rows_of(made / f"all/{name}/{name}.jsonl"), strict=True)  # fmt: skip
        for alone, together in pairs:
            alike(alone, together)


def alike(one, other):
    """Equal but for what batches of other lengths round."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name, value in one.items():
            alike(value, other[name])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            alike(*pair)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-2, abs=1e-3)
    else:
        assert one == other


def test_planted_copies_by_command(made):
    said = run(made, "study", "planted", "model", "corpus.jsonl", "--out", "planted", "--copies",
               "1,8", "--examples", 6, "--epochs", 1, "--context", 128)  # fmt: skip
    assert "sequences ahead" in said
    assert [x["copies"] for x in rows_of(made / "planted/planted.jsonl")] == [1, 8]
    said = run(made, "study", "planted", "model", "corpus.jsonl", "--out", "x", "--copies", "1,b",
               code=1)  # fmt: skip
    assert "--copies is '1,b'" in said


def test_scale_over_folders_of_scores(made):
    question = {"name": "class", "prompt": "A class definition defines a", "completion": " class"}
    fact_world.write(made / "q.jsonl", [question])
    for out, rank in (("one", 8), ("two", 16)):
        run(made, "score", "model", "factors", "q.jsonl", "corpus.jsonl", "--out", out, "--rank",
            rank, "--context", 128, "--no-detail")  # fmt: skip
    said = run(made, "study", "scale", "one", "two", "--data", "corpus.jsonl", "--out", "scale")
    assert said.count("model 0.0M") == 2
    first, second = rows_of(made / "scale/scale.jsonl")
    assert first["corpus"] == second["corpus"]
    assert first["parameters"] == second["parameters"] > 10_000
    # From another folder than where its model and factors were typed.
    run(made.parent, "table", made / "one", made / "corpus.jsonl", "--out", made / "t.parquet")
    assert (made / "t.parquet").exists()
    run(made, "study", "tail", "one", "corpus.jsonl", "--out", "tail", "--draws", 9)
    assert rows_of(made / "tail/tail.jsonl")[0]["sequences"] == len(Scores(made / "one"))


def test_overlap_of_the_top_by_size(tmp_path):
    data = [{"input_ids": [1, n]} for n in range(2, 32)]
    questions = [{"input_ids": [2, 3, 4]}]
    words = -np.arange(30.0)[None]  # the question's words come first
    small = Scan("small", 10, words, questions, data)
    large = Scan("large", 1000, words[:, ::-1], questions, data)
    found = scale([large, small], ["q"], out=tmp_path, top=3)
    shared = overlaps(questions, data)
    assert [x.model for x in found.models] == ["small", "large"]
    assert [x.top for x in found.models] == [pytest.approx(shared[0, :3].mean()), 0]
    assert found.models[0].corpus == pytest.approx(shared.mean())
    with pytest.raises(DataError, match="large: scores are"):
        scale([Scan("large", 1, words, questions * 2, data)], ["q"], out=tmp_path)
    with pytest.raises(DataError, match="no model"):
        scale([], ["q"], out=tmp_path)


def test_a_corpus_of_the_texts_that_are_there(tmp_path):
    place = tmp_path / "usr/share"
    for folder in ("dictd", "games/fortunes", "doc/debian/FAQ"):
        (place / folder).mkdir(parents=True)
    entry = "\n\n   <computing> " + "a thing that does something useful, " * 5
    terms = "".join(f"term{n}{entry}{n}\n\n" for n in range(8))
    (place / "dictd/foldoc.dict.dz").write_bytes(gzip.compress(terms.encode()))
    said = "\n%\n".join(f"Saying number {n}: " + "never mind the weather. " * 8 for n in range(12))
    (place / "games/fortunes/wisdom").write_text(said)
    file = write_corpus(tmp_path / "c.jsonl", tmp_path, each=5)
    rows = rows_of(file)
    kinds = [row["kind"] for row in rows]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == dict.fromkeys(
        ("definition", "quotation", "manual", "code"), 5
    )
    assert all(100 < len(row["text"]) <= 480 for row in rows)
    assert any(row["text"].startswith("term") for row in rows)
    assert write_corpus(tmp_path / "d.jsonl", tmp_path, each=5).read_bytes() == file.read_bytes()
    with pytest.raises(DataError, match="install dict-foldoc"):
        write_corpus(tmp_path / "e.jsonl", tmp_path / "none")
    run(tmp_path, "study", "corpus", "--root", ".", "--each", 5)
    assert (tmp_path / "corpus.jsonl").read_bytes() == file.read_bytes()
