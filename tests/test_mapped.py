"""Token files mapped into memory: the same examples, checks and scores as of lists."""

import os
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import Subset
from transformers import GPT2Config, GPT2LMHeadModel

from ekfac_fast import data, fit, prepare_queries, score, self_scores
from ekfac_fast.data import open_tokens, survey
from ekfac_fast.data.batches import Batches, data_fingerprint
from ekfac_fast.data.mapped import MappedTokens, Part
from ekfac_fast.data.tokens import Tokens
from ekfac_fast.errors import ArgumentError, DataError, Notice
from ekfac_fast.stages.candidates import top_candidates
from ekfac_fast.store.files import load_tensors

VOCABULARY, POSITIONS = 40, 12


def rows_of(seed: int = 0, count: int = 30, least: int = 2, most: int = POSITIONS) -> list:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, rng.integers(least, most + 1)).tolist()
            for _ in range(count)]  # fmt: skip


def listed(rows: list) -> list[dict]:
    return [{"input_ids": row} for row in rows]


def written(path, rows: list, dtype="uint16"):
    """A .bin of these rows as a data set."""
    np.concatenate(rows).astype(dtype).tofile(path)
    return open_tokens(path, ends=np.cumsum([*map(len, rows)]), dtype=dtype)


def in_parts(rows: list, labels: list | None = None, at: int = 7) -> MappedTokens:
    """The same in two arrays."""
    parts = []
    for some in (slice(None, at), slice(at, None)):
        flat, ends = np.concatenate(rows[some]), np.cumsum([*map(len, rows[some])])
        own = None if labels is None else np.concatenate(labels[some])
        before = some.start or 0
        parts.append(Part(flat.astype(np.int64), ends.astype(np.int32), own, before=before))
    return MappedTokens(parts)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=8, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def model():
    return gpt2()


def test_a_file_is_cut_into_sequences(tmp_path):
    path = tmp_path / "train.bin"
    for dtype in ("uint16", "uint32", "uint8"):
        np.arange(10, 33).astype(dtype).tofile(path)
        found = open_tokens(path, 5, dtype=dtype)
        rows = [found[i]["input_ids"].tolist() for i in range(len(found))]
        assert rows == [[*range(at, min(at + 5, 33))] for at in range(10, 33, 5)]
        assert found[-1]["input_ids"].dtype == torch.int64
        assert found.source(4) == f"{path}, sequence 5"
        with pytest.raises(IndexError):
            found[5]
    with pytest.raises(DataError, match=r"train\.bin, sequence 1: no column 'set' was kept"):
        found.column("set")


@pytest.mark.parametrize(("magic", "dtype"), [((20240520, 1), "uint16"), ((20240801, 7), "uint32")])
def test_a_header_is_read(tmp_path, magic, dtype):
    head, ids = np.zeros(256, np.int32), np.arange(7, dtype=dtype)
    head[:3] = *magic, 7
    path = tmp_path / "a.bin"
    path.write_bytes(head.tobytes() + ids.tobytes())
    found = open_tokens(path, 4)
    assert [found[i]["input_ids"].tolist() for i in range(2)] == [[0, 1, 2, 3], [4, 5, 6]]
    with pytest.raises(DataError, match=f"its header says {dtype}, not uint8"):
        open_tokens(path, 4, dtype="uint8")
    path.write_bytes(head.tobytes() + ids[:-1].tobytes())
    with pytest.raises(DataError, match=r"header speaks of 7 tokens, .* cut off, or damaged"):
        open_tokens(path, 4)


