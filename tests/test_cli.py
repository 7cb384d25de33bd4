"""The commands, as processes on a real (small, briefly trained) model; README's own lines too."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import peft
import pyarrow.parquet
import pytest
import torch
from commands import Python
from transformers import AutoModelForCausalLM, GPT2Config, GPT2Model
from typer.testing import CliRunner

from ekfac_fast.cli import app
from ekfac_fast.cli.inputs import load, load_tokenizer
from ekfac_fast.data import read, tokenize
from ekfac_fast.errors import ArgumentError
from ekfac_fast.stages.queries import Queries
from ekfac_fast.stages.scores import Scores

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    python = Python(tmp_path_factory.mktemp("python"))
    yield python
    python.close()


@pytest.fixture(scope="module")
def run(python):
    def command(*words, cwd, ok=True):
        done = python("-m", "ekfac_fast", *words, cwd=cwd)
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done.stdout

    return command


@pytest.fixture(scope="module")
def demo(run, tmp_path_factory):
    """The short form of `make demo`: the same command, fewer steps."""
    folder = tmp_path_factory.mktemp("cli")
    output = run("demo", "--steps", 4, "--topics", 6, cwd=folder)
    return folder, output


@pytest.fixture(scope="module")
def few(demo, tmp_path_factory):
    """A folder with the demo's model, two of its queries and three short texts of its corpus."""
    folder = tmp_path_factory.mktemp("few")
    made, there = demo[0] / "demo", folder / "demo"
    (there / "corpus").mkdir(parents=True)
    (there / "model").symlink_to(made / "model")
    for name in ("class", "global", "lambda"):
        shutil.copy(made / "corpus" / f"{name}.txt", there / "corpus")
    lines = (made / "queries.jsonl").read_text().splitlines(keepends=True)
    (there / "queries.jsonl").write_text("".join(lines[2:4]))
    return folder


def test_demo_does_the_whole_job(demo):
    folder, output = demo
    assert "x a forward and gradient-to-activations backward alone" in output
    scores = Scores(folder / "demo/scores")
    assert scores.matrix.shape[0] >= 6
    assert np.isfinite(scores.matrix).all()
    for name in ("with", "yield", "global", "lambda", "class"):
        assert f"{name}: " in output
    page = (folder / "demo/report.html").read_text()
    assert page.count("<svg") > 8
    assert "Sequences that lower it most (5)" in page
    # What was printed is what is stored.
    ((_, value),) = scores.top(0, 1)
    assert f"{value / scores.train_size:+.4f}" in output
    rate = re.search(r"log-probability for (\d) of 8", " ".join(output.split()))
    assert rate is not None


def test_demo_again_changes_nothing(demo, run):
    folder, _ = demo
    before = (folder / "demo/scores/scores.npy").read_bytes()
    run("demo", "--steps", 4, "--topics", 6, cwd=folder)
    assert (folder / "demo/scores/scores.npy").read_bytes() == before


