"""The ops against what they mean: autograd's gradients, dense EK-FAC in fp64, invariants.

Nothing here uses a reference: every expected value is written out from its definition.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ekfac_fast import ops
from ekfac_fast.curvature.low_rank import rotate_back, truncate
from ekfac_fast.ops.shapes import ORDERS
from ekfac_fast.ops.testing.sampling import orthogonal

pytestmark = pytest.mark.usefixtures("poisoned")

call = torch.ops.ekfac_fast
DAMPING = 0.03


def layer(B=3, T=5, I=4, O=6, Q=2, K=3, bias=True, seed=0) -> SimpleNamespace:
    """A linear layer in fp64; `ones` are its inputs with the 1 of the bias written out."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    g, a, J = draw(B, T, O), draw(B, T, I), I + bias
    return SimpleNamespace(
        B=B, T=T, I=I, O=O, J=J, Q=Q, bias=bias, g=g, a=a,
        ones=torch.cat([a, torch.ones(B, T, bias, dtype=torch.float64)], dim=-1),
        Qg=torch.linalg.qr(draw(O, O))[0], Qa=torch.linalg.qr(draw(J, J))[0],
        lam=draw(O, J).square() + 0.1, P=draw(Q, O, J), L=draw(Q, O, K), R=draw(Q, K, J),
    )  # fmt: skip


def gradients(x) -> Tensor:
    """G_b = sum_t g_bt (a_bt, 1)^T."""
    return torch.einsum("bto,btj->boj", x.g, x.ones)


def rotated(x) -> Tensor:
    """Qg^T G_b Qa."""
    return torch.einsum("po,bpi,ij->boj", x.Qg, gradients(x), x.Qa)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


def close(got: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11 * max(1.0, scale))


