"""Damaged files of every kind: an error of ours, or the right answer; never a traceback.

`python tests/test_fuzz.py 2000` runs a longer leg of the same, with odd calls and commands.
"""

import gzip
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import test_absurd_arguments
import test_absurd_commands
import torch
from dense_ekfac import asked, corpus, gpt2
from test_conversations import CHATML, speaking

from ekfac_fast import Error, Factors, Scores, fit, prepare_queries, score, self_scores
from ekfac_fast.cli.runs import load_run
from ekfac_fast.data import read, tokenize
from ekfac_fast.stages.queries import Queries
from ekfac_fast.store.files import save_json

WORDS = [b"null", b"NaN", b"1e999", b"-1", b"{}", b"[]", b'"', b"\xff", b"\x00", b"\\ud83d"]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three random edits: a bit, a cut, a byte gone, a slice twice, a word put in."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if data:
                at = rng.randrange(len(data))
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            case 1:
                data = data[:at]
            case 2:
                data = data[:at] + data[at + rng.randint(1, 9) :]
            case 3:
                data = data[:at] + data[max(0, at - rng.randint(1, 30)) :]
            case 4:
                data = data[:at] + rng.choice(WORDS) + data[at:]
            case _:
                data = data[:at] + rng.choice(WORDS) + data[at + rng.randint(1, 9) :]
    return data


def inputs(folder: Path) -> dict[Path, object]:
    """Files that users bring, with what reads them."""
    rows = [{"text": f"passage {i} — of some length, {'é' * i}"} for i in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    made = {
        "a.jsonl": lines,
        "b.json": json.dumps(rows, indent=1).encode(),
        "c.txt": "\n\n".join(row["text"] for row in rows).encode(),
        "d.jsonl.gz": gzip.compress(lines),
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)
    pa.parquet.write_table(pa.table({"text": [r["text"] for r in rows]}), folder / "e.parquet")
    names = [*made, "e.parquet"]
    talks = [
        {"messages": [{"role": role, "content": row["text"]} for role in ("user", "assistant")]}
        for row in rows
    ]
    (folder / "f.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    tokenizer = speaking(CHATML)
    return {
        folder / name: (
            lambda path=folder / name: [
                r["text"]
                for r in read(path, split="paragraph" if path.suffix == ".txt" else "file")
            ]
        )
        for name in names
    } | {folder / "f.jsonl": lambda: list(tokenize(read(folder / "f.jsonl"), tokenizer, 256))}


def results(folder: Path) -> dict[Path, object]:
    """Files that we write, with the step that reads them."""
    model, data = gpt2().eval(), corpus()
    factors = fit(model, data, out=folder / "f")
    prepared = prepare_queries(model, factors, asked(), rank=4)
    score(model, prepared, data, out=folder / "s", per_token=True)
    score(model, prepared, data, out=folder / "h", top_k=3)
    self_scores(model, factors, data, out=folder / "i")
    prepared.save(folder / "s")
    run = {
        "model": "m",
        "factors": "f",
        "cutting": {"context": 24},
        "names": ["a"],
        "damping_rule": "",
    }
    save_json(folder / "s/run.json", run)

    def eigen():
        found = Factors(folder / "f")
        return [(found[n].lam, found[n].Qa, found[n].Qg, found.tokens) for n in found]

    def scores():
        found = Scores(folder / "s")
        return found.matrix[:], [found.top(q, 3) for q in range(3)]

    def details(q):
        return [(d.index, d.per_layer_token) for d in Scores(folder / "s").details(q)]

    def heap():
        return Scores(folder / "h").top(0, 3)

    def selves():
        return Scores(folder / "i").matrix[:]

    def queries():
        found = Queries.load(folder / "s")
        return found.damping, [(x.L, x.R, x.energy) for x in found.layers]

    return {
        folder / "f/manifest.json": eigen,
        folder / "f/lambda_matrix.safetensors": eigen,
        folder / "f/activation_eigenvectors.safetensors": eigen,
        folder / "f/gradient_eigenvectors.safetensors": eigen,
        folder / "f/num_lambda_processed.safetensors": eigen,
        folder / "f/num_activation_covariance_processed.safetensors": eigen,
        folder / "s/manifest.json": scores,
        folder / "s/scores.npy": scores,
        folder / "s/scores.done": scores,
        folder / "s/plan.safetensors": scores,
        **{folder / f"s/shard_{q:06d}.safetensors": partial(details, q) for q in range(3)},
        folder / "s/queries.json": queries,
        folder / "s/queries.safetensors": queries,
        folder / "s/run.json": lambda: load_run(folder / "s"),
        folder / "h/manifest.json": heap,
        folder / "h/heap.safetensors": heap,
        folder / "i/manifest.json": selves,
        folder / "i/scores.npy": selves,
        folder / "i/scores.done": selves,
        folder / "i/plan.safetensors": selves,
    }


def same(one: object, other: object) -> bool:
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor | np.ndarray):
        return np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True)
    return one == other


def fuzz(cases: dict, count: int, strict: bool) -> list[str]:
    """What went wrong: tracebacks, and with `strict` other answers than the right one."""
    rng, wrong = random.Random(0), []
    for path, step in cases.items():
        whole, right = path.read_bytes(), step()
        for _ in range(count):
            path.write_bytes(mutated(whole, rng))
            try:
                got = step()
            except Error:
                continue
            except Exception as error:
                wrong.append(f"{path.name}: {error!r:.150}")
            else:
                if strict and not same(got, right):
                    wrong.append(f"{path.name}: accepted")
        path.write_bytes(whole)
    return wrong


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [inputs, results])
def test_damage_is_noticed(tmp_path, make):
    assert not fuzz(make(tmp_path), 40, strict=make is results)


def main(count: int) -> list[str]:
    """Half of `count` damaged files, a quarter each calls and commands: what went wrong."""
    folder, home = Path(tempfile.mkdtemp()), os.getcwd()
    try:
        brought, written = inputs(folder), results(folder)
        each = count // 2 // (len(brought) + len(written))
        bad = fuzz(brought, each, strict=False) + fuzz(written, each, strict=True)
        for module in (test_absurd_arguments, test_absurd_commands):
            own = folder / module.__name__
            (own / "work").mkdir(parents=True)
            os.chdir(own / "work")
            bad += module.called(module.inputs(own), count // 4)
    finally:
        os.chdir(home)
        shutil.rmtree(folder)
    files = len(brought) + len(written)
    print(
        f"{each} damaged copies of each of {files} files, {count // 4} calls, {count // 4} commands"
    )
    return bad


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    bad = main(int(sys.argv[1]))
    print("\n".join(bad) or "each an error of ours, or the right answer")
    sys.exit(bool(bad))