def test_files_that_are_none_are_refused(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(DataError, match=r"a\.bin: no file of tokens \(.*No such file"):
        open_tokens(path, 4)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.bin: no file of tokens \(cannot mmap an empty"):
        open_tokens(path, 4)
    path.write_bytes(b"abc")
    with pytest.raises(DataError, match="3 bytes are no tokens of uint16"):
        open_tokens(path, 4)
    for ids in (np.arange(50), np.arange(100000, 100050) * 3):
        ids.astype(np.uint32).tofile(path)
        with pytest.raises(DataError, match=r"as in a file of uint32: give dtype='uint32'"):
            open_tokens(path, 4)
        assert len(open_tokens(path, 4, dtype="uint32")) == 13
    for wrong in ({}, {"context": 4, "ends": np.array([50])}):
        with pytest.raises(ArgumentError, match="give context, or ends, and not both"):
            open_tokens(path, dtype="uint32", **wrong)
    with pytest.raises(ArgumentError, match="context is 1, expected a whole number of at least 2"):
        open_tokens(path, 1, dtype="uint32")
    for ends, message in [
        ([3, 49], "sequences end at token 49, there are 50 tokens"),
        ([3, 9, 8, 50], r"a\.bin: ends\[2\] is 8, before ends\[1\]"),
        ([-2, 50], "sequences end at"),
        ([2.0, 50.0], r"ends must be a flat array of integers, not float64 \[2\]"),
    ]:
        with pytest.raises(DataError, match=message):
            open_tokens(path, ends=np.array(ends), dtype="uint32")
    with pytest.raises(DataError, match="2 labels for 3 tokens"):
        Part(np.arange(3), np.array([3]), np.arange(2))


@pytest.mark.parametrize("block", [1, 20, 1 << 18])
def test_a_survey_finds_what_examples_one_by_one_are(tmp_path, model, monkeypatch, block):
    monkeypatch.setattr(survey, "BLOCK", block)
    rows = rows_of(least=1, most=POSITIONS + 5)
    masked = [[-100] * min(len(row) - 1, 3) + row[min(len(row) - 1, 3) :] for row in rows]
    masked[3] = [-100] * len(rows[3])
    marked = np.concatenate([np.where(np.array(x) < 0, ~np.array(ids), ids)
                             for ids, x in zip(rows, masked, strict=True)])  # fmt: skip
    table = np.array([[end, i, 0] for i, end in enumerate(np.cumsum([*map(len, rows)]))])
    plain = listed(rows)
    silent = [{"input_ids": a, "labels": b} for a, b in zip(rows, masked, strict=True)]
    pairs = [
        (plain, written(tmp_path / "a.bin", rows)),
        (plain, in_parts(rows)),
        (silent, in_parts(rows, masked)),
        (silent, Tokens(plain, marked.astype(np.int32), table, 0, 0, 0)),
    ]
    for slow, fast in pairs:
        for most in (None, 9):
            with pytest.warns(Notice) as told:
                a, b = (Batches(x, model, max_examples=most) for x in (slow, fast))
            assert str(told[0].message) == str(told[1].message)
            assert a.lengths.tolist() == b.lengths.tolist()
            assert b.truncated == sum(len(row) > POSITIONS for row in rows[:most]) > 0
            assert (a.truncated, a.without_targets) == (b.truncated, b.without_targets)
            assert a.divided() == b.divided()
            for one, other in zip(a.gathered([0, 5]).items(), b.gathered([0, 5]).items(),
                                  strict=True):  # fmt: skip
                assert one[0] == other[0]
                assert torch.equal(one[1], other[1])
            if isinstance(fast, Tokens):
                assert a.fingerprint() == b.fingerprint()
        if isinstance(fast, Tokens):
            assert data_fingerprint(slow) == data_fingerprint(fast)
        for data_set in (slow, fast):
            with pytest.raises(DataError, match="the model has 12 positions: split it") as refused:
                Batches(data_set, model, on_long="refuse")
            assert f"example {[len(x) > POSITIONS for x in rows].index(True)}" in str(refused.value)


def test_fingerprints_of_kinds_that_there_were_stay(model):
    rows = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10, 11, 12, 13, 14], [31, 0, 31]]
    flat = np.array([1, 2, 3, ~4, 5, ~6, 7, 8], dtype=np.int32)
    table = np.array([[3, 0, 0], [5, 1, 0], [8, 2, 0]])
    for expected, one in {
        "ad5d25b346ddeb2e": listed(rows),
        "650ebe37891faac6": [{"input_ids": x, "labels": [-100, *x[1:]]} for x in rows],
        "64af4bf2a5a2add6": [{"input_ids": x, "id": 10 - i} for i, x in enumerate(rows)],
        "8624ce0aa1d9a6d0": [{"input_ids": np.array([1, 2, 3, 4]), "position_ids": [0, 1, 0, 1]}],
        "d41bc1bf0d785054": Tokens([{}] * 3, flat, table, 0, 0, 0),
        "4a8bf44959ae6896": [(torch.arange(2.0), torch.tensor(i)) for i in range(5)],
    }.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Notice)
            assert Batches(one, model).fingerprint() == expected
        assert data_fingerprint(one) == expected


