"""A run that several processes share is the run of one: factors, queries, scores; also when some
are killed and others go on.

`python tests/test_processes.py 30` is the long leg of the kills.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from ekfac_fast import Factors, Queries, Scores
from ekfac_fast.cli import app
from ekfac_fast.errors import Notice
from ekfac_fast.stages import processes
from ekfac_fast.store.files import load_tensors

HERE = Path(__file__).parent


class Machine:
    """A call runs a job in so many processes: what each ended with."""

    def __init__(self, root: Path) -> None:
        self.root, self.count = root, 0
        self.parent = subprocess.Popen(
            [sys.executable, HERE / "several_processes.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip

    def __call__(self, size: int, out: Path, kill: list | None = None, **arguments) -> list[int]:
        self.count += 1
        meeting = str(self.root / f"meeting-{self.count}")
        asked = {"size": size, "meeting": meeting, "kill": kill, "more": [str(out), arguments]}
        print(json.dumps(asked), file=self.parent.stdin, flush=True)
        return json.loads(self.parent.stdout.readline())

    def close(self) -> None:
        self.parent.stdin.close()
        self.parent.wait(30)
        self.parent.stdout.close()


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    found = Machine(tmp_path_factory.mktemp("processes"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def alone(machine):
    """The folder of a job as one process makes it."""
    known = {}

    def made(**arguments) -> Path:
        key = json.dumps(arguments)
        if key not in known:
            known[key] = machine.root / f"alone-{len(known)}"
            run(machine, 1, known[key], **arguments)
        return known[key]

    return made


def run(machine: Machine, size: int, out: Path, **arguments) -> None:
    """A job that has to end well in every process."""
    codes = machine(size, out, **arguments)
    assert codes == [0] * size, [p.read_text() for p in out.parent.glob(f"{out.name}.error-*")]


def close(got, want, tolerance: float, what: str) -> None:
    got, want = (torch.tensor(np.asarray(x)).double() for x in (got, want))
    assert got.shape == want.shape, what
    assert torch.equal(got.isnan(), want.isnan()), what
    got, want = got.nan_to_num(), want.nan_to_num()
    assert (got - want).norm() <= tolerance * want.norm(), (what, float((got - want).norm()))


def same(
    folder: Path, whole: Path, tolerance: float, queries: tuple[str, ...] = ("queries", "cg")
) -> None:
    """Every result in one folder is that in another.

    What rounding does to covariances in fp32 (7e-8) is more in eigenvectors of near eigenvalues, so
    in queries; scores are sums of all.
    """
    loose = 100 * tolerance if tolerance > 1e-8 else tolerance
    for name in ("activation_covariance", "gradient_covariance", "lambda_matrix"):
        got, want = (load_tensors(f / "fit" / f"{name}.safetensors") for f in (folder, whole))
        assert got.keys() == want.keys()
        if name != "lambda_matrix":  # of eigenvectors that are any in a plane
            for layer in want:
                close(got[layer], want[layer], tolerance, f"{name} of {layer}")
    for name in ("num_activation_covariance_processed", "num_lambda_processed"):
        got, want = (load_tensors(f / "fit" / f"{name}.safetensors") for f in (folder, whole))
        assert {n: int(x) for n, x in got.items()} == {n: int(x) for n, x in want.items()}
    factors = [Factors(f / "fit") for f in (folder, whole)]
    assert factors[0].identity == factors[1].identity
    for name in queries:
        got, want = (Queries.load(f / name) for f in (folder, whole))
        close(got.measurements, want.measurements, tolerance, name)
        for x, y in zip(got.layers, want.layers, strict=True):
            close(x.dense(), y.dense(), loose, f"{name} of {x.layer.name}")
    for name in ("scores", "some", "self"):
        got, want = (Scores(f / name) for f in (folder, whole))
        close(got.matrix, want.matrix, tolerance, name)
    got, want = (Scores(f / "scores") for f in (folder, whole))
    for path in folder.glob("dot-*.npy"):
        close(np.load(path), np.load(whole / "dot-0.npy"), tolerance, path.name)
    assert want.unattributed is None
    if got.unattributed is not None:
        assert "sharded over processes" in got.unattributed
        loose = max(loose, 1e-6)  # another attention, and norms in fp32
    for q in range(got.queries):
        for x, y in zip(got.details(q), want.details(q), strict=True):
            assert x.index == y.index
            close(x.per_layer_token, y.per_layer_token, loose, f"detail of {q}, {x.index}")
            if got.unattributed is None:
                close(x.target, y.target, loose, f"output tokens of {q}, {x.index}")
                close(x.input, y.input, loose, f"input tokens of {q}, {x.index}")
        heaps = [Scores(f / "heap").top(q, 3) for f in (folder, whole)]
        assert [i for i, _ in heaps[0]] == [i for i, _ in heaps[1]]
        close([s for _, s in heaps[0]], [s for _, s in heaps[1]], tolerance, "heap")
    left = [p.name for p in folder.rglob("*") if "state" in p.name or "heap-" in p.name]
    left += [p.name for p in folder.rglob("columns_*")]
    assert not left


@pytest.mark.parametrize(
    ("model", "tolerance", "size"),
    [
        ("gpt2", 5e-6, 2),
        ("gpt2 fp64", 1e-12, 3),
        ("gpt2 fp64", 1e-12, 4),
        ("llama fp64", 1e-12, 3),
        ("llama fp64", 1e-12, 4),
        ("mixtral fp64", 1e-12, 2),
        ("mixtral fp64", 1e-12, 4),
    ],
)
def test_several_are_one(machine, alone, model, tolerance, size):
    out = machine.root / f"{model}-{size}"
    run(machine, size, out, model=model)
    same(out, alone(model=model), tolerance)


@pytest.mark.parametrize(("size", "shards"), [(2, 2), (4, 2), (3, 3)])
def test_queries_shared_out(machine, alone, size, shards):
    """A mesh of processes: batches by queries, of which there are 3."""
    out = machine.root / f"shards-{size}-{shards}"
    run(machine, size, out, model="llama fp64", query_shards=shards)
    same(out, alone(model="llama fp64"), 1e-12)


@pytest.mark.parametrize("how", [{}, {"sharded": True}])
def test_eigenvalues_of_a_sample(machine, alone, how):
    """Two passes of different batches, of which one process may have fewer."""
    arguments = {"model": "gpt2 fp64", "eigenvalue_examples": 5}
    out = machine.root / f"sample-{len(how)}"
    run(machine, 3, out, **arguments, **how)
    same(out, alone(**arguments), 1e-12, queries=("queries",))


def test_shards_that_do_not_divide_the_processes(machine):
    out = machine.root / "shards"
    assert machine(3, out, model="gpt2", query_shards=2) == [1, 1, 1]
    assert "query_shards is 2, which does not divide 3 processes" in told(out, 3)[0]


@pytest.mark.parametrize("model", ["gpt2 fp64", "llama fp64"])
@pytest.mark.parametrize("arguments", [{}, {"examples": 3, "batch_tokens": 1000}])
def test_a_sharded_model_is_the_whole_one(machine, alone, model, arguments):
    """FSDP2: every process makes as many passes, also where there are fewer batches."""
    out = machine.root / f"sharded-{model}-{len(arguments)}"
    run(machine, 2, out, model=model, sharded=True, **arguments)
    same(out, alone(model=model, **arguments), 1e-12, queries=("queries",))


def test_fewer_batches_than_processes(machine, alone):
    arguments = {"model": "llama fp64", "examples": 3, "batch_tokens": 1000}
    out = machine.root / "few"
    run(machine, 4, out, **arguments)
    same(out, alone(**arguments), 1e-12)


def told(out: Path, size: int) -> list[str]:
    return [Path(f"{out}.error-{rank}").read_text() for rank in range(size)]


def test_who_waits_long_says_so(monkeypatch):
    """A call that only some processes of a group make."""
    keys = torch.distributed.HashStore()
    monkeypatch.setattr(processes, "PATIENCE", 0.05)

    def come_late() -> None:
        keys.add(f"ekfac_fast/meeting {processes._meetings}", 1)

    late = threading.Timer(0.3, come_late)
    late.start()
    with pytest.warns(Notice, match=r"process 0 has waited 0.05 s: 1 of 2 are not here yet"):
        processes.Processes(0, 2, keys).meet()
    late.join()


def test_other_data_is_found_before_the_first_pass(machine):
    out = machine.root / "other data"
    assert machine(3, out, model="gpt2", **{"other data": 1}) == [1] * 3
    for text in told(out, 3):
        assert text.startswith("ProcessError")
        assert "process 1 has another run than process 0" in text
        assert "data: process 0" in text
    assert not (out / "fit").exists()


def fails(machine: Machine, out: Path, **arguments) -> str:
    """What is said by the one that fails, and by all others with its name."""
    start = time.monotonic()
    assert machine(3, out, **arguments) == [1] * 3
    assert time.monotonic() - start < 60
    texts = told(out, 3)
    (met,) = [rank for rank, text in enumerate(texts) if text.startswith("NotFiniteError")]
    said = texts[met].removeprefix("NotFiniteError: ")
    for rank in {*range(3)} - {met}:
        assert texts[rank] == f"ProcessError: process {met} of 3: {said}"
    return said


def test_one_that_fails_ends_all_with_its_message(machine):
    """An example whose loss is NaN is met by one process; the others wait for it elsewhere."""
    said = fails(machine, machine.root / "broken", model="llama", broken=4)
    assert "the training loss is nan for examples" in said


@pytest.mark.parametrize("broken", [1, 7, 12])
def test_one_that_fails_ends_all_of_a_sharded_model(machine, broken):
    """The others are in the model's own exchange of weights, or wait at the end."""
    out = machine.root / f"broken shard {broken}"
    said = fails(machine, out, model="llama", broken=broken, sharded=True)
    assert "the training loss is nan for examples" in said


