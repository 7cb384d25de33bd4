"""Covariances in diagonal blocks: dense EK-FAC with eigenvectors that are zero between blocks."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from dense_ekfac import asked, close, corpus, dense_ekfac, gpt2, llama
from safetensors.torch import save_file
from test_experts import MIXTRAL
from test_model_families import check, made
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from typer.testing import CliRunner

from ekfac_fast import Factors, fit, prepare_queries, score, self_scores
from ekfac_fast.cli import app
from ekfac_fast.curvature.basis import Basis, Eigenvectors, SharedRotation
from ekfac_fast.curvature.blocks import (
    BlockDiagonal,
    block_rows,
    dense,
    in_blocks,
    on_diagonal,
    rotate,
)
from ekfac_fast.curvature.offload import fits
from ekfac_fast.errors import ArgumentError, Notice, StoreError
from ekfac_fast.model.layers import select_layers
from ekfac_fast.ops.gradients import cheapest_order
from ekfac_fast.ops.shapes import Shape
from ekfac_fast.stages import fit as stage
from ekfac_fast.stages.plan import plan
from ekfac_fast.stages.run import Stage
from ekfac_fast.stages.trust import Trust, basis_of
from ekfac_fast.store.files import load_tensors
from ekfac_fast.store.folder import Store

pytestmark = pytest.mark.filterwarnings("ignore:.*blocks do not divide")
fp64 = partial(torch.randn, dtype=torch.float64)


def norm_in_fp64(self, x):
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def llama_in_fp64(dtype=torch.float64):
    """Without the fp32 of eager attention; its norms are patched."""
    model = llama(dtype)
    model.set_attn_implementation("sdpa")
    return model


def rotation(n):
    return torch.linalg.qr(fp64(n, n))[0]


def test_the_cut_is_numpys():
    for n in (1, 2, 5, 16, 17, 769):
        for blocks in range(1, min(n, 9) + 1):
            parts = np.array_split(np.arange(n), blocks)
            assert [np.arange(n)[rows].tolist() for rows in block_rows(n, blocks)] == [
                part.tolist() for part in parts
            ]


@pytest.mark.parametrize(("n", "blocks"), [(12, 3), (13, 3), (5, 5), (7, 1)])
def test_products_are_those_of_the_whole_matrix(n, blocks):
    torch.manual_seed(0)
    matrix = torch.block_diag(
        *(fp64(len(range(n)[r]), len(range(n)[r])) for r in block_rows(n, blocks))
    )
    own = BlockDiagonal.of(matrix, blocks)
    assert sum(x.numel() for x in own.blocks) <= n * -(-n // blocks)
    x, y = fp64(2, 3, n), fp64(4, n, 5)
    close(x @ own, x @ matrix, 1e-14)
    close(own @ y, matrix @ y, 1e-14)
    close(x @ own.mT, x @ matrix.T, 1e-14)
    close(rotate(x[..., :-1], own, True), torch.cat([x[..., :-1], torch.ones(2, 3, 1)], 2) @ matrix,
          1e-14)  # fmt: skip
    kept = torch.zeros(n, -(-n // blocks), dtype=torch.float64)
    for rows, block in on_diagonal(kept, blocks):
        block += matrix[rows, rows]
    assert torch.equal(dense(kept, blocks), matrix)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("T", "O", "I"), [(3, 8, 11), (9, 12, 7), (9, 7, 12), (20, 7, 9)])
def test_every_order_of_the_ops(T, O, I, bias):
    """By tokens, on the gradient, and one side each."""
    torch.manual_seed(0)
    J, B, blocks = I + bias, 4, 3
    Qg, Qa = (
        torch.block_diag(*(rotation(len(range(n)[r])) for r in block_rows(n, blocks)))
        for n in (O, J)
    )
    lam, g, a = fp64(O, J).square(), fp64(B, T, O), fp64(B, T, I)
    whole = Basis(Qg, Qa, lam, 0.1)
    own = Basis(in_blocks(Qg, blocks), in_blocks(Qa, blocks), lam, 0.1)
    assert (own.blocks, whole.blocks) == (3, 1)
    P, G = whole.precondition(g, a, bias), fp64(B, O, J)
    close(own.precondition(g, a, bias), P, 1e-12)
    close(own.rotate_back(P), whole.rotate_back(P), 1e-12)
    close(own.precondition_gradient(G), whole.precondition_gradient(G), 1e-12)
    close(own.rotation(torch.float64).precondition(g, a, bias),
          whole.rotation(torch.float64).precondition(g, a, bias), 1e-12)  # fmt: skip
    moved = own.at(torch.device("meta"))
    assert {x.device.type for x in (moved.Qg, moved.Qa, moved.lam)} == {"meta"}
    shared = SharedRotation()(own, g, a, bias, "owner", 2)
    for basis, x, ones in ((own, a, bias), shared):
        sums = [torch.ones(O, J, dtype=torch.float64), torch.ones(B, dtype=torch.float64)]
        expected = [x.clone() for x in sums]
        basis.add_eigenvalues(sums[0], g, x, ones)
        basis.add_self_influence(sums[1], g, x, ones)
        whole.add_eigenvalues(expected[0], g, a, bias)
        whole.add_self_influence(expected[1], g, a, bias)
        for got, right in zip(sums, expected, strict=True):
            close(got, right, 1e-12)


def test_all_orders_were_there():
    shapes = [Shape(T=T, O=O, I=I) for T, O, I in ((3, 8, 11), (9, 12, 7), (9, 7, 12), (20, 7, 9))]
    orders = ["tokens", "a_tokens", "g_tokens", "gradient"]
    assert [cheapest_order(shape) for shape in shapes] == orders


@pytest.mark.parametrize(("make", "blocks"), [(gpt2, 2), (gpt2, 3), (llama_in_fp64, 3)])
def test_scores_are_dense_ekfac_in_that_basis(make, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_fp64)
    data, queries, model = corpus(), asked(), make(torch.float64)
    names = [layer.name for layer in select_layers(model)]
    expected, own, lam = dense_ekfac(make(), names, data, queries, blocks=blocks)
    factors = fit(model, data, out=tmp_path / "f", batch_tokens=64, blocks=blocks)
    assert factors.blocks == blocks
    for name in names:
        close(factors[name].lam.sum(), lam[name].sum(), 1e-10)
    for rank in (None, 17):
        prepared = prepare_queries(model, factors, queries, rank=rank)
        close(score(model, prepared, data, out=tmp_path / f"{rank}").matrix, expected, 1e-10)
    close(self_scores(model, factors, data, out=tmp_path / "self").matrix[0], own, 1e-10)


def test_routed_experts(tmp_path):
    """Transposed, with biases."""
    model = made("GptOss", **MIXTRAL | {"head_dim": 8, "num_hidden_layers": 1})
    assert len(check(model, tmp_path, blocks=3)) == 8


def test_a_refined_query_begins_in_that_basis(tmp_path):
    data, model = corpus(), gpt2(torch.float64)
    factors = fit(model, data, out=tmp_path / "f", blocks=2)
    refined = prepare_queries(model, factors, asked(), rank=None, refine="cg:8", dataset=data)
    assert refined.residual.max() < 0.5 * refined.refinement.before.max()


def test_sums_and_pieces_hold_blocks_alone(tmp_path, monkeypatch):
    shapes, pieces, save = {}, [], Store.save_state

    def saved(self, name, tensors, done, notes):
        shapes[name] = {n: tuple(x.shape) for n, x in tensors.items() if "covariance " in n}
        save(self, name, tensors, done, notes)

    monkeypatch.setattr(Store, "save_state", saved)
    solve = stage.eigendecompositions
    monkeypatch.setattr(
        stage, "eigendecompositions",
        lambda jobs, *more, **how: (
            pieces.extend(len(job.sum) for job in jobs), solve(jobs, *more, **how)
        )[1],
    )  # fmt: skip
    fit(gpt2(), corpus(), out=tmp_path / "f", blocks=2)
    assert {*shapes[f"{Stage.COVARIANCE}_state"].values()} == {(16, 8), (17, 9), (64, 32), (65, 33)}
    assert pieces == [33, 33, *[32] * 6, 9, 9, *[8] * 6]
    kept = load_tensors(tmp_path / "f" / "activation_eigenvalues.safetensors")
    assert {len(x) for x in kept.values()} == {17, 65}


def test_one_block_is_what_it_was(tmp_path):
    """The fact is not there, so folders of older versions are continued."""
    data, model = corpus(), gpt2()
    factors = fit(model, data, out=tmp_path / "f")
    again = fit(model, data, out=tmp_path / "f", blocks=1)
    assert "blocks" not in factors.facts
    assert (factors.blocks, again.identity) == (1, factors.identity)
    basis = factors[next(iter(factors))].basis(0.1, torch.float32)
    assert isinstance(basis.Qa, torch.Tensor)


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", ["an eigendecomposition", "the second pass", "the first pass"])
def test_killed_it_ends_in_the_same_bits(moment, tmp_path, monkeypatch):
    model, data = gpt2(), corpus()
    how = {"batch_tokens": 40, "blocks": 3}
    whole = fit(model, data, out=tmp_path / "f", **how)
    calls = [0]

    def killing(after, function):
        def run(*args, **kwargs):
            calls[0] += 1
            if calls[0] > after:
                raise Killed
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr("ekfac_fast.store.folder.Pace.due", property(lambda self: True))
    with monkeypatch.context() as patched:
        if moment == "an eigendecomposition":
            from ekfac_fast.store.folder import Pieces

            patched.setattr(Pieces, "write", killing(5, Pieces.write))
        elif moment == "the second pass":
            patched.setattr(stage._Fit, "_bases", killing(0, None))
        else:
            add = stage.Covariances.add
            patched.setattr(stage.Covariances, "add", killing(9, add))
        with pytest.raises(Killed):
            fit(model, data, out=tmp_path / "g", **how)
    for other in (2, 1):
        with pytest.raises(StoreError, match="blocks"):
            fit(model, data, out=tmp_path / "g", batch_tokens=40, blocks=other)
    again = fit(model, data, out=tmp_path / "g", **how)
    for name in whole:
        for part in ("lam", "Qa", "Qg"):
            assert torch.equal(getattr(whole[name], part), getattr(again[name], part))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_kronfluence_reads_them(tmp_path):
    pytest.importorskip("kronfluence")  # the rest of the file runs where it is not installed
    from test_kronfluence_files import examples, theirs, theirs_scored

    names = [layer.name for layer in select_layers(llama())]
    data, queries = examples(12, 0), examples(3, 1, masked=4)
    analyzer = theirs(names, tmp_path)
    factors = fit(llama(), data, out=tmp_path / "run/factors_ours", blocks=2)
    prepared = prepare_queries(llama(), factors, queries, rank=None)
    found = score(llama(), prepared, data, out=tmp_path / "s").matrix
    close(found, theirs_scored(analyzer, "ours", queries, data, "a"), 1e-5)
    for name, Q in analyzer.load_eigendecomposition("ours")["activation_eigenvectors"].items():
        assert torch.equal(Q, factors[name].Qa)
        values = analyzer.load_eigendecomposition("ours")["activation_eigenvalues"][name]
        cov = analyzer.load_covariance_matrices("ours")["activation_covariance"][name]
        count = factors.tokens
        close((Q * values) @ Q.T, cov / count, 1e-5)


def test_what_is_refused(tmp_path):
    data, model = corpus(), gpt2()
    for blocks in (0, True, 1.5, "2"):
        with pytest.raises(ArgumentError, match=r"blocks is .*whole number"):
            fit(model, data, out=tmp_path / "f", blocks=blocks)
    with pytest.raises(
        ArgumentError,
        match=r"blocks is 17, but layer transformer\.h\.0\.mlp\.c_proj has 16 outputs: .* most 16",
    ):
        fit(model, data, out=tmp_path / "f", blocks=17)
    assert not (tmp_path / "f").exists()
    factors = fit(model, data, out=tmp_path / "f", blocks=2)
    file = factors.folder / "activation_eigenvectors.safetensors"
    name = next(iter(factors))
    mixed = load_tensors(file) | {name: torch.linalg.qr(torch.randn(17, 17))[0]}
    save_file(
        {n: x.contiguous().clone() for n, x in mixed.items()}, file
    )  # without a checksum of ours
    with pytest.raises(StoreError, match=rf"layer {name}: Qa .* 2 diagonal blocks .* another fit"):
        _ = Factors(factors.folder)[name]


def test_how_a_side_is_cut_is_said(tmp_path):
    with pytest.warns(
        Notice,
        match=r"3 blocks do not divide 8 of 8 sides: the 17 inputs of .*h\.0\.mlp\.c_fc, "
        r"the bias's among them, are cut into 2 of 6 and 1 of 5",
    ):
        fit(gpt2(), corpus(4), out=tmp_path / "f", blocks=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        fit(llama(), corpus(4), out=tmp_path / "g", blocks=4)


def test_results_say_that_the_basis_is_approximate(tmp_path):
    data, model = corpus(), gpt2()
    factors = fit(model, data, out=tmp_path / "f", blocks=2)
    prepared = prepare_queries(model, factors, asked(), out=tmp_path / "q")
    assert prepared.facts["blocks"] == 2
    trust = score(model, prepared, data, out=tmp_path / "s").trust
    assert trust.blocks == 2
    assert "energy; basis of covariances in 2 diagonal blocks, approximate" in trust.line
    assert "blocks" not in Trust(8, 0.5, 0.1, 0.1, None, None).line


def test_commands(tmp_path):
    """`fit --blocks`, what `score` and `self` say of it, and the report."""
    from ekfac_fast.cli import demo_small as demo

    demo_files(demo, tmp_path)
    say, where = CliRunner(), [str(tmp_path / "model")]
    run = partial(say.invoke, app, env={"COLUMNS": "300"})
    corpus_of, out = str(tmp_path / "corpus"), str(tmp_path / "f")
    done = run(["fit", *where, corpus_of, "--out", out, "--blocks", "2"])
    assert done.exit_code == 0, done.output
    assert Factors(out).blocks == 2
    asks, scores = str(tmp_path / "queries.jsonl"), str(tmp_path / "s")
    done = run(["score", *where, out, asks, corpus_of, "--out", scores])
    assert done.exit_code == 0, done.output
    assert basis_of(2) in done.output
    done = run(["self", *where, out, corpus_of, "--out", str(tmp_path / "self")])
    assert basis_of(2) in done.output
    page = tmp_path / "r.html"
    done = run(["report", scores, corpus_of, "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert basis_of(2) in page.read_text()
    done = run(["fit", *where, corpus_of, "--out", str(tmp_path / "g"), "--blocks", "100"])
    assert done.exit_code == 1
    assert "blocks is 100, but layer transformer.h.0.mlp.c_fc has 33 inputs" in done.output


def demo_files(demo, folder):
    import json

    from ekfac_fast.data import read, tokenize

    with pytest.MonkeyPatch.context() as small:
        for name, value in (("VOCABULARY", 512), ("LAYERS", 1), ("WIDTH", 32), ("HEADS", 2)):
            small.setattr(demo, name, value)
        demo.write_corpus(folder / "corpus", 2)
        tokenizer = demo.train_tokenizer(folder / "corpus", folder / "model")
        text = tokenize(read(folder / "corpus"), tokenizer, 128)
        demo.train_model(text, folder / "model", 1)
    rows = [{"prompt": p, "completion": c} for _, p, c in demo.QUERIES[:1]]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_plan_of_blocks():
    layers = select_layers(gpt2())
    sizes = {"parameters": 10_000, "sequences": 8, "tokens": 64, "fit_sequences": 8, "queries": 2}
    one, two = (plan(layers, **sizes, rate=1e9, blocks=blocks) for blocks in (1, 2))
    flops = [{x.name: x.flops for x in made.stages} for made in (one, two)]
    assert flops[1]["eigendecomposition"] == pytest.approx(flops[0]["eigendecomposition"] / 4, 0.02)
    for name in ("covariance", "eigenvalue", "queries"):
        assert flops[1][name] < flops[0][name]
    assert flops[1]["scan"] == flops[0]["scan"]
    assert two.stages[0].memory < one.stages[0].memory
    assert two.factor_bytes == one.factor_bytes  # kronfluence's files are whole matrices
    with pytest.raises(ArgumentError, match="blocks is 17"):
        plan(layers, **sizes, rate=1e9, blocks=17)


def test_a_bases_room_on_a_device_is_that_of_its_blocks(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr("ekfac_fast.curvature.offload.free_bytes", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 1000))
    assert not fits((10, 10), torch.float32, gpu)  # 800 + 400 bytes, of which 500 may be taken
    assert not fits((10, 10), torch.float32, gpu, 2)
    assert fits((10, 10), torch.float32, gpu, 10)
    assert Eigenvectors(None, None).blocks == 1
