"""Embeddings, norms and convolutions: what is refused, what else is made of them, and how they are
chosen.
"""

import pytest
import torch
from dense_ekfac import asked, batch_of, close, corpus, gpt2, llama
from test_other_parameters import Classes, gradients, net
from torch import nn

from ekfac_fast import LanguageModelTask, fit, prepare_queries, score
from ekfac_fast.errors import ArgumentError, ModelError
from ekfac_fast.model.layers import parameters_of, select_layers
from ekfac_fast.model.linearised import Linearised
from ekfac_fast.stages import plan as planning
from ekfac_fast.stages.budget import fitting_bytes
from ekfac_fast.store.folder import Pace

NAMES = ["model.embed_tokens", "lm_head:diagonal", "*norm*", "*.o_proj", "*.input_layernorm*:dense"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    model = llama(torch.float64).eval()
    folder = tmp_path_factory.mktemp("fitted")
    factors = fit(model, corpus(8), out=folder / "f", layers=NAMES, batch_tokens=60)
    return model, factors, prepare_queries(model, factors, asked(2), rank=None, out=folder / "q")


def test_which_layers_a_pattern_names():
    model = gpt2()

    def one(*patterns):
        chosen = select_layers(model, patterns)
        return {x.name.removeprefix("transformer."): x for x in chosen}

    assert not [
        x for x in one("*.h.*").values() if x.kind != "linear"
    ]  # globs: linear layers first
    norms = one("*.ln_f.*", "transformer.wpe", "*.h.0.ln_1.*:dense", "*.0.mlp.c_fc.bias:dense")
    assert [*norms] == [
        "wpe", "h.0.ln_1.weight", "h.0.ln_1.bias", "h.0.mlp.c_fc.bias", "ln_f.weight", "ln_f.bias",
    ]  # fmt: skip
    assert [x.kind for x in norms.values()] == ["embedding"] + 5 * ["vector"]
    assert [x.diagonal for x in norms.values()] == 4 * [False] + 2 * [True]
    assert all(x.diagonal for x in one("mlp:diagonal").values())
    # The last word is the last pattern's that says one.
    assert not one("*.c_fc:diagonal", "mlp", "*.0.mlp.*:dense")["h.0.mlp.c_fc"].diagonal
    assert one("*.c_fc:diagonal", "mlp", "*.0.mlp.*:dense")["h.1.mlp.c_fc"].diagonal


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["transformer.ln_f"], r"nearest are transformer\.ln_f\.bias"),
        (
            ["mlp", "*.0.mlp.c_fc.bias"],
            r"c_fc\.bias is a part of layer transformer\.h\.0\.mlp\.c_fc",
        ),
        (["transformer.wte"], "shares a parameter with lm_head"),
        (["mlp:triangular"], "no layer matches 'mlp:triangular'"),
    ],
)
def test_names_that_are_refused(names, what):
    with pytest.raises(ArgumentError, match=what):
        select_layers(gpt2(), names)


def test_a_sharded_models_norms_are_refused(monkeypatch):
    monkeypatch.setattr("ekfac_fast.model.layers.is_sharded", lambda model: True)
    assert select_layers(gpt2())
    with pytest.raises(
        ArgumentError, match=r"ln_f\.weight \(vector\) is no linear layer, and .* sharded"
    ):
        select_layers(gpt2(), "*.ln_f.*")


def test_a_tied_embedding_is_its_heads(tmp_path):
    model, how = gpt2(torch.float64).eval(), {"shared_parameters": True}
    with pytest.raises(ArgumentError, match="name lm_head, which is both"):
        fit(model, corpus(4), out=tmp_path / "f", layers=["transformer.wte"], **how)
    factors = fit(model, corpus(8), out=tmp_path / "g", layers=["lm_head:diagonal"], **how)
    assert factors["lm_head"].Qg.shape == (61,)
    task, (layer,) = LanguageModelTask(), factors.layers(model)
    assert layer.diagonal
    drawn = []
    for i, e in enumerate(corpus(8)):
        loss = task.compute_train_loss(batch_of(e | {"id": i}), model, sample=True)
        drawn.append(gradients(model, [layer], loss))
    lam = sum((one["lm_head"] @ factors["lm_head"].Qa).square() for one in drawn) / 8
    close(factors["lm_head"].lam, lam, 1e-10)


