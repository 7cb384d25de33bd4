"""The driver and kronfluence: equal factors from equal labels; each reads the other's files."""

import numpy as np
import pytest
import torch
from dense_ekfac import VOCABULARY, close, llama
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task

from ekfac_fast import Factors, LanguageModelTask, fit, prepare_queries, score
from ekfac_fast.model.layers import select_layers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
TOKENS = 9


def examples(n, seed, masked=0):
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(n):
        ids = torch.tensor(rng.integers(0, VOCABULARY, TOKENS))
        labels = ids.clone()
        labels[:masked] = -100
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": labels,
                "index": torch.tensor(index),
            }
        )
    return rows


class Theirs(Task):
    """The same questions in kronfluence's words."""

    def __init__(self, names):
        super().__init__()
        self.names, self.own, self.sampled = names, LanguageModelTask(), 0

    def compute_train_loss(self, batch, model, sample=False):
        if sample:
            # Three batches a pass; each pass has draws of its own, as in our fit.
            batch = batch | {"draw": 1 - self.sampled // 3}
            self.sampled += 1
        return self.own.compute_train_loss(batch, model, sample=sample)

    def compute_measurement(self, batch, model):
        return self.own.compute_measurement(batch, model)

    def get_influence_tracked_modules(self):
        return self.names

    def get_attention_mask(self, batch):
        return batch["attention_mask"]


def theirs(names, folder):
    """kronfluence's analyzer, in folder/run."""
    task = Theirs(names)
    model = prepare_model(llama(), task)
    return Analyzer("run", model, task, cpu=True, output_dir=str(folder), disable_tqdm=True)


@pytest.fixture
def both(tmp_path):
    """(names, data, queries, our factors, kronfluence's analyzer with its factors "theirs")."""
    names = [layer.name for layer in select_layers(llama())]
    data, queries = examples(12, 0), examples(3, 1, masked=4)
    analyzer = theirs(names, tmp_path)
    analyzer.fit_all_factors(
        "theirs", data, per_device_batch_size=4, factor_args=FactorArguments(strategy="ekfac")
    )
    ours = fit(llama(), data, out=tmp_path / "run/factors_ours")
    return names, data, queries, ours, analyzer, tmp_path / "run"


def theirs_scored(analyzer, factors, queries, data, name):
    analyzer.compute_pairwise_scores(
        name, factors, queries, data, per_device_query_batch_size=3, per_device_train_batch_size=4,
        score_args=ScoreArguments(damping_factor=None),
    )  # fmt: skip
    return analyzer.load_pairwise_scores(name)["all_modules"]


def test_equal_factors_and_scores(both):
    names, data, queries, ours, analyzer, folder = both
    kept, own = (
        analyzer.load_covariance_matrices(name) | analyzer.load_lambda_matrices(name)
        for name in ("theirs", "ours")
    )
    for part in ("activation_covariance", "gradient_covariance"):
        for name in names:
            close(own[part][name], kept[part][name], 1e-5)
            assert own[f"num_{part}_processed"][name] == kept[f"num_{part}_processed"][name]
    for name in names:
        # Eigenvectors are free in sign: what they say of the covariance is not.
        close(own["lambda_matrix"][name].sum(), kept["lambda_matrix"][name].sum(), 1e-5)
    expected = theirs_scored(analyzer, "theirs", queries, data, "a")
    model = llama()
    prepared = prepare_queries(model, ours, queries, rank=None)
    close(score(model, prepared, data, out=folder / "s").matrix, expected, 1e-4)


def test_each_reads_the_others_files(both):
    _, data, queries, ours, analyzer, folder = both
    model = llama()
    from_theirs = prepare_queries(model, Factors(folder / "factors_theirs"), queries, rank=None)
    expected = theirs_scored(analyzer, "theirs", queries, data, "b")
    close(score(model, from_theirs, data, out=folder / "s").matrix, expected, 1e-5)
    from_ours = prepare_queries(model, ours, queries, rank=None)
    got = score(model, from_ours, data, out=folder / "t").matrix
    close(got, theirs_scored(analyzer, "ours", queries, data, "c"), 1e-5)