@pytest.fixture(scope="module")
def net():
    """A trained-sized toy: embedding, tanh, tracked linear layer with bias, tanh, logits."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 9))
    model = model.double()
    inputs, labels = torch.randn(12, 4, 5, dtype=torch.float64), torch.randint(9, (12, 4))

    def loss(parameters: dict, x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (x,))
        return nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum")

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, labels)
    kept = {}
    model[2].register_forward_hook(lambda _, args, out: kept.update(a=args[0], out=out))
    total = loss(dict(model.named_parameters()), inputs, labels)
    (g,) = torch.autograd.grad(total, kept["out"])
    G = torch.cat([each["2.weight"], each["2.bias"].unsqueeze(-1)], dim=-1)
    return SimpleNamespace(g=g, a=kept["a"].detach(), G=G)


@pytest.fixture(scope="module")
def ekfac(net):
    """Factors made by the ops, and the same damped inverse as one dense [OJ,OJ] matrix."""
    J, O = 8, 6
    A, S, lam = zeros(J, J), zeros(O, O), zeros(O, J)
    call.covariance(A, net.a.flatten(0, 1), None, True)
    call.covariance(S, net.g.flatten(0, 1))
    Qa, Qg = torch.linalg.eigh(A / 48)[1], torch.linalg.eigh(S / 48)[1]
    call.eigenvalues(lam, net.g, net.a, Qg, Qa, True)
    lam /= 12
    Q = torch.kron(Qg, Qa)
    dense = Q @ torch.diag(lam.flatten()) @ Q.T + DAMPING * torch.eye(O * J).double()
    return SimpleNamespace(A=A, S=S, Qa=Qa, Qg=Qg, lam=lam, Q=Q, inverse=torch.linalg.inv(dense))


def test_gradients_are_those_of_autograd(net):
    """With Q = 1, lam = 1 and no damping, `precondition` is the per-sample gradient."""
    for order in (None, *ORDERS):
        eye = torch.eye(8).double()
        G = call.precondition(net.g, net.a, None, eye, torch.ones(6, 8).double(), 0.0, True, order)
        close(G, net.G)


def test_covariances_are_second_moments(net, ekfac):
    rows = torch.cat([net.a, torch.ones(12, 4, 1)], dim=-1).flatten(0, 1)
    close(ekfac.A, sum(torch.outer(row, row) for row in rows))
    close(ekfac.S, sum(torch.outer(row, row) for row in net.g.flatten(0, 1)))


def test_eigenvalues_are_the_fisher_in_the_eigenbasis(net, ekfac):
    """lam is the diagonal of Q^T F Q, F the mean of vec(G) vec(G)^T: George et al. 2018, Eq. 9."""
    vectors = net.G.flatten(1)
    fisher = vectors.T @ vectors / 12
    close(ekfac.lam.flatten(), torch.diag(ekfac.Q.T @ fisher @ ekfac.Q))


def test_precondition_solves_the_dense_system(net, ekfac):
    P = call.precondition(net.g, net.a, ekfac.Qg, ekfac.Qa, ekfac.lam, DAMPING, True)
    close((ekfac.Qg @ P @ ekfac.Qa.T).flatten(1), net.G.flatten(1) @ ekfac.inverse)


def test_self_influence_is_the_dense_quadratic_form(net, ekfac):
    s, v = zeros(12), net.G.flatten(1)
    call.self_influence(s, net.g, net.a, ekfac.Qg, ekfac.Qa, ekfac.lam, DAMPING, True)
    close(s, torch.einsum("bi,ij,bj->b", v, ekfac.inverse, v))


def test_scores_are_influence_functions(net, ekfac):
    """Three queries against nine sequences: g_q^T (H + damping)^-1 g_b by every route."""
    v = net.G.flatten(1)
    expected = v[:3] @ ekfac.inverse @ v[3:].T
    P = call.precondition(net.g[:3], net.a[:3], ekfac.Qg, ekfac.Qa, ekfac.lam, DAMPING, True)
    weight_space = ekfac.Qg @ P @ ekfac.Qa.T
    dense, low_rank, rotated = zeros(3, 9), zeros(3, 9), zeros(3, 9)
    call.dense_scores(dense, weight_space, net.g[3:], net.a[3:], True)
    close(dense, expected)
    L, R = rotate_back(*truncate(P, 6), ekfac.Qg, ekfac.Qa)
    call.low_rank_scores(low_rank, L, R, net.g[3:], net.a[3:], True)
    close(low_rank, expected)
    # In the eigenbasis, with the training side rotated instead of the query.
    inputs = torch.cat([net.a, torch.ones(12, 4, 1)], dim=-1)
    call.dense_scores(rotated, P, net.g[3:] @ ekfac.Qg, inputs[3:] @ ekfac.Qa)
    close(rotated, expected)


sizes = st.integers(1, 40)
few = st.integers(1, 6)
layers = st.builds(
    layer, B=few, T=sizes, I=sizes, O=sizes, Q=few, K=few, bias=st.booleans(), seed=sizes
)


@given(x=layers, order=st.sampled_from((None, *ORDERS)))
def test_rotating_ops_are_their_equations(x, order):
    G, lam_sum, s = rotated(x), x.lam.clone(), torch.arange(x.B).double()
    call.eigenvalues(lam_sum, x.g, x.a, x.Qg, x.Qa, x.bias, order)
    close(lam_sum, x.lam + G.square().sum(0))
    P = call.precondition(x.g, x.a, x.Qg, x.Qa, x.lam, DAMPING, x.bias, order)
    close(P, G / (x.lam + DAMPING))
    call.self_influence(s, x.g, x.a, x.Qg, x.Qa, x.lam, DAMPING, x.bias, order)
    close(s, torch.arange(x.B) + (G.square() / (x.lam + DAMPING)).sum((1, 2)))


@given(x=layers, per_token=st.booleans())
def test_scores_are_their_equations(x, per_token):
    shape = (x.Q, x.B, x.T) if per_token else (x.Q, x.B)
    s = zeros(*shape) + 1
    call.dense_scores(s, x.P, x.g, x.a, x.bias)
    terms = torch.einsum("bto,qoj,btj->qbt", x.g, x.P, x.ones)
    close(s, 1 + (terms if per_token else terms.sum(-1)))
    s = zeros(*shape) + 1
    call.low_rank_scores(s, x.L, x.R, x.g, x.a, x.bias)
    terms = torch.einsum("bto,qok,qkj,btj->qbt", x.g, x.L, x.R, x.ones)
    close(s, 1 + (terms if per_token else terms.sum(-1)))


@given(x=layers, masked=st.booleans())
def test_covariance_is_its_equation(x, masked):
    rows, mask = x.ones.flatten(0, 1), None
    if masked:
        mask = torch.arange(x.B * x.T) % 3 != 1
        rows = rows[mask]
    cov = torch.eye(x.J).double()
    call.covariance(cov, x.a.flatten(0, 1), mask, x.bias)
    close(cov, torch.eye(x.J) + rows.T @ rows)


@given(x=layers)
def test_rotations_keep_the_energy(x):
    """sum(lam_sum) = sum_b ||G_b||^2, whatever the orthogonal matrices."""
    lam_sum = zeros(x.O, x.J)
    call.eigenvalues(lam_sum, x.g, x.a, x.Qg, x.Qa, x.bias)
    close(lam_sum.sum(), gradients(x).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_covariances_are_symmetric_and_positive(dtype):
    for N, J in ((40, 131), (300, 257)):
        cov = torch.zeros(J, J)
        call.covariance(cov, torch.randn(N, J).to(dtype))
        assert torch.equal(cov, cov.T)
        values = torch.linalg.eigvalsh(cov.double())
        assert values[0] > -1e-6 * values[-1]
        assert (values > 1e-5 * values[-1]).sum() == min(N, J)


def test_scores_are_linear():
    x, y = layer(B=4, T=9, I=33, O=17, Q=3), layer(B=4, T=9, I=33, O=17, Q=3, seed=1)

    def dense(P: Tensor, g: Tensor) -> Tensor:
        s = zeros(3, 4)
        call.dense_scores(s, P, g, x.a, True)
        return s

    def low_rank(L: Tensor, R: Tensor, g: Tensor) -> Tensor:
        s = zeros(3, 4)
        call.low_rank_scores(s, L, R, g, x.a, True)
        return s

    close(dense(2 * x.P - 3 * y.P, x.g), 2 * dense(x.P, x.g) - 3 * dense(y.P, x.g))
    close(dense(x.P, 2 * x.g - 3 * y.g), 2 * dense(x.P, x.g) - 3 * dense(x.P, y.g))
    close(low_rank(x.L - y.L, x.R, x.g), low_rank(x.L, x.R, x.g) - low_rank(y.L, x.R, x.g))
    close(low_rank(x.L, x.R - y.R, x.g), low_rank(x.L, x.R, x.g) - low_rank(x.L, y.R, x.g))


def test_low_rank_scores_are_dense_scores_of_the_product():
    x = layer(B=4, T=40, I=70, O=50, Q=9, K=20)
    dense, low_rank = zeros(9, 4, 40), zeros(9, 4, 40)
    call.dense_scores(dense, x.L @ x.R, x.g, x.a, True)
    call.low_rank_scores(low_rank, x.L, x.R, x.g, x.a, True)
    close(low_rank, dense)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_batches_may_be_split(dtype):
    """No sequence depends on its neighbours, and sums run over batches."""
    x = layer(B=7, T=33, I=130, O=66, Q=5, K=4)
    for name, value in vars(x).items():
        if isinstance(value, Tensor):
            setattr(x, name, value.to(dtype))

    def results(*parts: slice) -> tuple[Tensor, ...]:
        lam_sum, cov = torch.zeros(66, 131, dtype=dtype), torch.zeros(131, 131, dtype=dtype)
        P, s, pairs = [], torch.zeros(7, dtype=dtype), torch.zeros(5, 7, dtype=dtype)
        tokens = torch.zeros(5, 7, 33, dtype=dtype)
        for part in parts:
            g, a = x.g[part], x.a[part]
            call.covariance(cov, a.flatten(0, 1), None, True)
            call.eigenvalues(lam_sum, g, a, x.Qg, x.Qa, True)
            P.append(call.precondition(g, a, x.Qg, x.Qa, x.lam, DAMPING, True))
            call.self_influence(s[part], g, a, x.Qg, x.Qa, x.lam, DAMPING, True)
            call.dense_scores(pairs[:, part], x.P, g, a, True)
            call.low_rank_scores(tokens[:, part], x.L, x.R, g, a, True)
        return cov, lam_sum, torch.cat(P), s, pairs, tokens

    whole = results(slice(0, 7))
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    for parts in ((slice(0, 3), slice(3, 7)), tuple(slice(b, b + 1) for b in range(7))):
        for got, expected in zip(results(*parts), whole, strict=True):
            scale = expected.abs().max().item()
            torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("card", ops.ALL, ids=ops.stem)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_references_are_as_good_as_their_dtype(card, dtype):
    """The two-error rule leans on the reference's own error: it must be a rounding error."""
    x = layer(B=3, T=50, I=30, O=20, Q=4, K=5)
    x.Qg, x.Qa = orthogonal(20, torch.float64), orthogonal(31, torch.float64)
    wide = {"lam": x.lam, "damping": DAMPING, "bias": True}
    into = {"cov": (31, 31), "lam_sum": (20, 31), "s": (3,) if hasattr(card, "order") else (4, 3)}
    names = [a.name for a in ops.call(card).default._schema.arguments if a.name != "order"]

    def run(dtype: torch.dtype) -> Tensor:
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        args = []
        for name in names:
            if name in into:
                args.append(torch.zeros(into[name], dtype=accumulator))
            elif name in wide:
                value = wide[name]
                args.append(value.to(accumulator) if isinstance(value, Tensor) else value)
            elif name == "mask":
                args.append(None)
            else:
                value = x.a.flatten(0, 1) if name == "x" else getattr(x, name)
                args.append(value.to(dtype))
        out = card.reference(*args)
        return args[0] if out is None else out

    exact = run(torch.float64)
    error = (run(dtype).double() - exact).norm() / exact.norm()
    assert 0 < error < 2 * torch.finfo(dtype).eps
