"""What belongs together: a step refuses what another model, corpus or version made; and what is not
finite or not covered is said.
"""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_ekfac import asked, close, corpus, gpt2, llama
from safetensors.torch import load_file, save_file
from small_networks import Net, sequences
from torch import nn

from ekfac_fast import Factors, LanguageModelTask, Notice, Scores, fit, prepare_queries, score
from ekfac_fast import self_scores as self_influence
from ekfac_fast.errors import ArgumentError, NotFiniteError, StoreError
from ekfac_fast.report.collect import check_together
from ekfac_fast.store.files import load_json, save_json
from ekfac_fast.store.folder import Store


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model with its factors and queries."""
    out = tmp_path_factory.mktemp("run")
    model, data = gpt2().eval(), corpus()
    factors = fit(model, data, out=out / "f")
    return model, data, factors, prepare_queries(model, factors, asked(), rank=None), out


def changed(model, name="transformer.h.0.mlp.c_fc.weight", at=(3, 5)):
    """The same model but for one weight."""
    other = gpt2().eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.get_parameter(name)[at] += 1e-3
    return other


def test_another_checkpoint_is_refused_by_every_step(run, tmp_path):
    model, data, factors, prepared, _ = run
    other = changed(model)
    for step in (
        lambda: prepare_queries(other, factors, asked()),
        lambda: score(other, prepared, data, out=tmp_path / "s"),
        lambda: self_influence(other, factors, data, out=tmp_path / "i"),
    ):
        with pytest.raises(ArgumentError, match="other weights or another configuration"):
            step()
    configured = gpt2().eval()
    configured.load_state_dict(model.state_dict())
    configured.config.layer_norm_epsilon = 0.1
    with pytest.raises(ArgumentError, match="another configuration"):
        score(configured, prepared, data, out=tmp_path / "s")


def test_a_model_that_was_saved_is_the_same(run, tmp_path):
    """Saving writes its class and its dtype into the configuration."""
    model = gpt2().eval()
    model.load_state_dict(run[0].state_dict())
    model.save_pretrained(tmp_path)
    assert prepare_queries(model, run[2], asked(1), rank=2).rank == 2


def test_every_example_is_part_of_what_a_folder_was_made_from(run, tmp_path):
    model, _, _, prepared, _ = run
    many = [{"input_ids": [i % 61, 5, 7, 9]} for i in range(600)]
    score(model, prepared, many, out=tmp_path / "s")
    for at in (0, 1, 299, 599):
        edited = [*many]
        edited[at] = {"input_ids": [60, 5, 7, 8]}
        with pytest.raises(StoreError, match="data: stored"):
            score(model, prepared, edited, out=tmp_path / "s")


def test_a_tasks_own_settings_are_part_of_it(run, tmp_path):
    class Scaled(LanguageModelTask):
        def __init__(self, beta):
            super().__init__()
            self.beta = beta

    model, data = run[:2]
    fit(model, data, out=tmp_path, task=Scaled(0.5))
    with pytest.raises(StoreError, match=r"task_state\.beta"):
        fit(model, data, out=tmp_path, task=Scaled(0.7))


def test_queries_of_other_settings_are_another_scan(run, tmp_path):
    model, data, factors, prepared, _ = run
    score(model, prepared, data, out=tmp_path)
    for other in (
        prepare_queries(model, factors, asked(), rank=4),
        prepare_queries(model, factors, asked(), rank=None, damping=0.3),
        prepare_queries(model, factors, asked(2), rank=None),
    ):
        with pytest.raises(StoreError, match="queries: stored"):
            score(model, other, data, out=tmp_path)


def test_results_are_no_part_of_an_identity(run, tmp_path):
    """Damping and bits of queries differ with the number of threads; the scan goes on."""
    model, data, factors, prepared, _ = run
    before = torch.get_num_threads()
    score(model, prepared, data, out=tmp_path)
    try:
        torch.set_num_threads(3 - before if before in (1, 2) else 1)
        again = prepare_queries(model, factors, asked(), rank=None)
        assert again.identity == prepared.identity
        written = (tmp_path / "scores.npy").stat().st_mtime_ns
        score(model, again, data, out=tmp_path)
        assert (tmp_path / "scores.npy").stat().st_mtime_ns == written
    finally:
        torch.set_num_threads(before)


def test_layers_of_factors_have_their_own_counts(run, tmp_path):
    _, _, factors, _, out = run
    folder = Path(shutil.copytree(out / "f", tmp_path / "f"))
    counts, sums = (load_file(folder / f"{x}.safetensors") for x in
                    ("num_lambda_processed", "lambda_matrix"))  # fmt: skip
    last = list(counts)[-1]
    counts[last], sums[last] = counts[last] * 10, sums[last] * 10  # the same mean
    save_file(counts, folder / "num_lambda_processed.safetensors")
    save_file(sums, folder / "lambda_matrix.safetensors")
    close(Factors(folder)[last].lam, factors[last].lam, 1e-6)


def test_a_fit_that_is_not_finished_is_no_factors(run, tmp_path):
    model, data = run[:2]

    def stop(stage, done, total):
        if stage == "eigenvalue":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, data, out=tmp_path, progress=stop)
    with pytest.raises(StoreError, match="the fit is not finished; run it again to continue"):
        Factors(tmp_path)


def test_a_layer_whose_gradient_is_always_zero_takes_part_as_zero(tmp_path):
    model, data = llama().eval(), corpus()
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    dead, up = (f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up"))
    with pytest.warns(Notice, match=f"^layers {dead}, {up}: the gradient of the sampled loss is "):
        factors = fit(model, data, out=tmp_path / "f")
    assert not factors[dead].lam.any()
    rest = [name for name in factors if name not in (dead, up)]
    alone = fit(model, data, out=tmp_path / "g", layers=rest)
    for rank in (None, 4):
        with pytest.warns(Notice, match=f"^layers {dead}, {up}: the gradient of every query is "):
            prepared = prepare_queries(model, factors, asked(), rank=rank)
        assert not prepared.preconditioned(dead).any()
        scores = score(model, prepared, data, out=tmp_path / f"s{rank}", per_token=True)
        without = score(
            model,
            prepare_queries(model, alone, asked(), rank=rank),
            data,
            out=tmp_path / f"t{rank}",
        )
        close(scores.matrix, torch.tensor(without.matrix[:]), 1e-5)
        detail = scores.details(0)[0]
        assert not detail.per_layer_token[scores.layers.index(dead)].any()
        close(detail.per_token.sum(), torch.tensor(detail.score), 1e-5)
    own = self_influence(model, factors, data, out=tmp_path / "i")
    without = self_influence(model, alone, data, out=tmp_path / "j")
    close(own.matrix, torch.tensor(without.matrix[:]), 1e-5)


class FromFile(list):
    """Examples that know where they were read."""

    def source(self, index):
        return f"corpus, line {index + 1}"


def rootless(net, x):
    """Finite, with a gradient of NaN where the layer's output is zero."""
    h = torch.tanh(net.a(x))
    return x + net.b(h * torch.rsqrt(h.square().sum(-1, keepdim=True).sqrt() + 1e-6))