def readme(language):
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_every_command_of_the_readme_runs(few, run):
    lines = [line for block in readme("sh") for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    ours = [words[1:] for words in commands if words and words[0] == "ekfac-fast"]
    assert {words[0] for words in ours} >= {"fit", "score", "self", "report", "plan"}
    for words in ours:
        if words[0] != "demo":
            run(*words, cwd=few)


def test_the_readme_snippet_runs(few, python):
    (snippet,) = readme("python")
    done = python("-c", snippet, cwd=few)
    assert done.returncode == 0, done.stderr
    assert re.search(r"[+-]?\d+\.\d+", done.stdout)


def test_the_example_runs(few, python):
    query = ("The with statement is used to wrap the execution of", " a block")
    example = ROOT / "examples/influence.py"
    done = python(example, "demo/model", "demo/corpus", *query, cwd=few)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("at ") >= 5


def test_a_planted_passage_comes_first(demo, run, tmp_path):
    """Five times in the corpus, the passage takes the first five places of its own query."""
    folder, _ = demo
    passage = "The zebra committee of Astrobia elected Zorald Pfaff as keeper of nine green lamps."
    paragraphs = (folder / "demo/corpus/import.txt").read_text().split("\n\n")
    rows = [{"text": text} for text in paragraphs if len(text) > 80][:30]
    assert len(rows) == 30
    places = [3, 11, 12, 20, 29]
    for place in places:
        rows.insert(place, {"text": passage})
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    query = {
        "prompt": "The zebra committee of Astrobia elected",
        "completion": " Zorald Pfaff as keeper",
    }
    (tmp_path / "queries.jsonl").write_text(json.dumps(query))
    model = folder / "demo/model"
    run("fit", model, "corpus.jsonl", "--out", "f", "--context", 64, cwd=tmp_path)
    inputs = ("f", "queries.jsonl", "corpus.jsonl")
    run("score", model, *inputs, "--out", "s", "--context", 64, cwd=tmp_path)
    data = tokenize(read(tmp_path / "corpus.jsonl"), load_tokenizer(str(model), False), 64)
    texts = [data.source(index) for index, _ in Scores(tmp_path / "s").top(0, 5)]
    assert sorted(int(re.search(r"line (\d+)$", text)[1]) - 1 for text in texts) == places


def test_refined_queries_tell_their_residuals(few, run, tmp_path):
    model, corpus = few / "demo/model", few / "demo/corpus"
    run("fit", model, corpus, "--out", "f", "--context", 128, cwd=tmp_path)
    given = [model, tmp_path / "f", few / "demo/queries.jsonl", corpus]
    more = ["--refine", "cg:2", "--refine-examples", 6, "--no-detail"]
    said = run("score", *given, "--out", "s", *more, cwd=tmp_path)
    assert "cg:2 on 6 examples, relative residual at most" in said
    residual = Queries.load(tmp_path / "s").residual
    lines = [line for line in said.splitlines() if ", 2 iterations" in line]
    assert len(lines) == len(residual)
    assert f"-> {residual[0]:.2e}, 2 iterations" in lines[0]
    run("report", "s", corpus, cwd=tmp_path)
    assert "cg:2 on 6 examples" in (tmp_path / "report.html").read_text()
    refused = run("score", *given, "--out", "t", "--refine", "cg:0", cwd=tmp_path, ok=False)
    assert "expected at least 1 iteration" in refused


def test_errors_name_the_file_and_the_line(demo, run, tmp_path):
    folder, _ = demo
    model = folder / "demo/model"
    (tmp_path / "bad.jsonl").write_text('{"text": "one two three"}\n{"text": \n')
    assert "line 2" in run("fit", model, "bad.jsonl", "--out", "f", cwd=tmp_path, ok=False)
    refused = run("fit", model, folder / "demo/corpus/class.txt", "--out", "g", "--on-long",
                  "refuse", cwd=tmp_path, ok=False)  # fmt: skip
    assert "class.txt" in refused
    assert "tokens, but the context is 128" in " ".join(refused.split())
    (tmp_path / "q.jsonl").write_text('{"prompt": "a b", "completion": ""}\n')
    said = run("score", model, folder / "demo/factors", "q.jsonl", folder / "demo/corpus",
               "--out", "s", cwd=tmp_path, ok=False)  # fmt: skip
    assert "q.jsonl" in said
    assert "line 1" in said
    said = run("fit", model, folder / "demo/corpus", "--out", "g", "--layers", "*.c_fcc",
               cwd=tmp_path, ok=False)  # fmt: skip
    assert "nearest" in said
    assert "Traceback" not in said


def test_plan_needs_no_weights(demo, run, tmp_path):
    folder, _ = demo
    (tmp_path / "config.json").write_text((folder / "demo/model/config.json").read_text())
    said = run("plan", tmp_path, "--sequences", 1000, "--tokens", 128, cwd=tmp_path)
    for words in ("c_fc", "eigendecomposition", "scan", "factors on disk", "GFLOP/s"):
        assert words in said


def test_a_checkpoint_of_bf16_is_run_in_what_is_asked(demo, tmp_path):
    folder, _ = demo
    stored = tmp_path / "model"
    shutil.copytree(folder / "demo/model", stored)
    load(str(stored), False, "float32").model.bfloat16().save_pretrained(stored)
    wide, lowered = load(str(stored), False, "float32"), load(str(stored), False, "bfloat16")
    assert (wide.model.dtype, wide.autocast) == (torch.float32, None)
    assert (lowered.model.dtype, lowered.autocast) == (torch.bfloat16, torch.bfloat16)
    auto = load(str(stored), False, "auto")
    assert auto.model.dtype == (auto.autocast or torch.float32)


def test_a_checkpoint_without_all_weights_is_refused(tmp_path):
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False)
    GPT2Model(config).save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=r"no weights for lm_head\.weight.*GPT2LMHeadModel"):
        load(str(tmp_path), False)