def test_a_fingerprint_covers_every_value_and_every_border(tmp_path, model, monkeypatch):
    rows = rows_of()
    same = in_parts(rows)
    fingerprints = {data_fingerprint(same)}
    for at in (3, 20):
        assert data_fingerprint(in_parts(rows, at=at)) in fingerprints
    monkeypatch.setattr(survey, "BLOCK", 16)
    assert Batches(same, model).fingerprint() in fingerprints
    others = [in_parts(rows[:-1]), in_parts(rows, rows), written(tmp_path / "a.bin", rows)]
    for place in ((0, 0), (13, 1), (29, 0)):
        changed = [[*row] for row in rows]
        changed[place[0]][place[1]] ^= 1
        others += [in_parts(changed), in_parts(rows, changed)]
    moved = [[*row] for row in rows]
    moved[11].insert(0, moved[10].pop())
    others.append(in_parts(moved))
    for other in others:
        assert data_fingerprint(other) not in fingerprints
        fingerprints.add(data_fingerprint(other))
    # What is cut off at the model's positions is known by the model.
    rows = rows_of(most=POSITIONS + 4)
    flat = np.concatenate([np.array(row, np.int32) for row in rows])
    table = np.array([(end, i, 0) for i, end in enumerate(np.cumsum([*map(len, rows)]))])
    for long in (in_parts(rows), listed(rows), Tokens([{}] * len(rows), flat, table, 0, 0, 0)):
        with pytest.warns(Notice):
            assert Batches(long, model).fingerprint() == data_fingerprint(long)


@pytest.mark.parametrize("block", [1, 1 << 18])
@pytest.mark.parametrize(
    ("row", "values", "message"),
    [
        (17, [3, 40, 1], "token id 40 at position 1 is outside the vocabulary of 40"),
        (17, [3, -1], "token id -1 at position 1 is outside"),
        (17, [], "has no tokens"),
    ],
)
def test_wrong_values_amid_a_file_are_named(model, monkeypatch, block, row, values, message):
    monkeypatch.setattr(survey, "BLOCK", block)
    rows = rows_of()
    rows[row] = rows[25] = values
    message = rf"example 17 \(tokens in memory, sequence 18\): {message}"
    with pytest.raises(DataError, match=message):
        Batches(in_parts(rows), model)
    if values:
        with pytest.raises(DataError, match=message.replace("token id", "label")):
            Batches(in_parts(rows_of_lengths(rows), rows), model)
    # Not named is what the model does not get to see.
    rows = rows_of()
    rows[3] = [1] * POSITIONS + [99]
    with pytest.warns(Notice, match="1 are longer"):
        Batches(in_parts(rows), model)
    with pytest.raises(DataError, match=r"example 3 \(.*: token id 99 at position 12"):
        top_candidates([[1]], in_parts(rows), 1, VOCABULARY)


def rows_of_lengths(rows: list) -> list:
    return [[1] * len(row) for row in rows]


def test_a_class_that_reads_its_own_is_read_one_by_one(model):
    class Shifted(MappedTokens):
        def __getitem__(self, index):
            return {"input_ids": (super().__getitem__(index)["input_ids"] + 1) % VOCABULARY}

    rows = rows_of()
    shifted = Shifted(in_parts(rows).parts)
    assert shifted.survey(3, None, None) is shifted.blocks(3) is None
    told = listed([[(i + 1) % VOCABULARY for i in row] for row in rows])
    assert Batches(shifted, model).fingerprint() == Batches(told, model).fingerprint()
    some = Subset(in_parts(rows), [4, 2])
    assert Batches(some, model).lengths.tolist() == [len(rows[4]), len(rows[2])]


def test_what_stands_beside_the_ids_is_looked_at(model):
    rows = [[1, 2, 3, 0], [4, 5, 6, 7]]
    flat, ends = np.concatenate(rows), np.array([4, 8])

    def beside(**values) -> MappedTokens:
        return MappedTokens([Part(flat, ends, beside={n: np.array(x) for n, x in values.items()})])

    ones, padded = beside(attention_mask=[1] * 8), beside(attention_mask=[1] * 3 + [0] + [1] * 4)
    assert ones.survey(2, None, None) is not None
    assert padded.survey(2, None, None) is None
    assert Batches(ones, model).lengths.tolist() == [4, 4]
    assert Batches(padded, model).lengths.tolist() == [3, 4]
    packed = beside(position_ids=[0, 1, 0, 1, 0, 1, 2, 3])
    assert Batches(packed, model).packed
    with pytest.raises(DataError, match="the model takes no 'turns'"):
        Batches(beside(turns=[0] * 8), model)


