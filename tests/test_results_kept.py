"""What is on disk after a kill, a link, a failed write or two writers is right, or is named."""

import os
import threading
from pathlib import Path

import pytest
import torch
from dense_ekfac import asked, corpus, gpt2
from test_report import facts, results
from typer.testing import CliRunner

from ekfac_fast import LanguageModelTask, Scores, fit, prepare_queries, report, score
from ekfac_fast.cli import app, runs
from ekfac_fast.curvature import eigen
from ekfac_fast.errors import StoreError
from ekfac_fast.model import sampling
from ekfac_fast.stages import detail
from ekfac_fast.stages import fit as fitting
from ekfac_fast.store.files import load_json, load_tensors, save_json, save_tensors
from ekfac_fast.store.folder import Store


class Killed(BaseException):
    """As a kill: nothing catches it."""


def dying(stage, share):
    """A progress that ends the run in a stage."""

    def progress(name, done, total):
        if name == stage and done >= share * total:
            raise Killed

    return progress


@pytest.fixture
def durable(monkeypatch):
    """Every batch is made durable."""
    monkeypatch.setattr("ekfac_fast.store.folder.Pace.due", True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    model = gpt2().eval()
    factors = fit(model, corpus(), out=tmp_path_factory.mktemp("kept") / "f")
    return model, prepare_queries(model, factors, asked(), rank=4)


@pytest.mark.parametrize(("stage", "share"), [("covariance", 0.5), ("eigenvalue", 0.7)])
def test_draws_near_an_edge_are_counted_once(tmp_path, monkeypatch, durable, stage, share):
    monkeypatch.setattr(sampling, "EDGE", 0.02)
    model, data, small = gpt2().eval(), corpus(30), {"batch_tokens": 40}

    def draws(name, **more):
        fit(model, data, out=tmp_path / name, **small, **more)
        return Store.load(tmp_path / name).state["edge_draws"]

    task = LanguageModelTask()
    whole = draws("whole", task=task)
    assert whole > 0
    assert draws("again", task=task) == whole
    with pytest.raises(Killed):
        draws("killed", progress=dying(stage, share))
    assert draws("killed") == whole


def test_seconds_of_a_scan_are_those_of_all_its_pieces(tmp_path, prepared, durable, monkeypatch):
    model, queries = prepared
    clock = [0.0]

    def ticking():
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr("ekfac_fast.stages.run.time.perf_counter", ticking)
    whole = score(model, queries, corpus(30), out=tmp_path / "w", batch_tokens=40).seconds
    with pytest.raises(Killed):
        score(model, queries, corpus(30), out=tmp_path / "k", batch_tokens=40,
              progress=dying("scan", 0.9))  # fmt: skip
    after = score(model, queries, corpus(30), out=tmp_path / "k", batch_tokens=40).seconds
    # Two ticks a batch, each of one second; a kill loses what was not yet made durable.
    assert 0.8 * whole <= after <= whole


def test_no_eigendecomposition_and_no_detail_is_made_again(
    tmp_path, prepared, durable, monkeypatch
):
    model, queries = prepared
    solved, batches = [], []
    solve = eigen.eigendecompositions

    def counted(jobs, *more, **how):
        solved.append(len(jobs))
        return solve(jobs, *more, **how)

    monkeypatch.setattr(fitting, "eigendecompositions", counted)
    seen = []

    def after_three(stage, done, total):
        seen.extend([stage] * (stage == "eigendecomposition"))
        if len(seen) == 3:
            raise Killed

    with pytest.raises(Killed):
        fit(model, corpus(), out=tmp_path / "f", progress=after_three)
    fit(model, corpus(), out=tmp_path / "f")
    assert solved == [8, 5]  # two sides of four layers, and those that are left after three

    add = detail.Details.end
    monkeypatch.setattr(
        detail.Details, "end", lambda self, batch: (batches.append(batch.number), add(self, batch))
    )
    arguments = {"batch_tokens": 40, "per_token": True}
    with pytest.raises(Killed):
        score(model, queries, corpus(30), out=tmp_path / "s", progress=dying("detail", 0.4),
              **arguments)  # fmt: skip
    begun = len(batches)
    scores = score(model, queries, corpus(30), out=tmp_path / "s", **arguments)
    assert 0 < begun < len(batches)
    assert sorted(batches) == list(range(len(batches)))
    assert scores.details(0)


def test_a_mark_without_a_checksum_is_not_ours(tmp_path, prepared):
    model, queries = prepared
    score(model, queries, corpus(), out=tmp_path, batch_tokens=40)
    journal = tmp_path / "scores.done"
    first, *rest = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first.split()[0] + b"\n" + b"".join(rest))
    with pytest.raises(StoreError, match=r"scores\.done is not the file that this run wrote"):
        _ = Scores(tmp_path).matrix
    told = load_json(tmp_path / "manifest.json")
    del told["state"]["files"]  # as of a folder that is not finished, or older
    save_json(tmp_path / "manifest.json", told)
    with pytest.raises(StoreError, match=r"scores\.done: a batch is marked without a checksum"):
        _ = Scores(tmp_path).matrix