@pytest.mark.parametrize(
    ("job", "what"),
    [("attribution", "for examples 5"), ("references", "example 5: its log-probability")],
)
def test_one_that_fails_ends_what_has_no_folder(machine, job, what):
    assert what in fails(machine, machine.root / job, job=job)


def write_inputs(home: Path) -> Path:
    """A model folder with its tokenizer, a corpus and two questions."""
    home.mkdir()
    text = [f"line {i} says that {i * i} is the square of {i}" for i in range(24)]
    (home / "corpus.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in text))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text, vocab_size=300, special_tokens=["<|endoftext|>"])
    known = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>"
    )
    known.save_pretrained(home / "model")
    config = GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=300, n_positions=64, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(home / "model")
    rows = [{"prompt": f"line {i} says that", "completion": f" {i * i}"} for i in (3, 7)]
    (home / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def test_torchrun(tmp_path):
    """The command line in two processes: one of them speaks, and results are those of one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    home = write_inputs(tmp_path / "inputs")

    def command(size: int, *words: object) -> str:
        if size == 1:
            alone = CliRunner().invoke(app, [*map(str, words)])
            assert alone.exit_code == 0, alone.output
            return alone.output
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        done = subprocess.run(
            [*start, str(size), "-m", "ekfac_fast", *map(str, words)],
            env=environment, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    model, corpus = home / "model", home / "corpus.jsonl"
    for size in (1, 2):
        fitted, scored = tmp_path / f"factors-{size}", tmp_path / f"scores-{size}"
        how = ["--batch-tokens", 256, *(["--shard"] if size > 1 else [])]
        told = command(size, "fit", model, corpus, "--out", fitted, *how)
        assert told.count("factors of 2 layers") == 1
        told = command(
            size, "score", model, fitted, home / "queries.jsonl", corpus, "--out", scored
        )
        assert told.count("  1. ") == 2
    got, want = (Scores(tmp_path / f"scores-{n}").matrix for n in (2, 1))
    close(got, want, 5e-6, "scores")


def killed(machine: Machine, whole: Path, count: int, **arguments) -> str:
    """`count` times a process of 1 to 3 is killed at a random moment; what is started then, with
    another number of processes, ends as a run that nobody disturbed.
    """
    rng, kills, runs = random.Random(count), 0, 0
    start = time.monotonic()
    assert machine(2, machine.root / "timed", **arguments) == [0, 0]
    took = time.monotonic() - start
    while kills < count:
        out, codes, size = machine.root / f"killed-{runs}", [-9], rng.choice([2, 3])
        while any(codes):
            again = kills < count and (codes == [-9] or rng.random() < 0.4)
            kill = [rng.randrange(size), rng.uniform(0.2, 0.9) * took] if again else None
            codes = machine(size, out, kill, **arguments)
            told = [p.read_text() for p in out.parent.glob(f"{out.name}.error-*")]
            # Who notices before it is killed as well says that it has lost the others.
            assert set(codes) <= ({0, 1, -9} if -9 in codes else {0}), (codes, told)
            assert all(text.startswith("ProcessError: ") for text in told), told
            kills += any(codes)
            size = rng.choice([1, 2, 3])
        same(out, whole, 1e-11)
        shutil.rmtree(out)
        runs += 1
    return f"{kills} kills in {runs} runs: all equal"


def test_killed_while_queries_are_shared_out(machine, alone):
    arguments = {"model": "gpt2 fp64", "examples": 40, "batch_tokens": 32}
    out = machine.root / "killed-shards"
    codes = machine(2, out, [1, 4.0], query_shards=2, **arguments)
    run(machine, 4, out, query_shards=2, **arguments)
    same(out, alone(**arguments), 1e-11)
    assert set(codes) <= {0, 1, -9}


def test_killed_and_continued_by_another_number(machine, alone):
    arguments = {"model": "gpt2 fp64", "examples": 40, "batch_tokens": 32}
    killed(machine, alone(**arguments), 2, **arguments)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        m = Machine(Path(root))
        asked = {"model": "gpt2 fp64", "examples": 40, "batch_tokens": 32}
        assert m(1, Path(root) / "alone", **asked) == [0]
        print(killed(m, Path(root) / "alone", int(sys.argv[1]), **asked))
        m.close()
