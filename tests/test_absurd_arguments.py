"""Absurd arguments of every kind: an error of ours, or a value that means something.

Each case is a call with one or two arguments replaced. What is accepted is known for every
argument: an answer to anything else is as wrong as a traceback. `tests/test_fuzz.py`
runs many more.
"""

import random
import shutil
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from dense_ekfac import asked, corpus, gpt2
from torch import nn

from ekfac_fast import Error, Factors, fit, prepare_queries, score, self_scores
from ekfac_fast.data import read, read_queries, tokenize

VALUES = [
    None, True, False, -1, 0, 1, 2, 3, 7, 1.5, -0.5, 0.1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**70),
    10**400, float("nan"), float("inf"), -float("inf"), 1e-320, 1j, "", "0", "3", "mlp", "refuse",
    "truncate", "chunk", "line", "text", "tfidf:3", "tfidf:²", "tfidf:0", "\0", "a\0b", "\ud83d",
    "x" * 5000, b"mlp", b"", [], [[]], [None], [1], [1, 2], [-1], [1.5], ["mlp"], ["*"], [[0]] * 3,
    [[1.5]] * 3, [[99]] * 3, [[-1]] * 3, {}, {"input_ids": [1, 2]}, {1}, (), range(3), object(),
    Path(__file__) / "x", Path("/proc/none/x"), np.int64(3), np.float32(0.1), np.zeros(3),
    np.zeros((2, 2)), np.array(3), torch.tensor(3), torch.zeros(2, 3), torch.float32, torch.int8,
    torch.bfloat16, nn.Identity(), nn.Linear(2, 2), Error, iter([1]), slice(2),
]  # fmt: skip


def whole(least: int = 1, most: int = 2**63 - 1) -> Callable[[object], bool]:
    def holds(x: object) -> bool:
        kind = isinstance(x, int | np.integer) and not isinstance(x, bool)
        return x is None or (kind and least <= x <= most)

    return holds


def one_of(*values: object) -> Callable[[object], bool]:
    return lambda x: any(x is v or (isinstance(x, str) and x == v) for v in values)


def writable(x: object) -> bool:
    return isinstance(x, str | Path) and str(x) not in ("", ".") and "/" not in str(x)


def nothing(x: object) -> bool:
    return False


PASS = {
    "task": one_of(None), "batch_tokens": whole(), "batch_size": whole(),
    "on_long": one_of("truncate", "refuse"), "autocast": one_of(None, torch.bfloat16),
    "progress": one_of(None), "out": writable, "model": nothing,
}  # fmt: skip


def damping(x: object) -> bool:
    number = isinstance(x, int | float | np.number) and not isinstance(x, bool)
    return x is None or (number and 0 <= x < 1e300)


FLAG = one_of(True, False)
SCORE = {
    "queries": nothing, "dataset": nothing, "per_token": FLAG, "per_layer": FLAG, "top_k": whole(),
    "candidates": lambda x: x is None or x == "tfidf:3" or x == [[0]] * 3, "train_size": whole(),
}  # fmt: skip
FIT = {
    "dataset": nothing, "layers": lambda x: x is None or x in ("mlp", ["mlp"], ["*"]),
    "shared_parameters": FLAG, "max_examples": whole(), "eigenvalue_examples": whole(),
    "seed": whole(0, 2**64 - 1),
}  # fmt: skip
CONTEXT = {"context": lambda x: x is not None and whole(2)(x)}
TOKENIZE = {
    "records": nothing, "tokenizer": nothing, "on_long": one_of("chunk", "truncate", "refuse"),
    "on_empty": one_of("refuse", "skip"), "progress": one_of(None),
}  # fmt: skip


class Words:
    """A tokenizer without a BOS token: a token for every character."""

    def __call__(self, text, **_):
        each = [[ord(c) % 61 for c in one] for one in ([text] if isinstance(text, str) else text)]
        return {"input_ids": each[0] if isinstance(text, str) else each}


