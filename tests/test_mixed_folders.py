"""Folders put together of two runs', or short of a file: nothing of it is scored without a word."""

import shutil

import numpy as np
import pytest
import torch
from dense_ekfac import asked, corpus, gpt2

from ekfac_fast import Factors, Notice, Queries, Scores, fit, prepare_queries, score
from ekfac_fast.errors import StoreError
from ekfac_fast.stages.export import FILES
from ekfac_fast.store.files import save_tensors

NOT_OURS = "is not the file that this run wrote"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two whole jobs of one model on other data: factors, queries, scores with details."""
    found = []
    for seed in (0, 1):
        folder, model, data = tmp_path_factory.mktemp("run"), gpt2().eval(), corpus(12, seed)
        factors = fit(model, data, out=folder / "f")
        queries = prepare_queries(model, factors, asked(3, 5 + seed), out=folder / "q")
        score(model, queries, data, out=folder / "s", per_token=True)
        score(model, queries, data, out=folder / "k", top_k=4, per_layer=True)
        found.append(folder)
    return found


def mixed(two, folder, tmp_path, *names):
    """The first run's, with files of the second's."""
    shutil.copytree(two[0] / folder, tmp_path / folder)
    for name in names:
        shutil.copy(two[1] / folder / name, tmp_path / folder / name)
    return tmp_path / folder


@pytest.mark.parametrize("name", [x for x in FILES if "num" not in x])
def test_factors_of_another_fit(name, two, tmp_path):
    folder = mixed(two, "f", tmp_path, name)
    with pytest.raises(StoreError, match=rf"{name} {NOT_OURS}"):
        fit(gpt2().eval(), corpus(), out=folder)
    with pytest.raises(StoreError, match=rf"{name} {NOT_OURS}"):
        Factors(folder).stored(name)


def test_the_manifest_of_another_fit(two, tmp_path):
    folder = mixed(two, "f", tmp_path, "manifest.json")
    with pytest.raises(StoreError, match=rf"{NOT_OURS} .* or the manifest is"):
        prepare_queries(gpt2().eval(), Factors(folder), asked())


def test_values_without_a_checksum_may_be_put_there(two, tmp_path):
    """Kronfluence's."""
    from safetensors.torch import load_file, save_file

    folder = mixed(two, "f", tmp_path)
    for name in FILES:
        values = {k: x.clone() for k, x in load_file(folder / name).items()}
        save_file(values, folder / name)
    assert len(Factors(folder)) == len(Factors(two[0] / "f"))
    queries = prepare_queries(gpt2().eval(), Factors(folder), asked(3, 5))
    was = Queries.load(two[0] / "q").layers[0]
    assert torch.equal(queries.layers[0].L, was.L)


def test_a_fit_whose_results_are_gone_is_not_finished(two, tmp_path):
    for name in ("lambda_matrix.safetensors", "gradient_covariance.safetensors"):
        folder = mixed(two, "f", tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(StoreError, match=f"is finished, but {name} is gone: put it back, or"):
            fit(gpt2().eval(), corpus(), out=folder)
    shutil.copytree(two[0] / "f", tmp_path / "f")
    fit(gpt2().eval(), corpus(), out=tmp_path / "f", keep_covariances=False)
    fit(gpt2().eval(), corpus(), out=tmp_path / "f", keep_covariances=False)


def test_queries_of_another_run(two, tmp_path):
    for name in ("queries.safetensors", "queries.json"):
        folder = mixed(two, "q", tmp_path / name, name)
        with pytest.raises(StoreError, match=r"queries\.safetensors is not the file that queries"):
            Queries.load(folder)


def test_scores_of_another_scan(two, tmp_path):
    matrix = Scores(mixed(two, "s", tmp_path, "scores.npy", "scores.done", "plan.safetensors"))
    with pytest.raises(StoreError, match=rf"scores\.done {NOT_OURS}"):
        matrix.top(0, 3)
    with pytest.raises(StoreError, match=r"heap\.safetensors is of another run"):
        Scores(mixed(two, "k", tmp_path, "heap.safetensors")).top(0, 3)


@pytest.mark.parametrize("folder", ["s", "k"])
def test_details_of_another_scan_or_gone(folder, two, tmp_path):
    shard = "shard_000001.safetensors"
    there = mixed(two, folder, tmp_path, shard)
    assert len(Scores(there).details(0)) == len(Scores(two[0] / folder).details(0))
    with pytest.raises(StoreError, match=rf"the detail of query 1 says .*{shard} is another"):
        Scores(there).details(1)
    (there / shard).unlink()
    with pytest.raises(StoreError, match=rf"the detail of query 1 is gone \({shard}\)"):
        Scores(there).details(1)
    with pytest.raises(StoreError, match="the detail of query 1 is gone"):
        _ = Scores(there).trust


@pytest.mark.parametrize("top_k", [None, 4])
def test_a_scan_that_was_killed_says_so(top_k, two, tmp_path):
    model, data, queries = gpt2().eval(), corpus(40), Queries.load(two[0] / "q")

    class Killed(Exception):
        pass

    def progress(stage, done, total):
        if done > total // 2:
            raise Killed

    with pytest.raises(Killed):
        score(model, queries, data, out=tmp_path, top_k=top_k, batch_tokens=60, progress=progress)
    scores = Scores(tmp_path)
    with pytest.raises(StoreError, match="the scan is not finished; run it again to continue"):
        _ = scores.seconds
    assert "sequences, the scan is not finished, in" in repr(scores)
    if top_k:
        (tmp_path / "heap.safetensors").unlink(missing_ok=True)  # killed before the first was kept
        with pytest.raises(StoreError, match="the scan is not finished, and has kept nothing yet"):
            scores.top(0, 2)
        return
    with pytest.warns(Notice, match="the scan is not finished: sequences that come later"):
        scores.to_arrow()
    with pytest.warns(Notice, match="the scan is not finished"):
        scores.totals(["a"] * 40)
    score(model, queries, data, out=tmp_path, batch_tokens=60)
    assert "not finished" not in repr(Scores(tmp_path))
    assert np.isfinite(Scores(tmp_path).matrix).all()


def test_a_manifest_without_the_names_of_its_results_is_read(two, tmp_path):
    """Of an older version."""
    from ekfac_fast.store.files import load_json, save_json

    folder = mixed(two, "f", tmp_path)
    told = load_json(folder / "manifest.json")
    del told["state"]["files"]
    save_json(folder / "manifest.json", told)
    save_tensors(folder / "lambda_matrix.safetensors", Factors(folder).stored(FILES[-2]))
    assert len(Factors(folder)) == len(Factors(two[0] / "f"))
