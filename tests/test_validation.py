"""Banks of retrainings and LDS: what holds of true scores, what is refused, what a kill leaves."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from dense_ekfac import asked, corpus, gpt2
from dense_newton import Regression
from retrainings import DATA, LINEAR, QUESTIONS, Counting, N, Q, bank, measured, trained
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from ekfac_fast import Factors, fit, prepare_queries, score
from ekfac_fast.cli import app
from ekfac_fast.errors import ArgumentError, DataError, NotFiniteError, StoreError
from ekfac_fast.validation import RetrainingBank, reliability, retrain, validate
from ekfac_fast.validation.bank import drawn
from ekfac_fast.validation.lds import lds, spearman


def files(folder):
    """The tensors of every run, without their times."""
    found = {}
    for path in sorted(folder.glob("run_*.safetensors")):
        found[path.name] = {k: x for k, x in load_file(path).items() if k != "seconds"}
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return bank(tmp_path_factory.mktemp("bank") / "b")


def test_the_scores_of_a_linear_outcome_are_right_and_their_sign_counts(made):
    found = lds(made, LINEAR)
    assert np.allclose(found.per_query, 1)
    assert found.interval == pytest.approx((1, 1, 1))
    assert lds(made, -LINEAR).mean == pytest.approx(-1)
    assert "24 retrainings" in found.line


def test_shuffled_scores_say_nothing_and_noise_says_less():
    masks = drawn(N, 120, 0.5)
    made = Fake(-(LINEAR @ masks.T)[:, None], masks)
    rng = np.random.default_rng(0)
    noise = LINEAR + 2 * LINEAR.std() * rng.standard_normal(LINEAR.shape)
    shuffled = rng.permuted(LINEAR, axis=1)
    right, noisy, wrong = (lds(made, x) for x in (LINEAR, noise, shuffled))
    _, low, high = noisy.interval
    assert wrong.interval.low < 0.1 < low < high < right.interval.low
    assert abs(wrong.mean) < 0.2
    # Of the true correlation 1 / sqrt(1 + 2^2), the ranks' share.
    assert noisy.mean == pytest.approx(0.45, abs=0.15)


def test_ranks_with_ties_are_scipys():
    from scipy.stats import spearmanr

    x, y = np.random.default_rng(0).integers(0, 5, (2, 3, 20))
    assert np.allclose(
        spearman(x, y), [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    )
    assert (spearman(np.zeros((1, 9)), np.arange(9.0)[None]) == 0).all()


def test_the_interval_covers_the_truth():
    """Outcomes with noise, many banks: 95 in 100 intervals hold the mean over all banks."""
    rng, inside, means = np.random.default_rng(1), [], []
    for _ in range(100):
        x, size = rng.standard_normal((12, 40)), np.exp(0.7 * rng.standard_normal((12, 1)))
        made = Fake(-(x + size * rng.standard_normal(x.shape))[:, None], np.eye(40, dtype=bool))
        found = lds(made, x, draws=100)
        inside.append(found.interval[1:])
        means.append(found.mean)
    truth = np.mean(means)
    assert 0.9 <= np.mean([low <= truth <= high for low, high in inside]) <= 0.99
    assert truth == pytest.approx(0.67, abs=0.04)  # of correlations around sqrt(1/2)


def test_two_methods_differ_by_less_than_their_intervals():
    """One that is always a little worse, on queries that differ much from each other."""
    rng, masks = np.random.default_rng(0), np.eye(60, dtype=bool)
    x, size = rng.standard_normal((20, 60)), np.exp(rng.standard_normal((20, 1)))
    made = Fake(-(x + size * rng.standard_normal(x.shape))[:, None], masks)
    worse = x + 0.5 * rng.standard_normal(x.shape)
    first, second = (lds(made, scores) for scores in (x, worse))
    mean, low, high = first.over(second)
    assert mean == pytest.approx(first.mean - second.mean)
    assert 0 < low < mean < high
    assert first.interval.low < second.interval.high
    assert second.over(first) == pytest.approx((-mean, -high, -low))
    assert first.over(first) == (0, 0, 0)
    with pytest.raises(ArgumentError, match="of other banks or draws"):
        first.over(lds(made, worse, draws=10))


class Fake:
    """A bank of outcomes [Q,K,S] of K seeds."""

    folder = "here"

    def __init__(self, outcome, masks):
        self.queries, self.examples = len(outcome), masks.shape[1]
        self.by_subset = masks, outcome.T

    def check(self, *_):
        """Nothing to compare."""


def test_the_ceiling_is_what_the_expected_outcome_would_reach():
    """Seeds add noise of the outcome's own size: one seed's reliability is 1/2, of two 2/3."""
    rng, masks = np.random.default_rng(0), drawn(N, 400, 0.5)
    outcome = -(LINEAR @ masks.T)[:, None]
    noise = outcome.std(2, keepdims=True) * rng.standard_normal((Q, 2, 400))
    made = Fake(outcome + noise, masks)
    assert reliability(made) == pytest.approx(np.sqrt(2 / 3), abs=0.03)
    assert lds(made, LINEAR).mean == pytest.approx(reliability(made), abs=0.03)


def test_no_ceiling_of_a_measurement_that_one_seed_leaves_as_it_is():
    outcome = np.random.default_rng(0).standard_normal((Q, 2, 12))
    outcome[1, 1] = 3.0
    with pytest.raises(DataError, match="query 1 is the same in every retraining"):
        reliability(Fake(outcome, drawn(N, 12, 0.5)))


def test_no_ceiling_without_a_second_seed(made):
    assert reliability(made) is None


def test_subsets_are_drawn_from_their_seed_with_their_share():
    masks = drawn(200, 10, 0.99, seed=3)
    assert (masks.sum(1) == 198).all()
    assert len({row.tobytes() for row in masks}) == 10
    assert np.array_equal(masks[:4], drawn(200, 4, 0.99, seed=3))
    assert not np.array_equal(masks, drawn(200, 10, 0.99, seed=4))
    assert abs(drawn(40, 300, 0.5).mean(0) - 0.5).max() < 0.12


def test_a_killed_bank_repeats_one_run_and_ends_in_the_same_bits(made, tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from retrainings import bank, killed\n"
        "from pathlib import Path\n"
        "bank(Path(sys.argv[2]), killed(after=9))"
    )
    here, folder = os.path.dirname(__file__), tmp_path / "b"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, here, folder])
    assert done.returncode == -signal.SIGKILL
    assert len(files(folder)) == 9
    partial = RetrainingBank(folder)
    assert (len(partial), len(partial.by_subset[0])) == (9, 9)
    assert lds(partial, LINEAR).retrainings == 9
    calls = []

    def counted(indices, seed):
        calls.append(seed)
        return trained(indices, seed)

    continued = bank(folder, counted)
    assert len(calls) == 15
    assert continued.store.finished
    assert files(folder).keys() == files(made.folder).keys()
    for name, tensors in files(made.folder).items():
        assert all(torch.equal(x, files(folder)[name][key]) for key, x in tensors.items())
    bank(folder, counted)
    assert len(calls) == 15


def test_processes_give_the_same_bank(made, tmp_path):
    other = bank(tmp_path / "b", processes=2)
    assert np.array_equal(other.measurements, made.measurements)
    assert np.array_equal(other.kept, made.kept)
    with pytest.raises(ArgumentError, match="cannot be sent to 2 processes"):
        bank(tmp_path / "c", lambda indices, seed: 0, processes=2)


def test_a_bank_is_read_without_us(made):
    told = json.loads((made.folder / "manifest.json").read_text())
    assert (told["facts"]["examples"], told["facts"]["asked"]) == (N, Q)
    run = load_file(made.folder / "run_000003.safetensors")
    kept = run["kept"].numpy()
    assert kept.sum() == N // 2
    assert np.allclose(run["measurements"], 7 - LINEAR[:, kept].sum(1) / N)


def test_seeds_that_are_not_complete_do_not_count(tmp_path):
    with pytest.raises(ZeroDivisionError):
        bank(tmp_path / "b", Counting(30, lambda: 1 / 0), seeds=2)
    made = RetrainingBank(tmp_path / "b")
    assert len(made) == 30
    assert made.by_subset[1].shape == (24, 1, Q)


def test_refusals_of_scores(made, tmp_path):
    with pytest.raises(DataError, match=rf"mine: scores are \[{Q}, {N - 1}\], expected"):
        lds(made, LINEAR[:, 1:], name="mine")
    broken = LINEAR.copy()
    broken[1, 5] = np.nan
    with pytest.raises(DataError, match="the score of query 1 and example 5 is nan"):
        lds(made, broken)
    with pytest.raises(StoreError, match=r"no scores: give a folder"):
        lds(made, tmp_path / "nothing")
    with pytest.raises(DataError, match="expected scores"):
        lds(made, {"a": "text"})
    few = bank(tmp_path / "few", subsets=7)
    with pytest.raises(StoreError, match="7 retrainings, LDS needs at least 8: a rank"):
        lds(few, LINEAR)


def test_refusals_of_measurements(tmp_path):
    def nan(model):
        return [1.0, np.nan, 2.0]

    with pytest.raises(NotFiniteError, match=r"run 0 \(subset 0, seed 0\): .* query 1 is nan"):
        bank(tmp_path / "a", measure=nan)
    assert not files(tmp_path / "a")
    with pytest.raises(DataError, match=r"measure returned \[2\], expected one number for each"):
        bank(tmp_path / "b", measure=lambda model: [1.0, 2.0])
    with pytest.raises(DataError, match="no numbers"):
        bank(tmp_path / "c", measure=lambda model: "much")
    same = bank(tmp_path / "d", measure=lambda model: [1.0, model[1], model[2]])
    with pytest.raises(DataError, match="query 0 is the same in every retraining"):
        lds(same, LINEAR)


def test_a_bank_is_measured_in_one_way(tmp_path):
    bank(tmp_path, subsets=8)
    bank(tmp_path, subsets=8)
    for other in (lambda model: 2 * np.asarray(measured(model)), None):
        with pytest.raises(StoreError, match="  measured: stored"):
            bank(tmp_path, subsets=8, measure=other)


def test_a_bank_of_others_is_refused_by_name(made):
    with pytest.raises(StoreError, match="  data: stored"):
        retrain(made.folder, trained, corpus(N, seed=5), QUESTIONS, subsets=24, measure=measured)
    with pytest.raises(StoreError, match="  queries: stored"):
        retrain(made.folder, trained, DATA, asked(Q, seed=5), subsets=24, measure=measured)
    with pytest.raises(StoreError, match=r"about\.rate: stored '\(none\)', now 0\.1"):
        bank(made.folder, about={"rate": 0.1})
    with pytest.raises(StoreError, match="  count: stored 24, now 25"):
        bank(made.folder, subsets=25)
    with pytest.raises(StoreError, match="holds 'bank', not 'factors'"):
        Factors(made.folder)


def test_damaged_runs_are_refused(tmp_path):
    made = bank(tmp_path / "b", subsets=3)
    path = made.folder / "run_000001.safetensors"
    tensors = load_file(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StoreError, match="run_000001"):
        RetrainingBank(made.folder)
    save_file(tensors, path)
    with pytest.raises(StoreError, match="checksum"):
        RetrainingBank(made.folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.0}, "share is 1.0"),
        ({"subsets": 0}, "subsets is 0"),
        ({"subsets": [[0, N]]}, r"subset 0 is \[0, 24\], expected indices"),
        ({"subsets": [[]]}, "subset 0 is"),
        ({"seeds": 0}, "seeds is 0"),
        ({"processes": 0}, "processes is 0"),
        ({"train": 3}, "train is 3"),
    ],
)
def test_absurd_arguments(settings, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        bank(tmp_path / "b", **settings)


def test_real_retrainings_agree_with_ekfac_where_it_is_exact(tmp_path):
    """Least squares on nine tenths: what is removed is what influence is about. The whole way, from
    factors to scores on disk, in the sign that they are stored in.
    """
    torch.manual_seed(0)
    x, true = torch.randn(60, 1, 4).double(), torch.randn(1, 4).double()
    y = x @ true.T + 0.5 * torch.randn(60, 1, 1).double()
    # Every sign of the labels' deviation once: of a linear model EK-FAC is then exact.
    signs = torch.tensor([1.0, -1.0] * 30).double().view(60, 1, 1)
    data = list(zip(x[:56], y[:56], signs, strict=False))
    questions = list(zip(x[56:], y[56:], signs, strict=False))

    def train(indices, seed):
        model = nn.Sequential(nn.Linear(4, 1, bias=False)).double()
        a, b = x[indices].reshape(-1, 4), y[indices].reshape(-1, 1)
        model[0].weight.data = torch.linalg.lstsq(a, b).solution.T
        return model

    task = Regression()
    made = retrain(
        tmp_path / "b", train, data, questions, subsets=16, share=0.9, task=task
    )  # fmt: skip
    model = train(np.arange(56), 0)
    factors = fit(model, data, out=tmp_path / "f", task=task, layers=["0"])
    queries = prepare_queries(model, factors, questions, task=task, rank=None, damping=1e-3)
    scores = score(model, queries, data, out=tmp_path / "s", task=task)
    found = lds(made, scores)
    assert found.mean > 0.8
    assert lds(made, tmp_path / "s").mean == found.mean
    others = retrain(
        tmp_path / "o", train, data[::-1], questions, subsets=16, share=0.9, task=task
    )  # fmt: skip
    with pytest.raises(StoreError, match=r"scores \(.*its training data have the fingerprint"):
        lds(others, scores)
    others = retrain(
        tmp_path / "q", train, data, questions[::-1], subsets=16, share=0.9, task=task
    )  # fmt: skip
    with pytest.raises(StoreError, match="its queries have the fingerprint"):
        lds(others, scores)


def test_a_language_model_measures_its_completions(tmp_path):
    """The default measurement is what `prepare_queries` stores."""
    model = gpt2()
    made = retrain(
        tmp_path / "b", lambda indices, seed: model, DATA, QUESTIONS, subsets=2
    )  # fmt: skip
    factors = fit(model, DATA, out=tmp_path / "f")
    prepared = prepare_queries(model, factors, QUESTIONS)
    assert np.allclose(made.measurements, prepared.measurements.numpy(), rtol=1e-5)
    assert not model.transformer.h[0].mlp.c_fc.weight.grad


def test_scores_of_kronfluence_and_of_files(made, tmp_path):
    half = torch.from_numpy(LINEAR / 2)
    save_file({"all_modules": half * 2}, tmp_path / "pairwise.safetensors")
    save_file({"a": half, "b": half.clone()}, tmp_path / "by_module.safetensors")
    tokens = torch.stack([half, half], 2)
    np.save(tmp_path / "plain.npy", LINEAR)
    every = {
        "file": tmp_path / "pairwise.safetensors",
        "modules": str(tmp_path / "by_module.safetensors"),
        "loaded": {"all_modules": tokens},
        "tensor": torch.from_numpy(LINEAR),
        "npy": tmp_path / "plain.npy",
    }
    assert [x.mean for x in validate(made.folder, every)] == pytest.approx([1] * 5)


def test_the_command_prints_a_table_and_ends_by_our_errors(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner, right = CliRunner(), "plain.npy"
    np.save(right, LINEAR)
    np.save("other.npy", -LINEAR)
    words = ["validate", str(made.folder), right, "other.npy", "--draws", "50"]
    done = runner.invoke(app, words)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[1].split()[:5] == [right, "1.000", "(1.000", "to", "1.000)"]
    assert lines[2].split()[1] == "-1.000"
    assert "-2.000 (-2.000 to -2.000)" in lines[2]
    assert "24 subsets of 24 sequences, 24 retrainings, 3 queries; one seed" in lines[3]
    np.save(right, LINEAR[:, 1:])
    done = runner.invoke(app, words)
    assert done.exit_code == 1
    assert "error: " in done.output
    assert "scores are [3, 23], expected [3, 24]" in done.output
    done = runner.invoke(app, ["validate", ".", right])
    assert done.exit_code == 1
    assert "no manifest.json there" in done.output