class Odd(nn.Module):
    """A scale that every row has its part of."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5) + 1)

    def forward(self, x):
        return x * self.weight.mean() * self.weight


@pytest.mark.parametrize(
    ("layers", "names", "error"),
    [
        ([nn.Conv1d(4, 6, 3, groups=2), nn.Flatten()], ["0"], "convolution in 2 groups"),
        ([nn.BatchNorm1d(4), nn.Flatten()], ["0.weight"], r"0\.weight \(vector\): BatchNorm1d"),
        (
            [Odd(), nn.Flatten()],
            ["0.weight"],
            r"Odd does not multiply by it, or add it, row by row",
        ),
        ([nn.LSTM(5, 5)], ["0.bias_ih_l0"], "LSTM returns a tuple"),
    ],
)
def test_modules_that_are_refused(layers, names, error, tmp_path):
    model = nn.Sequential(*layers, nn.LazyLinear(4)) if len(layers) > 1 else nn.Sequential(*layers)
    model.eval()(torch.randn(1, 4, 5))
    data = [(torch.randn(4, 5), i % 4, i) for i in range(3)]
    with pytest.raises((ArgumentError, ModelError), match=error):
        fit(model, data, out=tmp_path / "f", layers=names, task=Classes())


def test_positions_that_a_batch_shares(tmp_path):
    """GPT-2 looks its positions up once a batch: right one sequence at a time."""
    model, data, task = gpt2(torch.float64).eval(), corpus(5), LanguageModelTask()
    with pytest.raises(ModelError, match=r"wpe: its input is \[1, .*no axis of it holds"):
        fit(model, data, out=tmp_path / "f", layers=["transformer.wpe"])
    f = fit(model, data, out=tmp_path / "g", layers=["transformer.wpe"], batch_tokens=1)
    lam = 0
    for i, e in enumerate(data):
        loss = task.compute_train_loss(batch_of(e | {"id": i}), model, sample=True)
        own = gradients(model, f.layers(model), loss)["transformer.wpe"]
        lam = lam + (f["transformer.wpe"].Qg.T @ own).square() / len(data)
    close(f["transformer.wpe"].lam, lam, 1e-10)


def test_directions_have_the_parameters_shapes(fitted):
    model, factors, queries = fitted
    moves = queries.parameters(model, 1)
    held = dict(model.named_parameters())
    assert len(moves) == len(factors)
    for layer in factors.layers(model):
        own = parameters_of(model, layer)[0]
        (name,) = [n for n, p in held.items() if p is own]
        P = queries.preconditioned(layer.name)[1]
        P = P.T if layer.kind == "embedding" else P[:, 0] if layer.kind == "vector" else P
        assert torch.equal(moves[name], P)
    with queries.apply(model, 0.1):
        assert not torch.equal(held["model.norm.weight"], torch.ones(16).double())
    assert torch.equal(held["model.norm.weight"], torch.ones(16).double())


def test_what_is_approximate_is_said(fitted, tmp_path):
    model, factors, queries = fitted
    assert set(factors.diagonal) == {"lm_head", "model.norm.weight"} | {
        f"model.layers.{i}.post_attention_layernorm.weight" for i in (0, 1)
    }
    scores = score(model, queries, corpus(8), out=tmp_path / "s", attribution=True)
    assert "output gradients of 4 layers as if uncorrelated" in scores.trust.line
    assert "model.embed_tokens is no linear layer (embedding)" in scores.unattributed
    assert scores.details(0)[0].per_layer.shape == (len(factors),)


def test_refined_together(fitted):
    """The residual of the equation of all kinds of layers together."""
    model, factors, _ = fitted
    refined = prepare_queries(
        model, factors, asked(1), rank=None, refine="cg:8", dataset=corpus(2), damping=1.0
    )
    assert float(refined.residual) < 0.1 * float(refined.refinement.before)


@pytest.mark.parametrize("kind", ["text", "convolutions"])
def test_products_with_the_gauss_newton_matrix(kind, fitted):
    torch.manual_seed(0)
    if kind == "text":
        model, layers = fitted[0], fitted[1].layers(fitted[0])
        given = torch.tensor([corpus(1)[0]["input_ids"]])
    else:
        model, given = net().double().eval(), torch.randn(3, 2, 7, 6).double()
        model(given)
        layers = select_layers(model, ["0", "2", "4", "7"])
    dW = {x.name: torch.randn(1, x.O, x.J).double() for x in layers}
    got = {name: torch.zeros_like(G) for name, G in dW.items()}

    def outputs():
        y = model(given)
        return getattr(y, "logits", y)

    Linearised(model, layers).add_product(lambda: (outputs(), lambda v: v), dW, got)
    y = outputs()
    u = torch.zeros_like(y, requires_grad=True)
    Ju = gradients(model, layers, (y * u).sum(), create_graph=True)
    (dy,) = torch.autograd.grad(sum((Ju[n] * G[0]).sum() for n, G in dW.items()), u)
    for name, G in gradients(model, layers, (outputs() * dy).sum()).items():
        close(got[name][0], G, 1e-6 if kind == "text" else 1e-10)


def test_passes_in_bf16(tmp_path):
    model, data = llama().eval(), corpus(8)
    found = []
    for autocast in (None, torch.bfloat16):
        out = tmp_path / str(autocast)
        factors = fit(model, data, out=out / "f", layers=NAMES, autocast=autocast)
        queries = prepare_queries(model, factors, asked(2), rank=8, autocast=autocast)
        matrix = score(model, queries, data, out=out / "s", autocast=autocast).matrix
        found.append(torch.tensor(matrix[:]))
    assert torch.isfinite(found[1]).all()
    assert (found[0] * found[1]).sum() > 0.9 * found[0].norm() * found[1].norm()


def test_stopped_and_continued_or_in_parts_it_is_the_same(fitted, tmp_path, monkeypatch):
    model, factors, _ = fitted
    monkeypatch.setattr(Pace, "due", property(lambda self: True))

    how, seen = {"layers": NAMES, "batch_tokens": 60}, []

    def stop(stage, done, total):
        seen.append(stage)
        if seen.count(stage) == 2:
            raise KeyboardInterrupt

    for _ in range(4):
        try:
            fit(model, corpus(8), out=tmp_path / "f", progress=stop, **how)
        except KeyboardInterrupt:
            continue
    most = max(fitting_bytes(x, 8) for x in factors.layers(model))
    monkeypatch.setattr("ekfac_fast.stages.fit.free_bytes", lambda _: 3 * most)
    parts = fit(model, corpus(8), out=tmp_path / "p", **how)
    assert len(parts._store.state["partitions"]) > 1
    for other in (fit(model, corpus(8), out=tmp_path / "f", **how), parts):
        for name in factors:
            assert torch.equal(other[name].lam, factors[name].lam)
            assert torch.equal(other[name].Qg, factors[name].Qg)


def test_what_it_costs():
    """An embedding is lookups, a diagonal side has neither a matrix nor its eigenvectors."""
    model = llama()
    sizes = {"sequences": 100, "tokens": 16, "fit_sequences": 100, "queries": 2}
    sizes |= {"parameters": 10_000, "rate": 1e9, "memory": 1 << 30}
    cost = lambda *names: planning.plan(select_layers(model, names), **sizes)  # noqa: E731
    # A covariance, eigenvectors and eigenvalues of each side; the corrected eigenvalues.
    sides = 2 * (61 + 16**2) + 61 + 16
    assert cost("model.embed_tokens").factor_bytes == 4 * (sides + 61 * 16)
    whole, flat = cost("lm_head"), cost("lm_head:diagonal")
    assert whole.factor_bytes - flat.factor_bytes == 4 * 2 * (61**2 - 61)
    assert all(y.flops <= x.flops for x, y in zip(whole.stages, flat.stages, strict=True))
    assert flat.stages[1].flops < whole.stages[1].flops
    with pytest.raises(ArgumentError, match="how many positions 0 sees is not known"):
        planning.plan(select_layers(nn.Sequential(nn.Conv1d(1, 1, 1)), "0"), **sizes)