def test_gradients_that_are_not_finite_are_errors(tmp_path):
    model = Net(rootless, bias=(False, True))
    model.emb.weight.data[50] = 0
    data = sequences(12, 5, 9, 7)
    data = [{"input_ids": torch.where(x["input_ids"] == 50, 3, x["input_ids"])} for x in data]
    bad = {"input_ids": torch.tensor([9, 50, 7, 8])}
    read, queries = FromFile([*data, bad]), FromFile([bad])
    first = r"First seen in example 4 \(corpus, line 5\): the gradient of layer a is not finite"
    with pytest.raises(NotFiniteError, match=f"sum of gradient covariance a is not.*{first}"):
        fit(model, read, out=tmp_path / "g", layers=["a", "b"], batch_tokens=12)
    factors = fit(model, data, out=tmp_path / "f", layers=["a", "b"])
    with pytest.raises(
        NotFiniteError, match=r"query 0: a P is not finite.*\(corpus, line 1\).* a is"
    ):
        prepare_queries(model, factors, queries, rank=None)
    prepared = prepare_queries(model, factors, data[:1], rank=None)
    message = r"the score of example 4 \(corpus, line 5\) for query 0 is nan.*" + first
    with pytest.raises(NotFiniteError, match=message):
        score(model, prepared, read, out=tmp_path / "s")
    with pytest.raises(NotFiniteError, match=message):
        self_influence(model, factors, read, out=tmp_path / "i")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.inf, "First seen in example 1 .corpus, line 2.: the input of layer a is not finite"),
        (1e20, "All .* finite; the largest are those of layer a in example 1 .corpus, line 2."),
    ],
)
def test_the_first_that_is_not_finite_is_named(value, message, tmp_path):
    model = Net(lambda net, x: net.b(torch.relu(net.a(x)))).float()
    model.emb.weight.data[50] = value
    data = FromFile({"input_ids": torch.tensor(ids)} for ids in ([9, 3, 7], [8, 50, 5], [6, 4, 3]))
    with pytest.raises(NotFiniteError, match=message):
        fit(model, data, out=tmp_path, layers=["a", "b"])