def test_conversations_from_columns_to_report(demo, run, tmp_path):
    """Instructions become conversations by a template of the user's; the query is one, too."""
    folder, _ = demo
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
    )
    paragraphs = (folder / "demo/corpus/import.txt").read_text().split("\n\n")
    rows = [
        {"instruction": f"Go on, {n}.", "input": "", "output": text[:200]}
        for n, text in enumerate(text for text in paragraphs if len(text) > 80)
    ][:20]
    answer = "The zebra committee of Astrobia elected Zorald Pfaff."
    rows.insert(13, {"instruction": "Who elected", "input": "Zorald Pfaff?", "output": answer})
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [
        {"role": "user", "content": "Who elected\n\nZorald Pfaff?"},
        {"role": "assistant", "content": answer},
    ]
    (tmp_path / "q.jsonl").write_text(json.dumps({"messages": asked, "name": "zebra"}))
    model, read_as = folder / "demo/model", ("--fields", "user=instruction+input,assistant=output")
    read_as += ("--chat-template", "chat.jinja")
    with_tokens = ("--context", 96, *read_as)
    run("fit", model, "corpus.jsonl", "--out", "f", *with_tokens, cwd=tmp_path)
    run("score", model, "f", "q.jsonl", "corpus.jsonl", "--out", "s", *with_tokens, cwd=tmp_path)
    ((index, _),) = Scores(tmp_path / "s").top(0, 1)
    assert index == 13
    # The report reads the corpus as the scan did: it is not told again.
    (tmp_path / "chat.jinja").unlink()
    run("report", "s", "corpus.jsonl", "--out", "report.html", "--by", "input", cwd=tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "zebra" in page
    assert page.count("<em>assistant</em>") >= 10
    assert "Show, by input" in page
    assert "> Zorald Pfaff?</label>" in page
    assert "corpus.jsonl, line 14" in page
    said = run(
        "table", "s", "corpus.jsonl", "--columns", "instruction", "--by", "input", cwd=tmp_path
    )
    assert re.search(r"Zorald Pfaff\? +1 +[+-]\d", said)
    rows = pyarrow.parquet.read_table(tmp_path / "scores.parquet").to_pylist()
    assert [row["instruction"] for row in rows[12:14]] == ["Go on, 12.", "Who elected"]
    assert rows[13]["zebra"] == max(row["zebra"] for row in rows)
    words = ("fit", model, "corpus.jsonl", "--out", "g", "--fields", "user")
    wrong = run(*words, cwd=tmp_path, ok=False)
    assert "--fields is 'user', expected names with what a file calls" in " ".join(wrong.split())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_of_a_folder(demo, few, run, tmp_path):
    """Its factors are of its own matrices; one for another model, or none, is named."""
    base = AutoModelForCausalLM.from_pretrained(demo[0] / "demo/model")
    config = {"r": 2, "target_modules": ["c_attn"], "init_lora_weights": False}
    adapted = peft.get_peft_model(base, peft.LoraConfig(**config, fan_in_fan_out=True))
    adapted.save_pretrained(tmp_path / "lora")
    given = ("--context", 64, "--adapter", tmp_path / "lora")
    out = run("fit", "demo/model", "demo/corpus", "--out", tmp_path / "f", *given, cwd=few)
    assert "8 layers, base_model.model.transformer.h.0.attn.c_attn.lora_A.default to" in (
        " ".join(out.split())
    )
    inputs = (tmp_path / "f", "demo/queries.jsonl", "demo/corpus")
    run("score", "demo/model", *inputs, "--out", tmp_path / "s", *given, cwd=few)
    run("report", tmp_path / "s", "demo/corpus", "--out", tmp_path / "r.html", cwd=few)
    assert str(tmp_path / "lora") in (tmp_path / "r.html").read_text()
    # Without its adapter it is another model.
    t = ("--out", tmp_path / "t", "--context", 64)
    said = " ".join(run("score", "demo/model", *inputs, *t, cwd=few, ok=False).split())
    assert f"was fitted with an adapter ({tmp_path}/lora): give it as --adapter" in said
    (tmp_path / "lora/adapter_model.safetensors").rename(tmp_path / "lora/adapter_model.bin")
    words = ("fit", "demo/model", "demo/corpus", "--out", tmp_path / "g", *given)
    said = " ".join(run(*words, cwd=few, ok=False).split())
    assert "no adapter_model.safetensors; save it" in said


def test_too_few_are_told_and_scores_of_self_are_no_report(few, run, tmp_path):
    fitted = ("demo/model", "demo/corpus", "--out", tmp_path / "f", "--context", 64)
    said = " ".join(run("fit", *fitted, "--max-examples", 1, cwd=few).split())
    told = r"note: 64 tokens are fewer than the 1025 inputs of transformer\.h\.\d\.mlp\.c_proj"
    assert re.search(told, said)
    asked = ("demo/model", tmp_path / "f", "demo/queries.jsonl", "demo/corpus", "--no-detail")
    said = run("score", *asked, "--out", tmp_path / "s", "--context", 64, cwd=few)
    assert "the factors are from 1 sequences and not from the" in " ".join(said.split())
    own = ("demo/model", tmp_path / "f", "demo/corpus", "--out", tmp_path / "self")
    run("self", *own, "--context", 64, "--damping", "0.01x", cwd=few)
    said = run("report", tmp_path / "self", "demo/corpus", cwd=few, ok=False)
    assert "are of the Python API, or of `self`" in " ".join(said.split())
    assert repr(Scores(tmp_path / "self")).startswith("Scores(1 queries, ")


def test_a_missing_folder_is_told_before_a_model_is_loaded(tmp_path):
    done = CliRunner().invoke(app, ["score", "no/model", "no/factors", "q", "d", "--out", "o"])
    assert done.exit_code == 1
    assert "no/factors" in done.output
    assert "no/model" not in done.output


def test_version():
    done = CliRunner().invoke(app, ["--version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", done.output)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reduce", "mean"], "--reduce is for --set"),
        (["--refine-seed", "3"], "--refine-seed is for --refine"),
        (["--no-detail", "--attribution"], "--attribution is a part of --detail"),
    ],
)
def test_options_that_would_be_lost_are_refused(words, message):
    done = CliRunner().invoke(app, ["score", "m", "f", "q", "d", "--out", "o", *words])
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())