class Calls:
    """Calls of the public functions with right arguments, made in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "a.jsonl").write_text('{"text": "one two three"}\n' * 4)
        (folder / "q.jsonl").write_text('{"prompt": "one", "completion": " two"}\n')

    @cached_property
    def made(self) -> tuple:
        model, data = gpt2().eval(), corpus()
        factors = fit(model, data, out=self.folder / "factors")
        return model, data, factors, prepare_queries(model, factors, asked(), rank=4)

    def all(self) -> dict[str, tuple[Callable, dict, dict]]:
        """Function, right arguments, what else each may be."""
        model, data, factors, queries = self.made
        run = {"model": model, "out": "out"}
        files = {"tokenizer": Words(), "context": 24}
        preparing = {"factors": nothing, "queries": nothing, "rank": whole(), "damping": damping}
        absent = {x: lambda x: x is None for x in ("refine", "dataset", "refine_examples")}
        return {
            "fit": (fit, run | {"dataset": data}, PASS | FIT),
            "prepare_queries": (
                prepare_queries, run | {"factors": factors, "queries": asked()},
                PASS | preparing | absent | {"out": lambda x: x is None or writable(x)},
            ),
            "score": (score, run | {"queries": queries, "dataset": data}, PASS | SCORE),
            "self_scores": (
                self_scores, run | {"factors": factors, "dataset": data},
                PASS | {"factors": nothing, "dataset": nothing, "damping": damping,
                        "train_size": whole()},
            ),
            "read": (
                lambda **given: list(read(**given)), {"path": self.folder / "a.jsonl"},
                {"path": nothing, "split": one_of("file", "paragraph", "line"),
                 "fields": lambda x: x is None},
            ),
            "tokenize": (
                tokenize, files | {"records": [{"text": "one two"}] * 3}, TOKENIZE | CONTEXT,
            ),
            "read_queries": (
                read_queries, files | {"path": self.folder / "q.jsonl"},
                {"path": nothing, "tokenizer": nothing} | CONTEXT,
            ),
            "Factors": (Factors, {"folder": self.folder / "factors"}, {"folder": nothing}),
            "example": (self._example, {}, EXAMPLE),
        }  # fmt: skip

    def _example(self, **fields: object) -> object:
        """`fit` on a data set with one example that has odd fields."""
        whole = {"input_ids": [1, 2, 3, 4]} | fields
        return fit(self.made[0], [*self.made[1], whole], out="out")


# Of an example of four tokens; an id that is no whole number is not taken as one.
EXAMPLE = {
    "input_ids": lambda x: isinstance(x, list | tuple | range) and whole_ids(x),
    "labels": lambda x: x is None, "attention_mask": lambda x: x is None,
    "position_ids": lambda x: x is None,
    "id": lambda x: not isinstance(x, int) or -(2**63) <= x < 2**63,
}  # fmt: skip


def whole_ids(x: object) -> bool:
    return bool(len(x)) and all(isinstance(i, int) and 0 <= i < 61 for i in x)


inputs = Calls


def called(calls: Calls, count: int, seed: int = 0) -> list[str]:
    """`count` calls with odd arguments, and what went wrong."""
    rng, wrong, known = random.Random(seed), [], calls.all()
    for number in range(count):
        name = list(known)[number % len(known)]
        function, right, allowed = known[name]
        changed = {
            argument: rng.choice(VALUES)
            for argument in rng.sample(list(allowed), min(len(allowed), rng.choice((1, 1, 2))))
        }
        if callable(changed.get("progress")):
            continue  # what it raises is its own
        try:
            function(**(right | changed))
        except Error:
            pass
        except Exception as error:
            wrong.append(f"{name}({changed!r:.200}): {error!r:.200}")
        else:
            if not all(allowed[argument](value) for argument, value in changed.items()):
                wrong.append(f"{name}({changed!r:.200}): accepted")
        for path in calls.folder.glob("work/*"):
            shutil.rmtree(path)
    return wrong


def test_odd_arguments_are_refused(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    calls = Calls(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not called(calls, 150)