def test_weights_that_are_elsewhere_are_named(tmp_path):
    model = llama()
    model.model.layers[1].to("meta")
    with pytest.raises(ArgumentError, match=r"weight model\.layers\.1\.\S+ is on the meta device"):
        fit(model, corpus(), out=tmp_path)


def test_a_model_in_a_wrapper(tmp_path):
    model = nn.DataParallel(gpt2())
    prepared = prepare_queries(model, fit(model, corpus(), out=tmp_path / "f"), asked())
    scores = score(model, prepared, corpus(), out=tmp_path / "s", candidates="tfidf:2")
    assert len(scores.top(0, 9)) == 2


def test_what_cannot_be_indexed_is_refused(tmp_path):
    data = corpus()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from data

    for dataset in (Stream(), torch.utils.data.DataLoader(data, batch_size=1), iter(data)):
        with pytest.raises(ValueError, match=r"the data set is a \w+, which cannot be indexed"):
            fit(gpt2(), dataset, out=tmp_path)


def test_a_bad_example_is_found_before_any_pass(tmp_path):
    many = [{"input_ids": [1, 2, 3, 4]}] * 600
    many[1] = {"input_ids": [3, 99999]}
    with pytest.raises(ValueError, match="example 1: token id 99999 at position 1 is outside"):
        fit(gpt2(), many, out=tmp_path, progress=lambda *_: pytest.fail("a pass was run"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, o: fit(*r[:2], out=o, batch_tokens=0), "batch_tokens is 0"),
        (lambda r, o: fit(*r[:2], out=o, batch_size=-1), "batch_size is -1"),
        (lambda r, o: fit(*r[:2], out=o, max_examples=0), "max_examples is 0"),
        (lambda r, o: fit(*r[:2], out=o, on_long="cut"), "on_long is 'cut'"),
        (lambda r, o: prepare_queries(r[0], r[2], asked(), rank=0), "rank is 0"),
        (lambda r, o: prepare_queries(r[0], r[2], asked(), damping=-1.0), "damping is -1.0"),
        (lambda r, o: prepare_queries(r[0], r[2], asked(), damping=math.nan), "damping is nan"),
        (lambda r, o: score(r[0], r[3], r[1], out=o, top_k=0), "top_k is 0"),
        (lambda r, o: score(r[0], r[3], r[1], out=o, train_size=-3), "train_size is -3"),
        (lambda r, o: score(r[0], r[3], r[1], out=o, candidates="bm25"), "candidates is 'bm25'"),
        (lambda r, o: score(r[0], r[3], r[1], out=o, candidates=[[1]]), "candidates for 1 queries"),
        (
            lambda r, o: score(r[0], r[3], r[1], out=o, candidates=[[99]] * 3),
            "outside the data set",
        ),
    ],
)
def test_absurd_arguments_are_refused(run, tmp_path, call, message):
    with pytest.raises(ArgumentError, match=message):
        call(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_argument_is_a_type_error(run, tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch_token'"):
        fit(*run[:2], out=tmp_path, batch_token=3)


def test_what_a_killed_run_left_is_removed_by_the_next(run, tmp_path, monkeypatch):
    model, data = run[:2]
    removed = Store.remove_state
    monkeypatch.setattr(Store, "remove_state", lambda *_: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        fit(model, data, out=tmp_path)
    assert list(tmp_path.glob("*_state.safetensors"))
    monkeypatch.setattr(Store, "remove_state", removed)
    fit(model, data, out=tmp_path)
    assert not [*tmp_path.glob("*_state.*"), *tmp_path.glob("eigen_*")]


def test_notices_are_warnings_that_can_be_silenced():
    assert issubclass(Notice, UserWarning)


def test_a_journal_of_fewer_batches_is_noticed(run, tmp_path):
    model, data, _, prepared, _ = run
    score(model, prepared, data, out=tmp_path, batch_tokens=40)
    journal = tmp_path / "scores.done"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[1:]))
    told = load_json(tmp_path / "manifest.json")
    del told["state"]["files"]  # as of an older version: it would tell at once
    save_json(tmp_path / "manifest.json", told)
    with pytest.raises(StoreError, match="batches are marked, though the scan is finished"):
        _ = Scores(tmp_path).matrix


@pytest.mark.parametrize(("top_k", "file"), [(None, "scores.done"), (3, "heap.safetensors")])
def test_a_scan_is_not_finished_before_every_batch_is(run, tmp_path, monkeypatch, top_k, file):
    model, data, _, prepared, _ = run
    monkeypatch.setattr("ekfac_fast.store.folder.Pace.due", True)
    kept = []

    def restored(stage, done, total):
        kept.append((tmp_path / file).read_bytes())
        if done == total:
            (tmp_path / file).write_bytes(kept[-2])

    asked_for = {"out": tmp_path, "batch_tokens": 40, "top_k": top_k}
    with pytest.raises(StoreError, match=r"1 of \d+ batches .* not marked as done.*Run it again"):
        score(model, prepared, data, progress=restored, **asked_for)
    assert not Store.load(tmp_path).finished
    found = score(model, prepared, data, **asked_for)
    whole = score(model, prepared, data, **asked_for | {"out": tmp_path / "whole"})
    assert found.top(0, 3) == whole.top(0, 3)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_around_every_stage(off, run, tmp_path):
    model, data, _, _, _ = run

    def results(folder):
        factors = fit(model, data, out=folder / "f")
        prepared = prepare_queries(
            model, factors, asked(), rank=4, refine="cg:2", dataset=data, refine_examples=4
        )
        scores = score(model, prepared, data, out=folder / "s", per_token=True)
        own = self_influence(model, factors, data, out=folder / "z")
        return scores.matrix[:], own.matrix[:], scores.details(0)[0].per_layer_token

    expected = results(tmp_path / "on")
    with off():
        found = results(tmp_path / "off")
    for x, y in zip(found, expected, strict=True):
        assert np.array_equal(x, y)


def test_a_report_of_a_changed_corpus_is_refused(run, tmp_path):
    model, data, factors, _, _ = run
    prepared = prepare_queries(model, factors, asked(), rank=4)
    scores = score(model, prepared, data, out=tmp_path)
    other = [dict(x) for x in data]
    other[3] = {**other[3], "input_ids": other[3]["input_ids"][::-1]}
    check_together(scores, factors, prepared, data)
    for what, *given in (
        ("the corpus", factors, prepared, other),
        ("the queries", factors, prepare_queries(model, factors, asked(2), rank=4), data),
        ("the factors", fit(model, other, out=tmp_path / "f"), prepared, data),
    ):
        with pytest.raises(StoreError, match=f"^{what}: not what was scored"):
            check_together(scores, *given)