def test_scores_are_bitwise_those_of_a_list(tmp_path, model):
    rows, asked = rows_of(), listed(rows_of(1, 3, least=4))
    lists, mapped = listed(rows), written(tmp_path / "a.bin", rows)
    found = []
    for name, corpus in (("lists", lists), ("mapped", mapped)):
        factors = fit(model, corpus, out=tmp_path / f"{name} f", batch_tokens=40)
        queries = prepare_queries(model, factors, asked, rank=4)
        full = score(model, queries, corpus, out=tmp_path / name, batch_tokens=40)
        best = score(
            model, queries, corpus, out=tmp_path / f"{name} k", batch_tokens=40, top_k=5,
            per_token=True, candidates="tfidf:9",
        )  # fmt: skip
        own = self_scores(model, factors, corpus, out=tmp_path / f"{name} s", batch_tokens=40)
        tops = [best.top(q, 5) for q in range(3)]
        details = [d.per_layer_token.tobytes() for q in range(3) for d in best.details(q)]
        found.append((full.matrix.tobytes(), own.matrix.tobytes(), tops, details))
        assert not (tmp_path / f"{name} k" / "scores.npy").exists()
        assert all(isinstance(x, int) for top in tops for x, _ in top)
    assert found[0] == found[1]


@pytest.mark.parametrize("block", [1, 30, 1 << 18])
def test_candidates_are_those_of_a_list(monkeypatch, block):
    monkeypatch.setattr(survey, "BLOCK", block)
    rows, asked = rows_of(count=120, most=20), rows_of(1, 4)
    for k in (1, 7, 500):
        for context in (None, 5):
            expected = top_candidates(asked, listed(rows), k, VOCABULARY, context=context)
            found = top_candidates(asked, in_parts(rows), k, VOCABULARY, context=context)
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_array_equal(found[1], expected[1])


CONTINUED = """
import os
from types import SimpleNamespace
import numpy as np
import torch
from torch import nn
from ekfac_fast import fit
from ekfac_fast.data import open_tokens

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mlp, self.head = nn.Embedding(40, 8), nn.Linear(8, 8), nn.Linear(8, 40)
    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.head(self.mlp(self.table(input_ids)).tanh()))

for out, after in (("once", 0), ("killed", 9), ("killed", 0)):
    if not (child := os.fork()):
        calls = 0
        def told(stage, done, total):
            global calls
            calls += 1
            if calls == after:
                os.kill(os.getpid(), 9)
        corpus = open_tokens("a.bin", ends=np.load("ends.npy"))
        fit(Net().eval(), corpus, out=out, layers="mlp", batch_tokens=24, progress=told)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_killed_and_continued(tmp_path):
    rows = rows_of()
    written(tmp_path / "a.bin", rows)
    np.save(tmp_path / "ends.npy", np.cumsum([*map(len, rows)]))
    ran = subprocess.run(
        [sys.executable, "-c", CONTINUED], cwd=tmp_path, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert ran.stdout.split() == ["0", "-9", "0"]
    names = sorted(path.name for path in (tmp_path / "once").glob("*.safetensors"))
    assert len(names) > 5
    for name in names:
        once, killed = (load_tensors(tmp_path / out / name) for out in ("once", "killed"))
        assert once.keys() == killed.keys()
        assert all(torch.equal(x, killed[key]) for key, x in once.items()), name


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "BLOCK", 1 << 14)
    peaks = []
    for size in (1 << 16, 1 << 21):
        np.full(size, 7, np.uint8).tofile(tmp_path / "a.bin")
        found = open_tokens(tmp_path / "a.bin", 64, dtype="uint8")
        tracemalloc.start()
        found.survey(len(found), 40, 64)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 8 bytes a sequence, of which there are 32000 more.
    assert peaks[1] - peaks[0] < 1.2 * 8 * len(found)


def test_the_door_has_it():
    assert data.open_tokens is open_tokens
    assert data.MappedTokens is MappedTokens