def test_every_bit_of_a_matrix_header_counts(tmp_path):
    """The byte order is in it: one bit, and every number is another."""
    with Store.open(tmp_path / "s", kind="scores", facts={}) as store:
        store.matrix((2, 3)).write(0, [0, 1, 2], torch.ones(2, 3))
        store.finish()
    path = tmp_path / "s" / "scores.npy"
    whole = path.read_bytes()
    header = len(whole) - 2 * 3 * 4
    for at in range(header):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            with pytest.raises(StoreError, match=r"scores\.npy"):
                Store.load(tmp_path / "s").matrix()


def test_a_whole_file_that_cannot_be_read_now_is_never_to_be_deleted(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(3)})
    store = Store.open(tmp_path / "s", kind="scores", facts={})
    store.matrix((1, 3)).write(0, [0, 1, 2], torch.zeros(1, 3))
    store.finish()
    store.close()

    def refused(error):
        def call(*_, **__):
            raise error

        return call

    for error in (OSError(24, "Too many open files"), PermissionError(13, "denied"), MemoryError()):
        with monkeypatch.context() as patch:
            patch.setattr("ekfac_fast.store.files.safe_open", refused(error))
            patch.setattr("numpy.load", refused(error))
            for read in (lambda: load_tensors(path), lambda: Store.load(tmp_path / "s").matrix()):
                with pytest.raises(StoreError, match="cannot be read now") as told:
                    read()
                assert "elete" not in str(told.value)
    assert load_tensors(path)["a"].sum() == 3


def test_two_threads_that_save_one_file_leave_one_of_both(tmp_path):
    path, failed = tmp_path / "x.safetensors", []

    def save(value):
        try:
            for _ in range(30):
                save_tensors(path, {"a": torch.full((5000,), value)})
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(float(n),)) for n in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert len(load_tensors(path)["a"].unique()) == 1
    assert not failed
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_a_report_through_a_link_and_one_that_fails(tmp_path, monkeypatch):
    real, link, victim = tmp_path / "real.html", tmp_path / "report.html", tmp_path / "victim"
    victim.write_text("of another")
    real.write_text("old")
    link.symlink_to(real)
    for name in (".partial", ".tmp", f".{os.getpid()}"):
        Path(f"{link}{name}").symlink_to(victim)
    report.write(link, facts(), results())
    assert victim.read_text() == "of another"
    page = link.read_text()
    assert page.startswith("<!")

    def full(self, *_, **__):
        with self.open("w") as file:
            file.write("half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    before = {*tmp_path.iterdir()}
    with pytest.raises(StoreError, match=r"report\.html"):
        report.write(link, facts(), results())
    assert link.read_text() == page
    assert {*tmp_path.iterdir()} == before


def test_a_bug_is_a_traceback_and_an_error_of_ours_a_line(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyError("a bug of ours")

    words = ["report", str(tmp_path), str(tmp_path)]
    ours = CliRunner().invoke(app, words)
    assert ours.exit_code == 1
    assert "no manifest.json there" in " ".join(ours.output.split())
    assert isinstance(ours.exception, SystemExit)
    monkeypatch.setattr(runs, "load_run", broken)
    bug = CliRunner().invoke(app, words)
    assert isinstance(bug.exception, KeyError)
    assert "error:" not in bug.output
