"""Absurd words on the command line: the program's own errors, or a value that means something.

Each case is a command with one or two words replaced. `tests/test_fuzz.py`
runs many more.
"""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from ekfac_fast.cli import app
from ekfac_fast.cli import demo_small as demo
from ekfac_fast.data import read, tokenize

WORDS = [
    "", " ", "-1", "0", "1", "2", "3", "48", "1.5", "-0.5", "0.1", "1e-3", "nan", "inf", "-inf",
    "1e999", "9" * 19, "9" * 30, "9" * 5000, str(2**63), str(2**64), "abc", "None", "True", "mlp",
    "*", "[", "file", "paragraph", "line", "chunk", "truncate", "refuse", "tfidf:3", "tfidf:",
    "tfidf:0", "tfidf:²", "tfidf:-1", "tfidf:" + "9" * 30, "tfidf:" + "9" * 5000, "PIPE", "FILE/x",
    "/proc/none/x", "x" * 5000, "\udce9", "é", "[red]x[/]", "\x1b[31m", "--", "-x",
    "nobody/nothing",
]  # fmt: skip


def number(least: int, most: int = 2**63 - 1) -> Callable[[str], bool]:
    def holds(word: str) -> bool:
        try:
            return least <= int(word) <= most
        except ValueError:
            return False

    return holds


def damping(word: str) -> bool:
    try:
        return 0 <= float(word) < float("inf")
    except ValueError:
        return False


def one_of(*words: str) -> Callable[[str], bool]:
    return lambda word: word in words


def nothing(word: str) -> bool:
    return False


def new(word: str) -> bool:
    return word[:1] != "/" and len(word) < 100  # "" is the current folder


CUT = {
    "--context": number(2), "--split": one_of("file", "paragraph", "line"),
    "--on-long": one_of("chunk", "truncate", "refuse"), "--batch-tokens": number(1),
    "--dtype": one_of("auto", "float32", "bfloat16"),
    "--fields": nothing, "--chat-template": nothing, "--adapter": nothing, "--out": new,
}  # fmt: skip
# Words that stand where they do, and options with what each may be.
COMMANDS: dict[str, tuple[list[str], dict[str, Callable[[str], bool]]]] = {
    "fit": (
        ["MODEL", "DATA"],
        CUT | {"--layers": one_of("mlp", "*"), "--max-examples": number(1),
               "--seed": number(0, 2**64 - 1)},
    ),
    "score": (
        ["MODEL", "FACTORS", "QUERIES", "DATA"],
        CUT | {"--rank": number(0), "--damping": damping, "--top-k": number(1),
               "--refine": nothing, "--refine-examples": nothing,
               "--refine-seed": number(0, 2**64 - 1),
               "--candidates": one_of("tfidf:3"), "--train-size": number(1)},
    ),
    "self": (["MODEL", "FACTORS", "DATA"], CUT | {"--damping": damping}),
    "report": (["SCORES", "DATA"], {"--top": number(1), "--out": new}),
    "plan": (
        ["MODEL"],
        {"--sequences": number(1), "--tokens": number(1), "--fit-sequences": number(1),
         "--queries": number(1), "--rank": number(0), "--layers": one_of("mlp", "*")},
    ),
    "demo": ([], {"--steps": number(1), "--topics": number(1), "--folder": new}),
}  # fmt: skip
NEEDED = {"fit": ["--out"], "score": ["--out"], "self": ["--out"], "report": ["--out"]}


PATIENCE = 10  # seconds, after which a command hangs


def hung(*_: object) -> None:
    raise TimeoutError("hangs")


def inputs(folder: Path) -> dict[str, str]:
    """A small model, corpus, queries, factors and scores: what the right words stand for."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VOCABULARY": 384, "LAYERS": 1, "WIDTH": 16, "HEADS": 2}.items():
            patch.setattr(demo, name, value)
        demo.write_corpus(folder / "corpus", 6)
        tokenizer = demo.train_tokenizer(folder / "corpus", folder / "model")
        text = tokenize(read(folder / "corpus", split="paragraph"), tokenizer, 48, on_empty="skip")
        demo.train_model(text, folder / "model", 1)
    rows = [{"text": text} for text in (folder / "corpus/class.txt").read_text().split("\n\n")[:6]]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    query = {"prompt": "The with", "completion": " statement"}
    (folder / "queries.jsonl").write_text(json.dumps(query))
    names = {"MODEL": "model", "DATA": "data.jsonl", "QUERIES": "queries.jsonl"}
    names |= {"FACTORS": "factors", "SCORES": "scores", "PIPE": "pipe", "FILE/x": "data.jsonl/x"}
    os.mkfifo(folder / "pipe")
    made = {name: str(folder / place) for name, place in names.items()}
    for command in ("fit", "score"):
        words = [made[word] for word in COMMANDS[command][0]]
        out = made["FACTORS" if command == "fit" else "SCORES"]
        done = CliRunner().invoke(app, [command, *words, "--out", out])
        assert done.exit_code == 0, done.output
    return made


def called(made: dict[str, str], count: int, seed: int = 0) -> list[str]:
    """`count` commands with odd words, and what went wrong; no name is looked up on the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        return _called(made, count, seed)


def _called(made: dict[str, str], count: int, seed: int) -> list[str]:
    rng, wrong = random.Random(seed), []
    signal.signal(signal.SIGALRM, hung)
    for number in range(count):
        command = list(COMMANDS)[number % len(COMMANDS)]
        places, options = COMMANDS[command]
        given = {place: made[place] for place in places}
        given |= dict.fromkeys(NEEDED.get(command, ()), "out")
        if command == "plan":
            given["--sequences"] = "10"
        some = rng.sample([*places, *options], rng.choice((1, 1, 2)))
        changed = {place: rng.choice(WORDS) for place in some}
        changed = {place: made.get(word, word) for place, word in changed.items()}
        allowed = all(options.get(place, nothing)(word) for place, word in changed.items())
        if command == "demo" and allowed:
            continue  # it would train a model
        words = [command]
        for place, word in (given | changed).items():
            words += [place, word] if place.startswith("--") else [word]
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        done = CliRunner().invoke(app, words)
        signal.setitimer(signal.ITIMER_REAL, 0)
        told = f"{command} {changed!r:.150}"
        if done.exit_code and not isinstance(done.exception, SystemExit):
            wrong.append(f"{told}: {done.exception!r:.200}")
        elif done.exit_code == 0 and not allowed and "Usage" not in done.output:
            wrong.append(f"{told}: accepted")
        elif "\x1b[31mx" in done.output:
            wrong.append(f"{told}: colours the terminal")
        for path in Path().glob("*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return wrong


@pytest.mark.filterwarnings("ignore")
def test_odd_words_are_refused(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert not called(inputs(tmp_path), 100)
